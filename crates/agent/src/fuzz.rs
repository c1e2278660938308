//! Fuzz targets of this crate: the maps that an earlier run left, the configuration, the control socket. Compiled for
//! tests and fuzzers only; see `fuzz/README.md`.

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
