//! Everything Farshore takes from the outside world, behind small traits.
//!
//! Time, randomness, files and block devices come into the product only through this crate, so that a seeded
//! simulation can run the real code against a world that loses power, tears writes and skews clocks.
//!
//! * [`Clock`] and [`Entropy`]: time and randomness.
//! * [`Files`]: the file primitives, with exactly the durability that POSIX promises and no more.
//! * [`durable`]: the only module that combines those primitives into "published for ever" and "replaced atomically".
//! * [`BlockDevice`]: a disk, whether an image file, a raw device, a branch of a vault or a simulated one.

pub mod block;
pub mod block_file;
pub mod clock;
pub mod durable;
pub mod entropy;
pub mod files;
pub mod subfolder;

pub use block::{BlockDevice, BlockError, Extent, ExtentKind};
pub use block_file::{Access, FileDevice, OpenDeviceError};
pub use clock::{Clock, Monotonic, SystemClock, WallTime};
pub use entropy::{Entropy, SystemEntropy};
pub use files::{AppendFile, Files, RealFiles};
pub use subfolder::Subfolder;
