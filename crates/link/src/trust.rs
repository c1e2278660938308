//! Which certificates are accepted.
//!
//! A peer is trusted if its certificate chains to our authority, is meant for the side it is on, carries exactly one
//! identity, is not denied, and is within its validity or at most the grace beyond it. The grace exists because
//! replication must survive the loss of whoever renews certificates; the deny list, not the end of validity, is what
//! keeps a removed peer out.

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme};
use world::Clock;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::identity::{PeerIdentity, Role};
use crate::limits::TRUST_GRACE_DAYS;
use crate::tls::provider;

/// The identities that may not connect any more, whatever their certificate says. Clones share the set.
#[derive(Debug, Clone, Default)]
pub struct DenyList {
    denied: Arc<RwLock<HashSet<PeerIdentity>>>,
}

impl DenyList {
    /// Denies `peer`: new connections at once, open ones within [`crate::limits::DENIAL_CHECK`].
    pub fn deny(&self, peer: PeerIdentity) {
        self.denied.write().unwrap_or_else(PoisonError::into_inner).insert(peer);
    }

    /// Whether `peer` is denied.
    pub fn contains(&self, peer: &PeerIdentity) -> bool {
        self.denied.read().unwrap_or_else(PoisonError::into_inner).contains(peer)
    }
}

/// What a peer's certificate is checked against. Clones share the deny list.
#[derive(Clone)]
pub struct Trust {
    authority: CertificateDer<'static>,
    clock: Arc<dyn Clock>,
    grace: Duration,
    denied: DenyList,
}

impl Trust {
    /// Trust in what the authority with this certificate issued, with [`TRUST_GRACE_DAYS`] of grace.
    pub fn new(authority: CertificateDer<'static>, clock: Arc<dyn Clock>, denied: DenyList) -> Trust {
        Trust { authority, clock, grace: days(TRUST_GRACE_DAYS), denied }
    }

    /// The same trust with another grace.
    pub fn with_grace_days(mut self, trust_grace_days: u64) -> Trust {
        self.grace = days(trust_grace_days);
        self
    }

    /// Who is not trusted any more.
    pub fn denied(&self) -> &DenyList {
        &self.denied
    }

    /// Checks a certificate (DER) that a peer showed while acting as a server or as a client.
    ///
    /// # Errors
    /// In the words of the TLS library, which turns them into the alert that the peer sees.
    pub(crate) fn check(&self, leaf: &CertificateDer<'_>, side: Side) -> Result<PeerIdentity, rustls::Error> {
        let (_, parsed) = X509Certificate::from_der(leaf).map_err(|_| CertificateError::BadEncoding)?;
        let seconds = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
        let not_before = seconds(parsed.validity().not_before);
        let not_after = seconds(parsed.validity().not_after);
        if not_before > not_after {
            return Err(CertificateError::BadEncoding.into());
        }
        let now = self.clock.wall().seconds();
        // The chain is checked as of a moment inside the validity, so that a stranger is called a stranger even
        // when its certificate ended as well; validity with grace comes after.
        self.check_chain(leaf, side, unix(now.clamp(not_before, not_after)))?;
        if now.saturating_sub(not_after) > self.grace.as_secs() {
            return Err(CertificateError::ExpiredContext { time: unix(now), not_after: unix(not_after) }.into());
        }
        if not_before.saturating_sub(now) > self.grace.as_secs() {
            return Err(CertificateError::NotValidYetContext { time: unix(now), not_before: unix(not_before) }.into());
        }
        let peer = identity_of(&parsed).ok_or(CertificateError::ApplicationVerificationFailure)?;
        if self.denied.contains(&peer) {
            return Err(CertificateError::Revoked.into());
        }
        if now > not_after {
            tracing::warn!(%peer, "the certificate has ended; accepted within the grace");
        }
        Ok(peer)
    }

    fn check_chain(&self, leaf: &CertificateDer<'_>, side: Side, at: UnixTime) -> Result<(), rustls::Error> {
        let mut roots = RootCertStore::empty();
        roots.add(self.authority.clone())?;
        let algorithms = provider().signature_verification_algorithms;
        match side {
            Side::Server => rustls::client::verify_server_cert_signed_by_trust_anchor(
                &ParsedCertificate::try_from(leaf)?,
                &roots,
                &[],
                at,
                algorithms.all,
            ),
            Side::Client => WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
                .build()
                .map_err(|error| rustls::Error::General(error.to_string()))?
                .verify_client_cert(leaf, &[], at)
                .map(|_| ()),
        }
    }
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trust").field("grace", &self.grace).field("denied", &self.denied).finish_non_exhaustive()
    }
}

/// The side of the connection that showed a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Server,
    Client,
}

/// The identity in a certificate: the only `farshore:` name of its subject alternative names.
pub(crate) fn identity_of(certificate: &X509Certificate<'_>) -> Option<PeerIdentity> {
    let names = certificate.subject_alternative_name().ok()??;
    let mut uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) if uri.starts_with("farshore:") => Some(*uri),
        _ => None,
    });
    let only = uris.next()?;
    if uris.next().is_some() {
        return None;
    }
    PeerIdentity::from_uri(only)
}

/// The identity in a certificate (DER) that was already verified.
pub(crate) fn identity_of_der(certificate: &[u8]) -> Option<PeerIdentity> {
    identity_of(&X509Certificate::from_der(certificate).ok()?.1)
}

/// A certificate authority's fingerprint: BLAKE3 of its certificate's DER.
pub fn fingerprint(authority: &[u8]) -> [u8; 32] {
    *blake3::hash(authority).as_bytes()
}

fn days(days: u64) -> Duration {
    Duration::from_secs(days.saturating_mul(86_400))
}

fn unix(seconds: u64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(seconds))
}

/// Verifies peers of a replication link, on either side.
#[derive(Debug)]
pub(crate) struct PeerVerifier {
    pub(crate) trust: Trust,
}

/// How every verifier here treats signatures: TLS 1.3 and Ed25519 only.
macro_rules! signatures_of_tls13 {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _certificate: &CertificateDer<'_>,
            _signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Err(only_tls13())
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_signature(message, certificate, signature)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ED25519]
        }
    };
}

impl ClientCertVerifier for PeerVerifier {
    /// A joining machine has no certificate yet; the listener turns away a replication peer without one.
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.trust.check(end_entity, Side::Client).map(|_| ClientCertVerified::assertion())
    }

    signatures_of_tls13!();
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.trust.check(end_entity, Side::Server).map(|_| ServerCertVerified::assertion())
    }

    signatures_of_tls13!();
}

/// Verifies the server of a join: it must show the authority's certificate that the token names, and one of its own
/// that this authority issued to a process server.
#[derive(Debug)]
pub(crate) struct JoinVerifier {
    pub(crate) fingerprint: [u8; 32],
    pub(crate) clock: ClockHandle,
}

/// A clock inside types that must be `Debug`.
#[derive(Clone)]
pub(crate) struct ClockHandle(pub(crate) Arc<dyn Clock>);

impl fmt::Debug for ClockHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

impl ServerCertVerifier for JoinVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let authority = intermediates
            .iter()
            .find(|certificate| fingerprint(certificate) == self.fingerprint)
            .ok_or(CertificateError::UnknownIssuer)?;
        let trust = Trust::new(authority.clone().into_owned(), self.clock.0.clone(), DenyList::default());
        let peer = trust.check(end_entity, Side::Server)?;
        if peer.role != Role::ProcessServer {
            return Err(CertificateError::InvalidPurpose.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    signatures_of_tls13!();
}

fn verify_signature(
    message: &[u8],
    certificate: &CertificateDer<'_>,
    signature: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, rustls::Error> {
    let provider: Arc<CryptoProvider> = provider();
    rustls::crypto::verify_tls13_signature(message, certificate, signature, &provider.signature_verification_algorithms)
}

fn only_tls13() -> rustls::Error {
    rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOffered)
}
