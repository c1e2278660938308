//! `farshore-agent metrics`: the status in the text format of Prometheus, for its node exporter's `textfile` collector or a
//! timer that pushes.

use std::fmt::Write;

use agent::status::{AgentStatus, ProtectionState};

/// The states, in the order of their documentation.
const STATES: [ProtectionState; 7] = [
    ProtectionState::Starting,
    ProtectionState::Healing,
    ProtectionState::Protected,
    ProtectionState::Disconnected,
    ProtectionState::Refused,
    ProtectionState::Failed,
    ProtectionState::Stopping,
];

/// The status as metrics. `None`: nobody answers.
pub(crate) fn text(status: Option<&AgentStatus>) -> String {
    let mut text = String::new();
    let mut metric = |name: &str, kind: &str, help: &str, samples: &[(String, f64)]| {
        // Writing to a String never fails.
        let _ = writeln!(text, "# HELP farshore_agent_{name} {help}\n# TYPE farshore_agent_{name} {kind}");
        for (labels, value) in samples {
            let _ = writeln!(text, "farshore_agent_{name}{labels} {value}");
        }
    };
    let one = |value: f64| vec![(String::new(), value)];
    let count = |value: u64| one(value as f64);
    metric("up", "gauge", "Whether the agent answers.", &count(u64::from(status.is_some())));
    let Some(status) = status else { return text };
    let states = STATES.map(|state| (format!("{{state=\"{state}\"}}"), f64::from(u8::from(state == status.state))));
    metric("state", "gauge", "Whether the agent is in this state.", &states);
    metric("state_seconds", "gauge", "For how long it has been in its state.", &count(status.state_for_s));
    metric("uptime_seconds", "gauge", "For how long it has run.", &count(status.uptime_s));
    metric("connected", "gauge", "Whether a process server has accepted it.", &count(status.link.connected.into()));
    metric("sessions_total", "counter", "Sessions with process servers.", &count(status.link.sessions));
    metric("ring_used_bytes", "gauge", "Bytes in the send buffer.", &count(status.ring.used_bytes));
    metric("ring_max_bytes", "gauge", "Size of the send buffer.", &count(status.ring.max_bytes));
    metric("heal_active", "gauge", "Whether a heal is needed or running.", &count(status.heal.active.into()));
    metric("heal_planned_bytes", "gauge", "Bytes of disk that the heal covers.", &count(status.heal.planned_bytes));
    metric("heal_compared_bytes", "gauge", "Bytes of disk looked at so far.", &count(status.heal.compared_bytes));
    metric("heal_sent_bytes", "gauge", "Bytes of data that had to travel.", &count(status.heal.sent_bytes));
    let writes = &status.writes;
    metric("changes_total", "counter", "Requests that changed a disk.", &count(writes.changes));
    metric("written_bytes_total", "counter", "Data bytes written to the disks.", &count(writes.written_bytes));
    metric("tracked_total", "counter", "Requests that were only marked.", &count(writes.tracked));
    metric("failed_writes_total", "counter", "Requests that a disk refused.", &count(writes.failed));
    metric("untold_writes_total", "counter", "Requests whose end was not told in time.", &count(writes.untold));
    let points = &status.consistency;
    metric("application_points_total", "counter", "Application-consistent points.", &count(points.application_points));
    metric("application_failures_total", "counter", "Attempts at them that failed.", &count(points.failures));
    metric("crash_markers_total", "counter", "Crash-consistent markers on schedule.", &count(points.crash_markers));
    let newest = points.last_application_ns as f64 / 1e9;
    metric("application_point_timestamp_seconds", "gauge", "When the newest one was taken; 0: none.", &one(newest));
    metric(
        "application_rest_seconds",
        "gauge",
        "How long writers waited for it.",
        &one(points.last_rest_ms as f64 / 1e3),
    );
    if let Some(scrub) = &status.scrub {
        metric("scrub_active", "gauge", "Whether source and vault are being compared.", &count(scrub.running.into()));
        metric("scrub_round_bytes", "gauge", "Bytes of disk that the scrub goes through.", &count(scrub.round_bytes));
        metric("scrub_done_bytes", "gauge", "Bytes of disk that it has come through.", &count(scrub.round_done_bytes));
        metric("scrub_rounds_total", "counter", "Scrubs of all disks that ended.", &count(scrub.rounds));
        let leaves = [
            ("same", scrub.same_bytes),
            ("differing", scrub.differing_bytes),
            ("busy", scrub.busy_bytes),
            ("untold", scrub.untold_bytes),
            ("unreadable", scrub.unreadable_bytes),
        ];
        let leaves = leaves.map(|(found, bytes)| (format!("{{found=\"{found}\"}}"), bytes as f64));
        metric("scrub_bytes_total", "counter", "What scrubs found, since the start.", &leaves);
        let oldest = scrub.oldest_ns as f64 / 1e9;
        metric(
            "scrub_oldest_timestamp_seconds",
            "gauge",
            "When all was last known to be equal; 0: never.",
            &one(oldest),
        );
    }
    let disks: Vec<_> = status
        .disks
        .iter()
        .map(|disk| {
            let labels = format!("{{disk=\"{}\",serial=\"{}\"}}", escaped(&disk.name), escaped(&disk.serial));
            (labels, disk.size_bytes as f64)
        })
        .collect();
    metric("disk_size_bytes", "gauge", "Sizes of the protected disks.", &disks);
    text
}

/// A label's value as the format wants it.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_read_as_prometheus_wants_them() {
        assert!(text(None).ends_with("farshore_agent_up 0\n"));
        let status = r#"{"format":1,"version":"0","pid":1,"uptime_s":60,"machine":"00","machine_name":"db","state":"healing",
            "state_for_s":5,"reason":"","link":{"connected":true,"server":"s:1","last_error":"","sessions":2},
            "watermarks":{"captured":"1.1","sent":"1.1","journaled":"1.1","committed":"1.1"},
            "ring":{"used_bytes":4096,"max_bytes":67108864},
            "heal":{"active":true,"planned_bytes":10,"compared_bytes":4,"sent_bytes":2},
            "writes":{"changes":7,"written_bytes":123456789012,"tracked":1,"failed":0},
            "scrub":{"running":true,"round_bytes":9,"round_done_bytes":3,"same_bytes":2,"differing_bytes":4096,"busy_bytes":0,
            "untold_bytes":0,"unreadable_bytes":0,"rounds":1,"ended_ns":5,"oldest_ns":4},
            "disks":[{"disk":0,"name":"a \"b\"\\","path":"/dev/vda","serial":"S-1","size_bytes":1024,"export":"a"}],
            "nbd":{"socket":"","tcp":[],"connections":0}}"#;
        let status: AgentStatus = serde_json::from_str(status).expect("a status");
        let text = text(Some(&status));
        for line in [
            "farshore_agent_up 1",
            "farshore_agent_scrub_bytes_total{found=\"differing\"} 4096",
            "farshore_agent_state{state=\"healing\"} 1",
            "farshore_agent_state{state=\"protected\"} 0",
            "farshore_agent_written_bytes_total 123456789012",
            "farshore_agent_disk_size_bytes{disk=\"a \\\"b\\\"\\\\\",serial=\"S-1\"} 1024",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing in\n{text}");
        }
        // Each sample follows the type of its own metric.
        let mut current = "";
        for line in text.lines() {
            match line.strip_prefix("# TYPE ") {
                Some(named) => current = named.split(' ').next().expect("a name"),
                None if line.starts_with('#') => {}
                None => assert_eq!(line.split([' ', '{']).next(), Some(current), "{line}"),
            }
        }
    }
}
