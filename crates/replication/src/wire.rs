//! Messages between a sender (mobility agent, branch host) and a receiver (process server, master target).
//!
//! A message travels as one frame: a kind byte and a body. The first message each way carries the protocol version;
//! within one version fields are only ever appended by a new kind. Decoding checks every limit and never panics.
//!
//! ```text
//! sender                                   receiver
//!   Hello ───────────────────────────────►
//!         ◄─────────────────────────────── Welcome | Refuse
//!   Changes, Proof, Break ───────────────►
//!         ◄─────────────────────────────── Ack
//!   HealBegin, Offer, HealData, HealEnd ─►
//!   OfferGranules, OfferLeaves ──────────►  (home)
//!         ◄─────────────────────────────── Wants, HealCredit, HealCommitted
//! ```

mod codec;
mod message;

pub use codec::WireFrame;
pub use message::{
    HealContent, HealNeed, Hello, Message, OfferHashes, OfferedLeaf, PROTOCOL_VERSION, RefusalCode, Resume, Welcome,
    is_wanted, wanted_bitmap,
};
