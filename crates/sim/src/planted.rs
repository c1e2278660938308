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
    /// Home writes what a heal read over what the branch has written since.
    ShieldIgnored,
    /// A gap of ranges is never recorded: points are offered as whole.
    LackingNotSaid,
    /// A gap of ranges names more than is lacking: points say that they lack what they have.
    LackingTooMuchSaid,
    /// A server goes on with a chain that a failover has closed.
    CloseIgnored,
    /// A server that takes over does not ask what the sender still has: a planned move opens a gap.
    HandOverForgotten,
    /// A scrub takes what is written while it looks for what differs.
    ScrubIgnoresWriters,
    /// Heal data is stored, and its sender is never told that it may send more.
    CreditNotPaid,
    /// In an outage: what a full journal does not take is acknowledged all the same.
    FullJournalAcknowledges,
    /// In an outage: the journal grows beyond its configured size.
    JournalUnbounded,
    /// In an outage: everything that waits for the store waits in memory.
    MemoryUnbounded,
    /// In an outage: what cannot be compared is taken for different.
    ComparedWithoutVault,
}

/// What lives must catch, in the order in which the test runs them.
pub const ALL: [Bug; 26] = [
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
    Bug::ShieldIgnored,
    Bug::LackingNotSaid,
    Bug::LackingTooMuchSaid,
    Bug::CloseIgnored,
    Bug::HandOverForgotten,
    Bug::CreditNotPaid,
    Bug::ScrubIgnoresWriters,
];

/// What shows only while the vault is away for long: the tests of outages must catch it.
pub const IN_OUTAGES: [Bug; 4] =
    [Bug::FullJournalAcknowledges, Bug::JournalUnbounded, Bug::MemoryUnbounded, Bug::ComparedWithoutVault];

impl std::str::FromStr for Bug {
    type Err = String;

    fn from_str(text: &str) -> Result<Bug, String> {
        let found = ALL.into_iter().chain(IN_OUTAGES).find(|bug| format!("{bug:?}") == text);
        found.ok_or_else(|| format!("there is no planted bug {text}; known are {ALL:?}"))
    }
}
