//! Who a peer is, and the key and certificate with which it proves it.

use std::fmt;
use std::sync::Arc;

use rcgen::{CertificateParams, PublicKeyData, SigningKey};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use world::{Entropy, Files, WallTime, durable};
use zeroize::Zeroizing;

use crate::limits::{BACKDATE_DAYS, RENEW_BEFORE_SHARE, TRUST_GRACE_DAYS};
use crate::record::{self, Kind, RecordError};
use crate::renew::validity_of;
use crate::token::hex;

const DAY_SECONDS: u64 = 86_400;

/// What a peer does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// A protected machine's mobility agent. Its certificate cannot act as a server.
    Agent,
    /// A process server.
    ProcessServer,
    /// A master target server.
    MasterTarget,
    /// A host that serves branches and brings them home. Its certificate cannot act as a server.
    RecoveryHost,
}

impl Role {
    /// Every role.
    pub const ALL: [Role; 4] = [Role::Agent, Role::ProcessServer, Role::MasterTarget, Role::RecoveryHost];

    /// The short name that stands in certificates.
    pub fn short_name(self) -> &'static str {
        match self {
            Role::Agent => "agent",
            Role::ProcessServer => "ps",
            Role::MasterTarget => "mt",
            Role::RecoveryHost => "rh",
        }
    }

    /// The role with this short name.
    pub fn from_short_name(name: &str) -> Option<Role> {
        Role::ALL.into_iter().find(|role| role.short_name() == name)
    }

    pub(crate) fn code(self) -> u8 {
        match self {
            Role::Agent => 1,
            Role::ProcessServer => 2,
            Role::MasterTarget => 3,
            Role::RecoveryHost => 4,
        }
    }

    pub(crate) fn from_code(code: u8) -> Option<Role> {
        Role::ALL.into_iter().find(|role| role.code() == code)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Agent => "agent",
            Role::ProcessServer => "process server",
            Role::MasterTarget => "master target",
            Role::RecoveryHost => "recovery host",
        })
    }
}

/// Who a peer is, as its verified certificate says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerIdentity {
    /// What it does.
    pub role: Role,
    /// Which one it is; unique among all roles.
    pub id: [u8; 16],
}

impl PeerIdentity {
    /// The name in the certificate: `farshore:agent:<id in hex>`.
    pub fn to_uri(&self) -> String {
        format!("farshore:{}:{}", self.role.short_name(), hex(&self.id))
    }

    /// The identity that a certificate's name stands for.
    pub fn from_uri(uri: &str) -> Option<PeerIdentity> {
        let (role, id) = uri.strip_prefix("farshore:")?.split_once(':')?;
        Some(PeerIdentity { role: Role::from_short_name(role)?, id: parse_id(id)? })
    }

    pub(crate) fn to_bytes(self) -> [u8; 17] {
        let mut bytes = [self.role.code(); 17];
        bytes[1..].copy_from_slice(&self.id);
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<PeerIdentity, RecordError> {
        let bytes: [u8; 17] = record::fixed(bytes)?;
        let (code, id) = bytes.split_first_chunk::<1>().expect("17 bytes have a first");
        Ok(PeerIdentity { role: Role::from_code(code[0]).ok_or(RecordError::Damaged)?, id: record::fixed(id)? })
    }
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.role, hex(&self.id))
    }
}

/// 32 lower-case hexadecimal digits; anything else, upper case included, is not an id, so that every identity has
/// exactly one name.
fn parse_id(text: &str) -> Option<[u8; 16]> {
    if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)) {
        return None;
    }
    let mut id = [0; 16];
    for (byte, digits) in id.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(id)
}

/// An Ed25519 public key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PublicKey(pub [u8; 32]);

impl PublicKeyData for PublicKey {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &rcgen::PKCS_ED25519
    }
}

/// An Ed25519 private key. Its seed is wiped from memory when dropped and never printed.
///
/// The TLS and signature libraries hold expanded copies while they use it, which they do not wipe.
#[derive(Clone)]
pub struct PrivateKey {
    seed: Zeroizing<[u8; 32]>,
    public: PublicKey,
}

impl PrivateKey {
    /// A new key.
    pub fn generate(entropy: &dyn Entropy) -> PrivateKey {
        let mut seed = Zeroizing::new([0; 32]);
        entropy.fill(&mut *seed);
        PrivateKey::from_seed(seed)
    }

    pub(crate) fn from_seed(seed: Zeroizing<[u8; 32]>) -> PrivateKey {
        let pair = Ed25519KeyPair::from_seed_unchecked(&*seed).expect("every 32 bytes are an Ed25519 seed");
        let public = pair.public_key().as_ref().try_into().expect("an Ed25519 public key has 32 bytes");
        PrivateKey { seed, public: PublicKey(public) }
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        self.public
    }

    pub(crate) fn seed(&self) -> &[u8; 32] {
        &self.seed
    }

    /// A PKCS #10 request, which proves possession of this key. Names are the authority's business; none are asked for.
    ///
    /// # Errors
    /// None in practice; the encoder's signature allows one.
    pub fn certificate_request(&self) -> Result<Vec<u8>, rcgen::Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        Ok(params.serialize_request(self)?.der().to_vec())
    }

    /// The key in the form in which the TLS library takes it.
    pub(crate) fn tls_signer(&self) -> Arc<dyn rustls::sign::SigningKey> {
        // RFC 8410: PKCS #8 version 1, algorithm 1.3.101.112, the seed as an octet string within an octet string.
        const PREFIX: [u8; 16] = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
        let mut der = Zeroizing::new([0; 48]);
        der[..16].copy_from_slice(&PREFIX);
        der[16..].copy_from_slice(&*self.seed);
        rustls::crypto::ring::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(&der[..]))
            .expect("a well-formed Ed25519 key is accepted")
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PrivateKey").field("public", &hex(&self.public.0)).finish_non_exhaustive()
    }
}

impl PublicKeyData for PrivateKey {
    fn der_bytes(&self) -> &[u8] {
        &self.public.0
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &rcgen::PKCS_ED25519
    }
}

impl SigningKey for PrivateKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        let pair = Ed25519KeyPair::from_seed_unchecked(&*self.seed).expect("every 32 bytes are an Ed25519 seed");
        Ok(pair.sign(message).as_ref().to_vec())
    }
}

/// Why a stored identity cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// It cannot be read or written. Retry once the file system works.
    #[error("the link identity in {path} cannot be read or written")]
    Storage {
        /// The file.
        path: String,
        /// What the file system said.
        #[source]
        source: std::io::Error,
    },
    /// It is not what this program wrote. Join again with a new token.
    #[error("the link identity in {path} cannot be used: {reason}")]
    Damaged {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Everything a peer needs to open or accept links: who it is, its key, its certificate and the authority's.
#[derive(Clone)]
pub struct LinkIdentity {
    /// Who this is.
    pub peer: PeerIdentity,
    /// The key that the certificate names.
    pub key: PrivateKey,
    /// The certificate, DER.
    pub certificate: CertificateDer<'static>,
    /// The authority's certificate, DER.
    pub authority: CertificateDer<'static>,
}

impl LinkIdentity {
    /// The identity stored at `path`, if there is one.
    ///
    /// # Errors
    /// See [`IdentityError`].
    pub fn load(files: &dyn Files, path: &str) -> Result<Option<LinkIdentity>, IdentityError> {
        let bytes = match files.read(path) {
            Ok(bytes) => Zeroizing::new(bytes),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(IdentityError::Storage { path: path.to_owned(), source }),
        };
        LinkIdentity::decode(&bytes)
            .map(Some)
            .map_err(|error| IdentityError::Damaged { path: path.to_owned(), reason: error.to_string() })
    }

    /// Makes this the identity stored at `path`, readable by its owner only. Durable on return.
    ///
    /// # Errors
    /// [`IdentityError::Storage`]: the old identity, the new one, or none is stored.
    pub fn store(&self, files: &dyn Files, path: &str) -> Result<(), IdentityError> {
        durable::replace_private(files, path, &self.encode(), "identity")
            .map_err(|source| IdentityError::Storage { path: path.to_owned(), source })
    }

    /// When its certificate ends.
    pub fn ends(&self) -> WallTime {
        WallTime::from_seconds(validity_of(&self.certificate).1)
    }

    /// From when on its certificate is to be renewed: the last third of its life.
    pub fn due(&self) -> WallTime {
        let (begins, ends) = validity_of(&self.certificate);
        let life = ends.saturating_sub(begins.saturating_add(BACKDATE_DAYS * DAY_SECONDS));
        WallTime::from_seconds(ends.saturating_sub(life / RENEW_BEFORE_SHARE))
    }

    /// Until when peers with the usual grace accept it.
    pub fn accepted_until(&self) -> WallTime {
        WallTime::from_seconds(self.ends().seconds().saturating_add(TRUST_GRACE_DAYS * DAY_SECONDS))
    }

    /// Whether its certificate is near its end, or beyond it, at `now`.
    pub fn is_due(&self, now: WallTime) -> bool {
        now >= self.due()
    }

    /// Whether its certificate has ended at `now`. It may still be accepted.
    pub fn has_ended(&self, now: WallTime) -> bool {
        now > self.ends()
    }

    pub(crate) fn encode(&self) -> Zeroizing<Vec<u8>> {
        record::encode(
            Kind::Identity,
            &[&self.peer.to_bytes(), self.key.seed(), self.certificate.as_ref(), self.authority.as_ref()],
        )
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<LinkIdentity, RecordError> {
        let [peer, seed, certificate, authority] = record::decode(Kind::Identity, bytes)?;
        Ok(LinkIdentity {
            peer: PeerIdentity::from_bytes(peer)?,
            key: PrivateKey::from_seed(Zeroizing::new(record::fixed(seed)?)),
            certificate: CertificateDer::from(certificate.to_vec()),
            authority: CertificateDer::from(authority.to_vec()),
        })
    }
}

impl fmt::Debug for LinkIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkIdentity").field("peer", &self.peer).field("key", &self.key).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_are_exact() {
        let peer = PeerIdentity { role: Role::MasterTarget, id: [0xab; 16] };
        let uri = peer.to_uri();
        assert_eq!(uri, "farshore:mt:abababababababababababababababab");
        assert_eq!(PeerIdentity::from_uri(&uri), Some(peer));
        for other in [
            "farshore:mt:ABababababababababababababababab",
            "farshore:mt:ababababababababababababababab",
            "farshore:mt:+babababababababababababababababa",
            "farshore:xx:abababababababababababababababab",
            "farshore:abababababababababababababababab",
            "other:mt:abababababababababababababababab",
        ] {
            assert_eq!(PeerIdentity::from_uri(other), None, "{other}");
        }
    }

    #[test]
    fn debug_shows_no_secret() {
        let key = PrivateKey::from_seed(Zeroizing::new([7; 32]));
        let shown = format!("{key:?}");
        assert!(!shown.contains(&hex(&[7; 32])) && !shown.contains("7, 7"), "{shown}");
    }

    proptest! {
        #[test]
        fn any_text_may_be_parsed_as_a_name(text in "(farshore:)?(agent|ps|rh|\\PC{0,4}):?\\PC{0,40}") {
            if let Some(peer) = PeerIdentity::from_uri(&text) {
                prop_assert_eq!(peer.to_uri(), text);
            }
        }
    }
}
