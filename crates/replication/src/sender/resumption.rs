//! Going on where a sender ended that left no word, with a ring and maps that outlived it.

use super::{Heal, Resumption, Sender, SenderConfig, StreamState};
use crate::position::{ChainId, SequenceNumber};
use crate::wire::HealNeed;

impl Sender {
    /// A sender that goes on where another one ended, with a ring and maps that outlived it.
    pub fn resumed(config: SenderConfig, resumption: Resumption, cleared: Option<(ChainId, SequenceNumber)>) -> Sender {
        let mut sender = Sender::new(config, HealNeed::Nothing, resumption.gap_count, cleared);
        sender.chain = Some(resumption.chain);
        sender.generation = resumption.generation;
        sender.assigned = resumption.released;
        sender.released = resumption.released;
        sender.released_hash = resumption.hash;
        (sender.reported, sender.heals_started) = (resumption.released, resumption.heals_started);
        sender.consumed = resumption.ring_end;
        sender.steady_from = resumption.released;
        sender.journaled_end = Some((resumption.ring_end, resumption.released, resumption.hash));
        sender
    }

    /// How another sender could go on from here with the same ring; `None` if it could not.
    pub fn resumption(&self) -> Option<Resumption> {
        let (ring_end, released, hash) = self.journaled_end?;
        let steady = matches!((&self.stream, &self.heal), (StreamState::Whole, Heal::Idle))
            && released >= self.steady_from
            && self.lacking.is_empty()
            && !self.whole_needed;
        let chain = self.chain.filter(|_| steady)?;
        Some(Resumption {
            chain,
            generation: self.generation,
            released,
            hash,
            ring_end,
            gap_count: self.gap_count,
            heals_started: self.heals_started,
        })
    }
}
