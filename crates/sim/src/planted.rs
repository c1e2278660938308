//! Planted bugs: mistakes that somebody could make, each put in at a seam of the real code. The simulation must catch
//! every one of them; a checker that misses one is worth nothing.

/// One mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// Changes are called durable before they are synced.
    AckBeforeSync,
    /// A heal is placed one position too low: what was written at `p0`'s place hides it.
    HealBelowOlderWrites,
    /// A heal is placed above the stream that ran while it read.
    HealAboveStream,
    /// The heal ends at the position that the consumer has reached, which is in the vault, instead of the producer's.
    ConsumerInsteadOfProducer,
    /// A map epoch is cleared as soon as the next one begins, before its writes are committed.
    MapClearedEarly,
    /// A dropped write does not raise the gap count.
    GapNotCounted,
    /// A name lost to another writer is taken for won.
    LostNameTakenForWon,
    /// Every object gets the same nonce and every data key the same bytes.
    NonceReuse,
    /// A cut is announced one change later than it is.
    CutOneTooFar,
    /// The gap is never recorded.
    GapNotRecorded,
    /// Offers are answered as if everything were equal.
    EverythingEqual,
    /// After a reboot the maps are trusted.
    RebootIgnored,
    /// A branch's flush is answered before its journal is synced.
    BranchFlushNotSynced,
    /// Home acknowledges, and forgets that it is unfinished, before its disks are synced.
    HomeNotSynced,
    /// The note that home is between two states is not synced.
    HomeNoteNotSynced,
    /// Home's wishes are lost: nothing that differs is sent.
    HomeWantsNothing,
    /// A server that lost its generation takes the chain back at once and tries again what it could not commit.
    RetryUnderLostGeneration,
    /// Of two writes to one place, on both sides of a cut, only the later one's bytes are kept.
    AbsorbedAcrossCut,
    /// An agent that comes back on a new link is taken for a new one: a gap and a heal for nothing.
    GapWithoutCause,
}

/// All of them, in the order in which the test runs them.
pub const ALL: [Bug; 19] = [
    Bug::AckBeforeSync,
    Bug::HealBelowOlderWrites,
    Bug::HealAboveStream,
    Bug::ConsumerInsteadOfProducer,
    Bug::MapClearedEarly,
    Bug::GapNotCounted,
    Bug::LostNameTakenForWon,
    Bug::NonceReuse,
    Bug::CutOneTooFar,
    Bug::GapNotRecorded,
    Bug::EverythingEqual,
    Bug::RebootIgnored,
    Bug::BranchFlushNotSynced,
    Bug::HomeNotSynced,
    Bug::HomeNoteNotSynced,
    Bug::HomeWantsNothing,
    Bug::RetryUnderLostGeneration,
    Bug::AbsorbedAcrossCut,
    Bug::GapWithoutCause,
];

impl std::str::FromStr for Bug {
    type Err = String;

    fn from_str(text: &str) -> Result<Bug, String> {
        let found = ALL.into_iter().find(|bug| format!("{bug:?}") == text);
        found.ok_or_else(|| format!("there is no planted bug {text}; known are {ALL:?}"))
    }
}
