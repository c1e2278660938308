//! The first word: whether a sender's stream goes on where this side's ends, judged by what both remember of it.

use crate::change::StreamHash;
use crate::position::{ChainId, InstanceId, MachineId, SequenceNumber};
use crate::reach::Ranges;
use crate::wire::{HealNeed, Hello, PROTOCOL_VERSION, RefusalCode};

/// What the receiving side remembers of a machine when it calls.
#[derive(Debug, Clone)]
pub struct Remembered {
    /// The machine this receiver's certificate check found on the other end.
    pub machine: MachineId,
    /// The chain the machine follows.
    pub chain: ChainId,
    /// The stream as far as it is journaled here, if this writer has one: newest position and hash.
    pub stream: Option<(SequenceNumber, StreamHash)>,
    /// Newest position in the vault (or durable on the home disk).
    pub committed: SequenceNumber,
    /// Newest position in the vault at which the stream's hash is known, and the hash.
    pub past: Option<(SequenceNumber, StreamHash)>,
    /// A gap of the whole machine is open, or the disks were never complete.
    pub incomplete: bool,
    /// The ranges of all other open gaps.
    pub lacking: Ranges,
    /// Boot id and VM generation id of the last session, if there was one.
    pub last_boot: Option<([u8; 16], [u8; 16])>,
    /// The agent run whose link is alive right now.
    pub live: Option<InstanceId>,
    /// The chain holds nothing at all.
    pub empty: bool,
}

/// The answer to a [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Greeting {
    /// Turn it away.
    Refuse {
        /// The kind of reason.
        code: RefusalCode,
        /// The reason in words.
        reason: String,
    },
    /// The stream goes on where it was; the same generation if this writer holds one.
    Continue {
        /// What the sender says it lacks.
        need: HealNeed,
    },
    /// Continuity is lost: open a new generation and have the sender heal.
    Renew {
        /// By maps or by comparing everything.
        need: HealNeed,
        /// Why, for the gap's record.
        cause: String,
    },
}

/// Judges a sender's first message. Must 7: whoever is behind what it acknowledged loses continuity.
pub fn greet(hello: &Hello, known: &Remembered) -> Greeting {
    let refuse = |code, reason: String| Greeting::Refuse { code, reason };
    let renew = |need, cause: &str| Greeting::Renew { need, cause: cause.to_owned() };
    if hello.version < PROTOCOL_VERSION {
        return refuse(
            RefusalCode::Version,
            format!("the agent speaks protocol {}, this server {PROTOCOL_VERSION}: upgrade the agent", hello.version),
        );
    }
    if hello.machine != known.machine {
        return refuse(
            RefusalCode::NotAuthorised,
            format!("the certificate belongs to machine {}, the agent says it is {}", known.machine, hello.machine),
        );
    }
    if known.live.is_some_and(|live| live != hello.instance) {
        return refuse(
            RefusalCode::DuplicateIdentity,
            "another running agent uses this machine's identity; stop one of them, or join the copy as a new machine"
                .into(),
        );
    }
    let identities_changed = known
        .last_boot
        .is_some_and(|(boot, vm)| hello.resume.is_some() && (boot != hello.boot || vm != hello.vm_generation));
    if identities_changed {
        return renew(HealNeed::Whole, "the machine was reset or reverted while its agent ran");
    }
    let at_least = |need: HealNeed| if hello.need == HealNeed::Whole { HealNeed::Whole } else { need };
    if let Some((chain, cleared)) = hello.cleared
        && (chain != known.chain || known.committed < cleared)
    {
        return renew(HealNeed::Whole, "the vault is behind what the agent saw committed");
    }
    let Some(resume) = &hello.resume else {
        let need = if known.empty { HealNeed::Whole } else { at_least(HealNeed::Maps) };
        // What the first replication had completed before is a history, even if it holds nothing but zeros.
        let begins = known.empty && known.incomplete;
        return renew(need, if begins { "initial replication" } else { "the agent was restarted" });
    };
    if resume.chain != known.chain {
        return renew(HealNeed::Whole, "the agent was protecting into another chain");
    }
    if known.committed > resume.sent {
        return renew(HealNeed::Whole, "the agent is behind what the vault holds of it");
    }
    // Where only one of the two knows a hash, it is compared by the sender, which knows those of the positions since.
    let differs = |(at, hash)| resume.released == at && resume.hash != hash && resume.hash != StreamHash::default();
    if known.past.is_some_and(differs) {
        return renew(HealNeed::Whole, "agent and vault disagree about the stream's past");
    }
    match known.stream {
        Some((journaled, _)) if journaled < resume.released => {
            renew(at_least(HealNeed::Maps), "the process server's journal was lost")
        }
        None => renew(at_least(HealNeed::Maps), "another process server took over"),
        Some((journaled, _)) if journaled > resume.sent => {
            renew(HealNeed::Whole, "the agent is behind what it had already sent")
        }
        Some(_) if known.incomplete && hello.need == HealNeed::Nothing => {
            renew(HealNeed::Maps, "the process server lacks part of the stream")
        }
        Some(_) if hello.need == HealNeed::Nothing && !hello.lacking.covers(&known.lacking) => {
            renew(HealNeed::Whole, "the process server lacks ranges that the agent does not know of")
        }
        Some(_) => Greeting::Continue { need: hello.need },
    }
}
