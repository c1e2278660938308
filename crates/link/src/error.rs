//! Why a link could not be opened or ended.

use std::io;
use std::sync::Arc;

use rustls::{AlertDescription, CertificateError};
use world::WallTime;

use crate::identity::PeerIdentity;

/// Why the peer turned us away.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerRefusal {
    /// Our certificate was not issued by its authority. Join again with a token of that server.
    #[error("our certificate was not issued by its authority")]
    Foreign,
    /// Our certificate ended too long ago (or the peer's clock is wrong).
    #[error("our certificate is outside its validity, or its clock is wrong")]
    Expired,
    /// We were removed.
    #[error("we were removed from its peers")]
    Denied,
    /// It wants a certificate and we showed none.
    #[error("it wants a certificate")]
    NoCertificate,
    /// It has as many connections waiting as it takes. Try again later.
    #[error("it is busy")]
    Busy,
    /// It speaks none of our protocol versions, or does not take joins.
    #[error("it does not offer this protocol")]
    Protocol,
    /// Something else, in the words of the TLS alert.
    #[error("{0}")]
    Other(String),
}

/// Why a link could not be opened or ended.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LinkError {
    /// Nobody listens at the address. Retry later, or correct the address.
    #[error("{address} refused the connection: nothing listens there")]
    Refused {
        /// Where the connection went.
        address: String,
    },
    /// The address cannot be reached or resolved. Retry later, or correct the address.
    #[error("{address} cannot be reached")]
    Unreachable {
        /// Where the connection went.
        address: String,
        /// What the network said.
        #[source]
        source: Arc<io::Error>,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}")]
    CannotListen {
        /// The address.
        address: String,
        /// What the system said.
        #[source]
        source: Arc<io::Error>,
    },
    /// Something did not happen in time. Retry.
    #[error("{what} took longer than {seconds} s")]
    TimedOut {
        /// What did not happen.
        what: &'static str,
        /// The limit.
        seconds: u64,
    },
    /// The peer's certificate was not issued by our authority.
    #[error("the peer's certificate was not issued by our authority: this is a stranger or another installation")]
    ForeignCertificate,
    /// The peer's certificate ended and the grace is over.
    #[error("the peer's certificate ended at {not_after}, longer ago than the grace; it is now {now}")]
    CertificateExpired {
        /// The certificate's end.
        not_after: WallTime,
        /// This machine's time.
        now: WallTime,
    },
    /// The peer's certificate begins in the future. One of the clocks is wrong.
    #[error("the peer's certificate begins at {not_before} and it is now {now}: one of the two clocks is wrong")]
    CertificateNotYetValid {
        /// The certificate's beginning.
        not_before: WallTime,
        /// This machine's time.
        now: WallTime,
    },
    /// The peer was removed.
    #[error("the peer was removed and may not connect any more")]
    Denied,
    /// The peer's certificate cannot be used.
    #[error("the peer's certificate cannot be used: {0}")]
    BadCertificate(String),
    /// The peer is enrolled, but is not the one asked for.
    #[error("reached {found} instead of {expected}")]
    WrongPeer {
        /// Who was asked for.
        expected: String,
        /// Who answered.
        found: PeerIdentity,
    },
    /// The peer turned us away.
    #[error("the peer turned us away: {0}")]
    RefusedByPeer(PeerRefusal),
    /// The peer sent what the protocol does not allow. A mistake of a program, or an attack.
    #[error("the peer broke the protocol: {0}")]
    ProtocolViolation(String),
    /// A frame is larger than allowed. From `send`: split it; the link goes on. From `recv`: the link ended.
    #[error("a frame of {len} bytes is larger than the allowed {max}")]
    FrameTooLarge {
        /// Its body's bytes.
        len: u64,
        /// The limit in bytes.
        max: u64,
    },
    /// A frame of a kind that belongs to the link itself was given to `send`. A mistake of the caller.
    #[error("frame kind {0:#04x} is reserved")]
    ReservedKind(u8),
    /// A link that never waits was given a frame while full. Only simulated links say this.
    #[error("the link is full")]
    Full,
    /// The peer said farewell. Everything it sent was delivered.
    #[error("the peer closed the connection")]
    PeerClosed,
    /// The connection broke without a farewell. Reconnect.
    #[error("the connection was lost")]
    Lost {
        /// What the network said.
        #[source]
        source: Arc<io::Error>,
    },
    /// Nothing was heard from the peer for too long. Reconnect.
    #[error("nothing was heard from the peer for {seconds} s")]
    Idle {
        /// The limit.
        seconds: u64,
    },
    /// This side closed the link.
    #[error("the link was closed on this side")]
    Closed,
    /// The TLS library refused our own configuration. A bug.
    #[error("TLS cannot be set up: {0}")]
    Setup(String),
}

impl LinkError {
    /// `source` on an open connection.
    pub(crate) fn lost(source: io::Error) -> LinkError {
        LinkError::Lost { source: Arc::new(source) }
    }

    /// `source` while connecting to `address`.
    pub(crate) fn from_connect(address: &str, source: io::Error) -> LinkError {
        if source.kind() == io::ErrorKind::ConnectionRefused {
            LinkError::Refused { address: address.to_owned() }
        } else {
            LinkError::Unreachable { address: address.to_owned(), source: Arc::new(source) }
        }
    }

    /// Whether the same attempt may succeed later without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            LinkError::Refused { .. }
                | LinkError::Unreachable { .. }
                | LinkError::TimedOut { .. }
                | LinkError::PeerClosed
                | LinkError::Lost { .. }
                | LinkError::Idle { .. }
                | LinkError::RefusedByPeer(PeerRefusal::Busy)
        )
    }
}

impl From<rustls::Error> for LinkError {
    fn from(error: rustls::Error) -> LinkError {
        match error {
            rustls::Error::InvalidCertificate(error) => from_certificate_error(error),
            rustls::Error::NoCertificatesPresented => LinkError::BadCertificate("it showed none".to_owned()),
            rustls::Error::AlertReceived(alert) => LinkError::RefusedByPeer(from_alert(alert)),
            other => LinkError::ProtocolViolation(other.to_string()),
        }
    }
}

fn from_certificate_error(error: CertificateError) -> LinkError {
    let wall = |time: rustls::pki_types::UnixTime| WallTime::from_seconds(time.as_secs());
    match error {
        // A foreign authority that took our authority's name fails by its signature.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => LinkError::ForeignCertificate,
        CertificateError::ExpiredContext { time, not_after } => {
            LinkError::CertificateExpired { not_after: wall(not_after), now: wall(time) }
        }
        CertificateError::NotValidYetContext { time, not_before } => {
            LinkError::CertificateNotYetValid { not_before: wall(not_before), now: wall(time) }
        }
        CertificateError::Revoked => LinkError::Denied,
        other => LinkError::BadCertificate(other.to_string()),
    }
}

fn from_alert(alert: AlertDescription) -> PeerRefusal {
    match alert {
        AlertDescription::UnknownCA | AlertDescription::DecryptError => PeerRefusal::Foreign,
        AlertDescription::CertificateExpired => PeerRefusal::Expired,
        AlertDescription::CertificateRevoked => PeerRefusal::Denied,
        AlertDescription::CertificateRequired => PeerRefusal::NoCertificate,
        AlertDescription::NoApplicationProtocol | AlertDescription::ProtocolVersion => PeerRefusal::Protocol,
        other => PeerRefusal::Other(format!("{other:?}")),
    }
}
