//! Fuzz targets of this crate: the conversation with home, and the control socket of a branch. Compiled for tests and
//! fuzzers only; see `fuzz/README.md`.

use link::Frame;

use crate::control::{Answer, Command};
use crate::home_wire::{Said, replication_frame, understand};

/// `kind ‖ body` of a frame between failback and master target.
pub fn home_frame(data: &[u8]) -> bool {
    let Some((&kind, body)) = data.split_first() else { return false };
    let again = match understand(Frame::new(kind, body.to_vec())) {
        Ok(Said::Home(message)) => match understand(message.frame()) {
            Ok(Said::Home(again)) => again == message,
            _ => false,
        },
        Ok(Said::Replication(message)) => match understand(replication_frame(&message)) {
            Ok(Said::Replication(again)) => again == message,
            _ => false,
        },
        Ok(Said::OtherVersion(_)) | Err(_) => return false,
    };
    assert!(again, "what was said is understood the same again");
    true
}

/// A line of a branch's control socket, in either direction.
pub fn branch_control(data: &[u8]) -> bool {
    let command = serde_json::from_slice::<Command>(data);
    if let Ok(command) = &command {
        let text = serde_json::to_string(command).expect("a command is plain data");
        assert_eq!(serde_json::from_str::<Command>(&text).as_ref().ok(), Some(command));
    }
    let answer = serde_json::from_slice::<Answer>(data);
    if let Ok(answer) = &answer {
        let text = serde_json::to_string(answer).expect("an answer is plain data");
        assert_eq!(serde_json::from_str::<Answer>(&text).as_ref().ok(), Some(answer));
    }
    command.is_ok() || answer.is_ok()
}

#[cfg(test)]
#[path = "../../../fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{Destination, HomeAddress, ServedDisk};
    use crate::home_disk::{HomeOrder, Refusal};
    use crate::home_proof::ProofScope;
    use crate::home_wire::{HOME_VERSION, HomeMessage};
    use crate::succession::Succession;
    use replication::SequenceNumber;
    use replication::wire::Message;

    fn order() -> HomeOrder {
        HomeOrder {
            disk: 0,
            path: "/dev/vda".into(),
            size_bytes: 1 << 30,
            serial: Some("serial-1".into()),
            any_disk: false,
            in_use: true,
        }
    }

    #[test]
    fn home_frames() {
        let bytes = |frame: Frame| [&[frame.kind()][..], &frame.into_body()].concat();
        let said = |message: HomeMessage| bytes(message.frame());
        let (machine, chain) = ("0".repeat(32), "1".repeat(32));
        let message = HomeMessage::Order { version: HOME_VERSION, machine, chain, disks: vec![order()] };
        let refusal = Refusal::new("it is mounted", "that would destroy it", "unmount it");
        let end = Message::Bye { reason: "home".into() };
        let proof = Message::Ack { journaled: SequenceNumber(1), committed: SequenceNumber(1), window_bytes: 5 };
        let seeds = [
            ("order", said(message)),
            ("refused", said(HomeMessage::Refused { refusal })),
            ("prove", said(HomeMessage::Prove { id: 1, disk: 0, start: 65_536, len: 4096, scope: ProofScope::Whole })),
            ("digest", said(HomeMessage::Digest { id: 1, digest: Some("a".repeat(64)), read_bytes: 4096 })),
            ("complete", said(HomeMessage::Complete)),
            ("bye", bytes(replication_frame(&end))),
            ("ack", bytes(replication_frame(&proof))),
        ];
        replay::replay("home_frame", home_frame, &seeds);
    }

    #[test]
    fn control_lines() {
        let command = |command: &Command| serde_json::to_vec(command).expect("plain data");
        let answer = Answer {
            ok: false,
            problem: Some(Refusal::new("what", "why", "advice")),
            branch: "2".repeat(32),
            process: 7,
            disks: vec![ServedDisk { disk: 0, size_bytes: 4096, path: "/dev/a".into() }],
            opened: "latest".into(),
            written: "1.5".into(),
            committed: "1.4".into(),
            unsealed_bytes: 4096,
            failback: None,
            destination: Some(Destination { home: HomeAddress::Here, disks: vec![order()] }),
        };
        let home = HomeAddress::At("mt.example:7443".into());
        let (proof, succession) = (ProofScope::Whole, Succession::CloseHistory);
        let seeds = [
            ("status", command(&Command::Status)),
            ("failback", command(&Command::Failback { home, disks: vec![order()], proof, succession })),
            ("cut-over", command(&Command::CutOver)),
            ("answer", serde_json::to_vec(&answer).expect("plain data")),
        ];
        replay::replay("branch_control", branch_control, &seeds);
    }
}
