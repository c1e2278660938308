//! The way to a master target on another host: mutual TLS 1.3, a new link whenever the last one ended.

use std::sync::Arc;

use link::{Connector, Expected, FrameLink, LinkError, PeerRefusal, Role};

use crate::failback::{HomeLine, LineError};
use crate::home_disk::Refusal;

/// Connects to the master target that runs in the server at one address.
pub struct RemoteHome {
    connector: Connector,
    address: String,
}

impl RemoteHome {
    /// A line to `address` (`host:port`) under the identity of `connector`, which must be a recovery host's.
    pub fn new(connector: Connector, address: impl Into<String>) -> RemoteHome {
        RemoteHome { connector, address: address.into() }
    }
}

impl HomeLine for RemoteHome {
    fn connect(&mut self) -> Result<Arc<dyn FrameLink>, LineError> {
        // A server shows one certificate whatever it does besides: that of a process server.
        let expected = Expected { role: Role::ProcessServer, id: None };
        match self.connector.connect(&self.address, &expected) {
            Ok(connection) => Ok(Arc::new(connection)),
            Err(error) => Err(line_error(&self.address, &error)),
        }
    }
}

/// What an operator is told. Only what may mend by itself is worth another attempt.
fn line_error(address: &str, error: &LinkError) -> LineError {
    let join_again = "order a token at the server (`farshore token new --role recovery-host`), then join with it into \
                      the state directory of this branch: `farshore join --token-file FILE --state-dir DIR`";
    let (what, why, advice) = match error {
        LinkError::Refused { .. } | LinkError::Unreachable { .. } | LinkError::TimedOut { .. } => (
            format!("there is no way to a master target at {address}"),
            with_causes(error),
            "check the address, and that `farshore server` runs there",
        ),
        LinkError::ForeignCertificate => (
            format!("the server at {address} is of another installation"),
            "its certificate was not issued by the authority that this host joined; it was told nothing".to_owned(),
            "check the address; to trust this server, join it from another state directory",
        ),
        LinkError::WrongPeer { found, .. } => (
            format!("what listens at {address} is no server"),
            format!("its certificate says that it is {found}"),
            "name the address of a `farshore server`",
        ),
        LinkError::RefusedByPeer(PeerRefusal::Foreign) => (
            format!("the server at {address} does not accept this host"),
            "this host's certificate was not issued by its authority".to_owned(),
            join_again,
        ),
        LinkError::RefusedByPeer(PeerRefusal::Denied) | LinkError::Denied => (
            format!("the server at {address} does not accept this host any more"),
            "the host was removed from those who may connect".to_owned(),
            join_again,
        ),
        LinkError::RefusedByPeer(PeerRefusal::Expired)
        | LinkError::CertificateExpired { .. }
        | LinkError::CertificateNotYetValid { .. } => (
            format!("this host and the server at {address} do not accept each other's certificates"),
            with_causes(error),
            "compare the clocks of both hosts; if they are right, join this host again",
        ),
        LinkError::RefusedByPeer(PeerRefusal::Protocol) => (
            format!("the server at {address} speaks another version of the protocol"),
            "they would misunderstand each other".to_owned(),
            "use the same version of Farshore on both hosts",
        ),
        _ => (
            format!("no link to the master target at {address} came about"),
            with_causes(error),
            "check the address, and see the log of the server there",
        ),
    };
    let refusal = Refusal::new(what, why, advice);
    if error.is_transient() { LineError::NotNow(refusal) } else { LineError::Never(refusal) }
}

fn with_causes(error: &LinkError) -> String {
    let mut text = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}
