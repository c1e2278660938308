//! The questions of the proof, and the branch's own answers to them.

use replication::DiskId;
use replication::geometry::ByteRange;

use super::{FailbackRun, Next, Rest, SessionEnd, State, Turn, goes_on, unequal};
use crate::failback::Phase;
use crate::home_proof::{ProofScope, Terms};
use crate::home_wire::HomeMessage;
use crate::limits;
use world::Monotonic;

/// Questions to home about what it holds.
pub(super) struct Proof {
    ranges: Vec<(DiskId, ByteRange)>,
    /// Id of the first question. Answers to questions of an earlier proof have smaller ones.
    first_id: u64,
    asked: usize,
    answered: usize,
    scope: ProofScope,
    terms: Terms,
    /// What the branch's head says to the first question that is not answered.
    ours: Option<String>,
}

/// Questions of the proof that are asked before the first is answered.
const PROOFS_IN_FLIGHT: usize = 4;

impl FailbackRun {
    /// Home has everything: asks about all of it.
    pub(super) fn begin_proof(&mut self, rest: Rest) -> (State, Turn) {
        let ranges: Vec<(DiskId, ByteRange)> = self
            .branch
            .core()
            .disks()
            .iter()
            .filter_map(|geometry| Some((geometry.disk, geometry.range()?)))
            .flat_map(|(disk, range)| range.split_at_multiples(limits::PROOF_RANGE_BYTES).map(move |part| (disk, part)))
            .collect();
        self.set(|status| {
            status.phase = Phase::Proving;
            status.proved_bytes = 0;
            status.proof_read_bytes = 0;
        });
        let terms = Terms::new(self.branch.core().leaf_key());
        let scope = self.config.proof;
        let proof = Proof { first_id: self.next_proof, ranges, asked: 0, answered: 0, scope, terms, ours: None };
        self.next_proof += proof.ranges.len() as u64;
        (State::Proving { rest, proof, since: self.now() }, Turn::Busy)
    }

    /// Compares what home holds with the branch's head, leaf by leaf in sums: one answer at a time.
    pub(super) fn prove(&mut self, rest: Rest, mut proof: Proof, since: Monotonic) -> Next {
        if !rest.frozen.holds() {
            return Ok((self.resume(goes_on("the branch was at rest for too long".into())), Turn::Busy));
        }
        let Some(&(disk, range)) = proof.ranges.get(proof.answered) else { return self.finish(rest) };
        while proof.asked < proof.ranges.len() && proof.asked < proof.answered + PROOFS_IN_FLIGHT {
            let (disk, range) = proof.ranges[proof.asked];
            let (id, scope) = (proof.first_id + proof.asked as u64, proof.scope);
            self.wire()?.say(&HomeMessage::Prove { id, disk: disk.0, start: range.start, len: range.len, scope })?;
            proof.asked += 1;
        }
        // Ours is computed while home computes its own.
        let ours = match proof.ours.take() {
            Some(ours) => ours,
            None => match self.branch.core().leaf_hashes(disk, range) {
                Ok(hashes) => proof.terms.sum(range.start, hashes).digest(),
                Err(error) => {
                    let problem = unequal(format!("{range} of {disk} cannot be read from the branch: {error}"));
                    return Ok((self.resume(problem), Turn::Busy));
                }
            },
        };
        match self.hear(since)? {
            None => {
                proof.ours = Some(ours);
                Ok((State::Proving { rest, proof, since }, Turn::Idle))
            }
            // Of a proof that was given up.
            Some(HomeMessage::Digest { id, .. }) if id < proof.first_id => {
                proof.ours = Some(ours);
                Ok((State::Proving { rest, proof, since }, Turn::Busy))
            }
            Some(HomeMessage::Digest { id, digest, read_bytes }) if id == proof.first_id + proof.answered as u64 => {
                if digest.as_ref() != Some(&ours) {
                    self.distrusted = true;
                    let what = match digest {
                        Some(_) => "at home differs from the branch",
                        None => "at home cannot be read",
                    };
                    return Ok((self.resume(unequal(format!("{range} of {disk} {what}"))), Turn::Busy));
                }
                self.set(|status| {
                    status.proved_bytes += range.len;
                    status.proof_read_bytes += read_bytes;
                });
                proof.answered += 1;
                Ok((State::Proving { rest, proof, since: self.now() }, Turn::Busy))
            }
            Some(other) => Err(SessionEnd::Lost(format!("unexpected {other:?}"))),
        }
    }
}
