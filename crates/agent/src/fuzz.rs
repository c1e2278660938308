//! Fuzz targets of this crate: what an earlier run left (maps, records), the configuration, the control socket. Compiled
//! for tests and fuzzers only; see `fuzz/README.md`.

use crate::config::AgentConfig;
use crate::service::control::{Answer, Request};

pub use crate::capture::fuzz::map_file;

/// The configuration file.
pub fn agent_config(data: &[u8]) -> bool {
    let Some(config) = std::str::from_utf8(data).ok().and_then(|text| AgentConfig::parse(text).ok()) else {
        return false;
    };
    config.check().expect("what was parsed was checked");
    assert!(config.state_dir.is_absolute());
    true
}

/// A record of the state directory.
pub fn agent_record(data: &[u8]) -> bool {
    crate::state::fuzzed_record(data)
}

/// A line of the control socket, in either direction.
pub fn agent_control(data: &[u8]) -> bool {
    let request = serde_json::from_slice::<Request>(data);
    if let Ok(request) = &request {
        let text = serde_json::to_string(request).expect("a request is plain data");
        assert!(!text.contains('\n'), "a request is one line");
        assert_eq!(serde_json::from_str::<Request>(&text).as_ref().ok(), Some(request));
    }
    let answer = serde_json::from_slice::<Answer>(data);
    if let Ok(answer) = &answer {
        let text = serde_json::to_string(answer).expect("an answer is plain data");
        assert!(!text.contains('\n'), "an answer is one line");
        assert_eq!(serde_json::from_str::<Answer>(&text).as_ref().ok(), Some(answer));
    }
    request.is_ok() || answer.is_ok()
}

#[cfg(test)]
#[path = "../../../fuzz/replay.rs"]
pub(crate) mod replay;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::problem::Problem;

    #[test]
    fn agent_configs() {
        let least = b"state_dir = '/var/lib/agent'\n[[disk]]\nname = 'a'\npath = '/dev/vda'\n".to_vec();
        let more =
            b"state_dir = '/a'\nserver_addresses = ['ps1.example:7443', '[::1]:7443']\nring_bytes_max = 67108864\n\
            nbd_tcp = '127.0.0.1:10809'\n[[disk]]\nname = 'a'\npath = '/dev/vda'\n";
        replay::replay("agent_config", agent_config, &[("least", least), ("more", more.to_vec())]);
    }

    #[test]
    fn agent_records() {
        let enrolment = br#"e{"machine_name": "vm", "server_addresses": ["ps1:7443", "[::1]:7443"]}"#;
        let cleared = br#"c{"chain": "02020202020202020202020202020202", "committed": "3.1042"}"#;
        let stream = br#"s{"epoch": 4, "chain": "02020202020202020202020202020202", "generation": 3, "released": "3.9",
            "hash": "0606060606060606060606060606060606060606060606060606060606060606", "heals_started": 2,
            "lacking": [[0, 4096, 512], [1, 0, 65536]]}"#;
        let disks =
            br#"d{"disks": {"a": {"disk": 0, "serial": "s", "size_bytes": 4096, "inode": 7, "modified_ns": null},
            "b": {"disk": 1, "serial": "", "size_bytes": 0, "inode": null, "modified_ns": -5}}}"#;
        let scrub = br#"r{"chain": "02020202020202020202020202020202",
            "disks": [{"disk": 0, "equal": [[0, 65536, "3.9", 5], [69632, 512, "3.7", 4]]}],
            "round": {"began_ns": 5, "whole": true, "disks": [0, 1], "at": 65536, "divergent": 2},
            "ended_ns": 3, "rounds": 2, "suspicions": [{"id": 7, "chain": "02020202020202020202020202020202",
            "after": "3.7", "until": "3.10", "ranges": [[0, 4096, 4096]], "cause": "differs"}]}"#;
        let seeds = [
            ("scrub", scrub.to_vec()),
            ("enrolment", enrolment.to_vec()),
            ("cleared", cleared.to_vec()),
            ("stream", stream.to_vec()),
            ("disks", disks.to_vec()),
        ];
        replay::replay("agent_record", agent_record, &seeds);
    }

    #[test]
    fn control_lines() {
        let request = |request: &Request| serde_json::to_vec(request).expect("plain data");
        let answer = |answer: &Answer| serde_json::to_vec(answer).expect("plain data");
        let problem = Problem::failed("the agent is not running", "nobody listens", "start it");
        let seeds = [
            ("status", request(&Request::Status)),
            ("mark", request(&Request::Mark { name: "nightly".into(), wait_ms: 5 })),
            ("freeze", request(&Request::Freeze { limit_ms: 500, mark: Some("rest".into()) })),
            ("frozen", answer(&Answer::Frozen { limit_ms: 500, marked: true })),
            ("problem", answer(&Answer::Problem(problem))),
        ];
        replay::replay("agent_control", agent_control, &seeds);
    }
}
