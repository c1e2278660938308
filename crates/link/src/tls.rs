//! How TLS is set up: version 1.3 only, mutual, two protocols on one port.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use rustls::client::UnbufferedClientConnection;
use rustls::crypto::{CryptoProvider, ring as ring_provider};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, UnbufferedServerConnection};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::time_provider::TimeProvider;
use rustls::version::TLS13;
use rustls::{ClientConfig, ServerConfig};

use crate::error::LinkError;
use crate::identity::LinkIdentity;
use crate::session::Session;
use crate::trust::{ClockHandle, JoinVerifier, PeerVerifier, Trust};

/// The protocol of replication links.
pub(crate) const ALPN_REPLICATION: &[u8] = b"farshore-repl/1";
/// The protocol of the join exchange.
pub(crate) const ALPN_JOIN: &[u8] = b"farshore-join/1";
/// The protocol of renewals.
pub(crate) const ALPN_RENEW: &[u8] = b"farshore-renew/1";

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    Arc::new(CryptoProvider {
        // Encryption is most of a link's cost: measured, 256-bit keys took a third more processor time per byte in
        // all. What lasts for years is encrypted with 256 bits in the vault; these keys live for one connection.
        cipher_suites: vec![
            ring_provider::cipher_suite::TLS13_AES_128_GCM_SHA256,
            ring_provider::cipher_suite::TLS13_AES_256_GCM_SHA384,
            ring_provider::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..ring_provider::default_provider()
    })
});

/// The cryptography of every link.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    PROVIDER.clone()
}

impl TimeProvider for ClockHandle {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(self.0.wall().seconds())))
    }
}

/// The configuration of a listener, which serves replication and, if `joins`, the join exchange and renewals.
pub(crate) fn server_config(
    identity: &LinkIdentity,
    trust: &Trust,
    clock: ClockHandle,
    joins: Joins,
) -> Result<Arc<ServerConfig>, LinkError> {
    let mut config = ServerConfig::builder_with_details(provider(), Arc::new(clock))
        .with_protocol_versions(&[&TLS13])
        .map_err(setup)?
        .with_client_cert_verifier(Arc::new(PeerVerifier { trust: trust.clone() }))
        .with_cert_resolver(certified(identity));
    config.alpn_protocols = match joins {
        Joins::Taken => vec![ALPN_REPLICATION.to_vec(), ALPN_JOIN.to_vec(), ALPN_RENEW.to_vec()],
        Joins::NotTaken => vec![ALPN_REPLICATION.to_vec()],
    };
    // No resumption: every connection shows its certificate anew, so a denied peer stays out.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// Whether a listener takes joins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Joins {
    Taken,
    NotTaken,
}

/// An enrolled client's session for `protocol`.
pub(crate) fn peer_client(
    identity: &LinkIdentity,
    trust: &Trust,
    clock: ClockHandle,
    protocol: &[u8],
) -> Result<Session, LinkError> {
    let mut config = ClientConfig::builder_with_details(provider(), Arc::new(clock))
        .with_protocol_versions(&[&TLS13])
        .map_err(setup)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(PeerVerifier { trust: trust.clone() }))
        .with_client_cert_resolver(certified(identity));
    config.alpn_protocols = vec![protocol.to_vec()];
    client(config)
}

/// A client's session for joining.
pub(crate) fn join_client(fingerprint: [u8; 32], clock: ClockHandle) -> Result<Session, LinkError> {
    let mut config = ClientConfig::builder_with_details(provider(), Arc::new(clock.clone()))
        .with_protocol_versions(&[&TLS13])
        .map_err(setup)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(JoinVerifier { fingerprint, clock }))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_JOIN.to_vec()];
    client(config)
}

/// A server's session for one accepted socket.
pub(crate) fn server(config: Arc<ServerConfig>) -> Result<Session, LinkError> {
    UnbufferedServerConnection::new(config).map(Session::server).map_err(setup)
}

fn client(mut config: ClientConfig) -> Result<Session, LinkError> {
    config.enable_sni = false;
    config.resumption = rustls::client::Resumption::disabled();
    // Peers are known by the identity in their certificate, never by a name; the library wants one all the same.
    let name = ServerName::try_from("farshore.invalid").expect("a valid name");
    UnbufferedClientConnection::new(Arc::new(config), name).map(Session::client).map_err(setup)
}

/// The certificate and, for those who join, the authority's, by whose fingerprint they know the server.
fn certified(identity: &LinkIdentity) -> Arc<SingleCertAndKey> {
    let chain: Vec<CertificateDer<'static>> = vec![identity.certificate.clone(), identity.authority.clone()];
    Arc::new(SingleCertAndKey::from(CertifiedKey::new(chain, identity.key.tls_signer())))
}

fn setup(error: rustls::Error) -> LinkError {
    LinkError::Setup(error.to_string())
}
