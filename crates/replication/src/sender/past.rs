//! The stream's hash at positions that the sender no longer holds: where its batches ended, from the newest one that is known
//! to be committed on. A receiver that was not there then can show by it that it has the same stream.

use std::collections::BTreeMap;

use super::Sender;
use crate::change::StreamHash;
use crate::limits;
use crate::position::SequenceNumber;
use crate::wire::Welcome;

#[derive(Debug, Default)]
pub(super) struct Past {
    marks: BTreeMap<SequenceNumber, StreamHash>,
}

impl Past {
    /// A batch that ends with `end` is on its way.
    pub(super) fn sent(&mut self, end: SequenceNumber, hash: StreamHash) {
        self.marks.insert(end, hash);
        if self.marks.len() > limits::MARKS_MAX
            && let Some(oldest) = self.marks.keys().nth(1).copied()
        {
            // The first one is committed, and what a receiver will ask for unless it commits more.
            self.marks.remove(&oldest);
        }
    }

    /// Everything up to `through` is in the vault: nobody will ask for what lies before that.
    pub(super) fn committed(&mut self, through: SequenceNumber) {
        let newest = self.marks.range(..=through).next_back().map(|(at, _)| *at);
        if let Some(newest) = newest {
            self.marks = self.marks.split_off(&newest);
        }
    }

    pub(super) fn forget(&mut self) {
        self.marks.clear();
    }
}

impl Sender {
    /// Whether the vault holds another past of this stream than this side remembers. `false` if nothing can be compared: it
    /// is another chain, or a position at which this side knows no hash.
    pub(super) fn disagrees_about_the_past(&self, welcome: &Welcome) -> bool {
        let Some((at, hash)) = welcome.past.filter(|_| self.chain == Some(welcome.chain)) else { return false };
        self.hash_at(at).is_some_and(|known| known != hash)
    }

    /// The stream's hash behind the change `at`. A stream that has not begun has none.
    fn hash_at(&self, at: SequenceNumber) -> Option<StreamHash> {
        let held = || {
            let index = self.unreleased.binary_search_by_key(&at, |entry| entry.change.sequence).ok()?;
            Some(self.unreleased[index].hash)
        };
        let hash = match at == self.released {
            true => Some(self.released_hash),
            false => held().or_else(|| self.past.marks.get(&at).copied()),
        };
        hash.filter(|hash| *hash != StreamHash::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::{ChangeKind, SourceTime};
    use crate::cut::PointTime;
    use crate::geometry::ByteRange;
    use crate::position::{ChainId, DiskId, Epoch, Generation, InstanceId, MachineId};
    use crate::reach::Ranges;
    use crate::sender::{Action, Event, KeptStream, Request, SenderConfig};
    use crate::wire::{HealNeed, Message, OfferHashes, PROTOCOL_VERSION};

    fn config() -> SenderConfig {
        SenderConfig {
            machine: MachineId([1; 16]),
            instance: InstanceId([2; 16]),
            boot: [3; 16],
            vm_generation: [0; 16],
            started: PointTime(0),
            name: "test".into(),
            hashes: OfferHashes::Plain,
            rotate_every_ns: u64::MAX,
            proof_every_ns: u64::MAX,
            heal_chunk_bytes: 1 << 20,
            heal_window_bytes: u64::MAX,
        }
    }

    fn welcome(past: Option<(SequenceNumber, StreamHash)>, resume_after: SequenceNumber, continues: bool) -> Message {
        Message::Welcome(Welcome {
            version: PROTOCOL_VERSION,
            chain: ChainId([9; 16]),
            generation: Generation(2),
            resume_after,
            continues,
            hash: StreamHash::default(),
            committed: resume_after,
            past,
            need: HealNeed::Nothing,
            base_empty: false,
            window_bytes: 1 << 20,
        })
    }

    /// A sender of a whole stream that has sent three batches, of which two are journaled and one is committed; what is
    /// told it, and the hashes at their ends.
    fn streaming() -> (Sender, Vec<(SequenceNumber, StreamHash)>) {
        let base = SequenceNumber(Generation(2).base().0);
        let kept = KeptStream {
            chain: ChainId([9; 16]),
            generation: Generation(2),
            released: base,
            hash: StreamHash::default(),
            heals_started: 0,
            lacking: Ranges::default(),
        };
        let mut sender = Sender::resume(config(), 0, None, kept, Vec::new());
        sender.apply(Event::LinkUp { now: SourceTime(1), disks: Vec::new() });
        sender.apply(Event::Received(welcome(None, base, true)));
        let mut ends = Vec::new();
        for ring_end in 1..=3 {
            let kinds = vec![ChangeKind::Zero { range: ByteRange::new(0, 512 * ring_end) }];
            let request = Request { ring_end, epoch: Epoch(1), time: SourceTime(2), disk: DiskId(0), kinds };
            sender.apply(Event::Captured(request));
            let sent = sender.pump();
            let [Action::Send(Message::Changes(batch))] = &sent[..] else { panic!("{sent:?}") };
            let before = ends.last().map_or(StreamHash::default(), |(_, hash)| *hash);
            ends.push((batch[0].sequence, batch[0].extend_hash(before)));
        }
        let ack = Message::Ack { journaled: ends[1].0, committed: ends[0].0, window_bytes: 1 << 20 };
        sender.apply(Event::Received(ack));
        sender.apply(Event::LinkDown);
        sender.apply(Event::LinkUp { now: SourceTime(3), disks: Vec::new() });
        (sender, ends)
    }

    #[test]
    fn a_sender_compares_what_the_vault_says_of_its_past() {
        // At the newest committed batch, which it no longer holds, at the newest journaled one, and at one that it holds.
        for index in 0..3 {
            for (continues, lies) in [(true, false), (true, true), (false, false), (false, true)] {
                let (mut sender, ends) = streaming();
                let (at, hash) = ends[index];
                let past = Some((at, if lies { StreamHash([8; 32]) } else { hash }));
                let Message::Welcome(said) = welcome(past, ends[1].0, continues) else { unreachable!("made above") };
                let said = Welcome { hash: if continues { ends[1].1 } else { StreamHash::default() }, ..said };
                let actions = sender.apply(Event::Received(Message::Welcome(said)));
                let cut_off = actions.iter().any(|action| matches!(action, Action::Disconnect(_)));
                assert_eq!(cut_off, continues && lies, "{index} {actions:?}");
                // What it asks for when it calls again.
                sender.apply(Event::LinkDown);
                let hello = sender.apply(Event::LinkUp { now: SourceTime(4), disks: Vec::new() });
                let [Action::Send(Message::Hello(hello))] = &hello[..] else { panic!("{hello:?}") };
                let need = match (continues, lies) {
                    (_, true) => HealNeed::Whole,
                    (true, false) => HealNeed::Nothing,
                    (false, false) => HealNeed::Maps,
                };
                assert_eq!(hello.need, need, "batch {index}, continues {continues}, lies {lies}");
            }
        }
    }

    #[test]
    fn what_cannot_be_compared_is_no_disagreement() {
        let (mut sender, ends) = streaming();
        let between = SequenceNumber(ends[0].0.0 - 1);
        let actions =
            sender.apply(Event::Received(match welcome(Some((between, StreamHash([8; 32]))), ends[1].0, true) {
                Message::Welcome(said) => Message::Welcome(Welcome { hash: ends[1].1, ..said }),
                other => other,
            }));
        assert!(!actions.iter().any(|action| matches!(action, Action::Disconnect(_))), "{actions:?}");
        assert!(sender.is_whole());
    }

    #[test]
    fn the_newest_committed_mark_outlives_everything() {
        let mut past = Past::default();
        let hash = |number: u64| StreamHash([number as u8; 32]);
        (1..=10).for_each(|number| past.sent(SequenceNumber(number * 10), hash(number)));
        past.committed(SequenceNumber(57));
        assert_eq!(past.marks.keys().next(), Some(&SequenceNumber(50)), "the newest one that may be asked for");
        past.committed(SequenceNumber(9));
        assert_eq!(past.marks.len(), 6);
        (100..100 + 2 * limits::MARKS_MAX as u64).for_each(|number| past.sent(SequenceNumber(number * 10), hash(1)));
        assert_eq!(past.marks.len(), limits::MARKS_MAX);
        assert_eq!(past.marks.get(&SequenceNumber(50)), Some(&hash(5)));
        past.forget();
        assert!(past.marks.is_empty());
    }
}
