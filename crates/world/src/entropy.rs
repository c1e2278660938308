//! Randomness for keys, nonces and identities.

use ring::rand::{SecureRandom, SystemRandom};

/// A source of random bytes. The real one is the kernel's; the simulation's is a seeded generator.
pub trait Entropy: Send + Sync {
    /// Fills `buffer` with random bytes.
    fn fill(&self, buffer: &mut [u8]);
}

impl dyn Entropy + '_ {
    /// `N` random bytes.
    pub fn bytes<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        self.fill(&mut bytes);
        bytes
    }
}

/// The kernel's random number generator.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemEntropy;

impl Entropy for SystemEntropy {
    fn fill(&self, buffer: &mut [u8]) {
        SystemRandom::new().fill(buffer).expect("getrandom(2) does not fail once the machine has booted");
    }
}
