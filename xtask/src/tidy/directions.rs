//! Who may know whom. The language knows nobody, the vault knows nothing of agents, and only the programs at the end
//! know everything; an edge that is not listed here is a change of the architecture and needs a design record.

use super::Finding;
use crate::workspace::Workspace;

/// Each crate with the crates of ours it may depend on, in the order of the flow.
const MAY_KNOW: &[(&str, &[&str])] = &[
    ("world", &[]),
    ("replication", &[]),
    ("link", &["world", "replication"]),
    ("nbd", &["world"]),
    ("agent", &["world", "replication", "link", "nbd"]),
    ("vault", &["world", "replication"]),
    ("process_server", &["world", "replication", "link", "vault"]),
    ("recovery", &["world", "replication", "link", "nbd", "agent", "vault", "process_server"]),
    // The simulation puts its own network between the roles: of `link` it knows frames and the trait that carries them.
    ("sim", &["world", "replication", "link", "nbd", "agent", "vault", "process_server", "recovery"]),
    ("farshore", &["world", "replication", "link", "nbd", "agent", "vault", "process_server", "recovery"]),
    ("xtask", &[]),
];

pub(super) fn check(workspace: &Workspace) -> Vec<Finding> {
    let edges = workspace.members.iter().map(|member| (member.name.as_str(), member.dependencies.as_slice()));
    check_edges(edges)
}

fn check_edges<'a>(crates: impl Iterator<Item = (&'a str, &'a [String])>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, dependencies) in crates {
        let Some((_, allowed)) = MAY_KNOW.iter().find(|(known, _)| *known == name) else {
            findings.push(Finding::new(name, "a crate that the table of dependency directions does not know"));
            continue;
        };
        for dependency in dependencies {
            let ours = MAY_KNOW.iter().any(|(known, _)| known == dependency);
            if ours && !allowed.contains(&dependency.as_str()) {
                findings.push(Finding::new(name, format!("must not depend on `{dependency}`")));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_edge_against_the_flow_is_found() {
        let good = ["world".to_owned(), "replication".to_owned(), "bytes".to_owned()];
        let bad = ["agent".to_owned()];
        assert!(check_edges([("vault", good.as_slice())].into_iter()).is_empty());
        let findings = check_edges([("vault", bad.as_slice()), ("unheard_of", &[])].into_iter());
        assert_eq!(findings.len(), 2);
        assert!(findings[0].what.contains("`agent`"));
    }

    #[test]
    fn the_table_has_no_cycle() {
        // Every crate may know only crates that stand before it.
        for (position, (name, allowed)) in MAY_KNOW.iter().enumerate() {
            for dependency in *allowed {
                let before = MAY_KNOW[..position].iter().any(|(earlier, _)| earlier == dependency);
                assert!(before, "{name} may know {dependency}, which does not stand before it");
            }
        }
    }
}
