//! The server's own certificate authority, with the join tokens it gave out and the peers it denied.
//!
//! Files below the authority's directory, each a checked record, each created once (the server's own identity is the
//! exception: it is replaced when renewed):
//! ```text
//! authority             key and certificate, private to the owner
//! identity-<role>       this server's own key and certificate, private
//! tokens/<id>.issued    role, identity (or none), end, hash of the secret
//! tokens/<id>.used      public key, identity
//! denied/<role>-<id>    the identity
//! ```
//! **A token is used by creating `<id>.used`**, durably, before a certificate is handed out: of two machines with one
//! token exactly one wins, also across a crash, and the winner's public key stands in the file, so that it alone may
//! repeat an interrupted join.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};
use world::{Clock, Entropy, Files, WallTime, durable};
use zeroize::Zeroizing;

use crate::identity::{IdentityError, LinkIdentity, PeerIdentity, PrivateKey, PublicKey, Role};
use crate::join::{Admission, JoinGrant, JoinRefusal, JoinRequest};
use crate::limits::{AUTHORITY_DAYS, BACKDATE_DAYS, CERTIFICATE_DAYS};
use crate::record::{self, Kind, RecordError};
use crate::token::{JoinToken, TokenError, check_addresses, hex};
use crate::trust::{DenyList, Trust, fingerprint};

const DAY_SECONDS: u64 = 86_400;

/// Why the authority cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file cannot be read or written. Retry once the file system works.
    #[error("the certificate authority's file {path} cannot be read or written")]
    Storage {
        /// The file.
        path: String,
        /// What the file system said.
        #[source]
        source: io::Error,
    },
    /// A file is not what was written there. Restore it; if that is impossible, remove the directory and join every
    /// machine again.
    #[error("the certificate authority's file {path} cannot be used: {reason}")]
    Damaged {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The server's own identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// What a token was ordered with does not fit a token.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// A certificate request was refused. It is malformed, not signed by its key, or its key is not Ed25519.
    #[error("the certificate request cannot be used: {0}")]
    Request(String),
    /// The encoder of certificates failed. A bug.
    #[error("a certificate cannot be made: {0}")]
    Certificate(String),
}

/// What a token is ordered with.
#[derive(Debug, Clone)]
pub struct TokenOrder {
    /// What the machine that joins will be.
    pub role: Role,
    /// Which one it will be; drawn at random when it joins if none is given.
    pub id: Option<[u8; 16]>,
    /// How long the token can be used.
    pub valid_for: Duration,
    /// Where this server can be reached, `host:port`; may be empty.
    pub addresses: Vec<String>,
}

/// The certificate authority of an installation. All methods may be called from several threads at once, in one
/// process at a time.
pub struct Authority {
    files: Arc<dyn Files>,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn Entropy>,
    directory: String,
    key: PrivateKey,
    certificate: CertificateDer<'static>,
    denied: DenyList,
    /// How long what it issues is valid.
    lifetime: Duration,
}

impl Authority {
    /// The authority kept in `directory`, made and durable on return if there was none.
    ///
    /// # Errors
    /// See [`AuthorityError`]. A damaged authority is never replaced by a new one, which nobody would trust.
    pub fn open(
        files: Arc<dyn Files>,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn Entropy>,
        directory: &str,
    ) -> Result<Authority, AuthorityError> {
        for directory in [directory.to_owned(), format!("{directory}/tokens"), format!("{directory}/denied")] {
            durable::sweep(&*files, &directory).map_err(|source| storage(&directory, source))?;
        }
        let path = format!("{directory}/authority");
        if read_if_there(&*files, &path)?.is_none() {
            let made = make_authority(&*entropy, clock.wall())?;
            match durable::publish_private(&*files, &path, &[&made], &hex(&entropy.bytes::<8>())) {
                // Another thread was first; its authority is the one.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                other => other.map_err(|source| storage(&path, source))?,
            }
        }
        let stored =
            read_if_there(&*files, &path)?.ok_or_else(|| storage(&path, io::Error::from(io::ErrorKind::NotFound)))?;
        let (key, certificate) = parse_authority(&stored).map_err(|error| damaged(&path, error))?;
        let authority = Authority {
            files,
            clock,
            entropy,
            directory: directory.to_owned(),
            key,
            certificate,
            denied: DenyList::default(),
            lifetime: Duration::from_secs(CERTIFICATE_DAYS * DAY_SECONDS),
        };
        authority.load_denied()?;
        Ok(authority)
    }

    /// The same authority, whose certificates are valid for `lifetime` from now on, [`CERTIFICATE_DAYS`] otherwise.
    pub fn with_lifetime(mut self, lifetime: Duration) -> Authority {
        self.lifetime = lifetime;
        self
    }

    /// The authority's certificate, DER.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// BLAKE3 of the authority's certificate: what tokens carry and people compare.
    pub fn fingerprint(&self) -> [u8; 32] {
        fingerprint(&self.certificate)
    }

    /// Trust in this authority's certificates, with its deny list and the standard grace.
    pub fn trust(&self) -> Trust {
        Trust::new(self.certificate.clone(), self.clock.clone(), self.denied.clone())
    }

    /// A certificate (DER) that binds `peer` to `key`, valid from now on.
    ///
    /// # Errors
    /// [`AuthorityError::Certificate`] only.
    pub fn issue(&self, peer: PeerIdentity, key: &PublicKey) -> Result<CertificateDer<'static>, AuthorityError> {
        let issuer = Issuer::from_ca_cert_der(&self.certificate, &self.key).map_err(certificate_error)?;
        let now = self.clock.wall().seconds();
        let mut params = CertificateParams::default();
        set_validity(&mut params, now, self.lifetime);
        params.serial_number = Some(serial(&*self.entropy));
        params.distinguished_name = named(&peer.to_string());
        params.subject_alt_names = vec![SanType::URI(
            peer.to_uri().try_into().map_err(|error| AuthorityError::Certificate(format!("{error}")))?,
        )];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = match peer.role {
            // An agent or a recovery host that was taken over must not be able to pose as a server.
            Role::Agent | Role::RecoveryHost => vec![ExtendedKeyUsagePurpose::ClientAuth],
            // A process server is also the client of a master target.
            Role::ProcessServer | Role::MasterTarget => {
                vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth]
            }
        };
        params.use_authority_key_identifier_extension = true;
        Ok(params.signed_by(key, &issuer).map_err(certificate_error)?.der().clone())
    }

    /// A certificate (DER) for the key of a PKCS #10 request. Whatever else the request asks for is ignored.
    ///
    /// # Errors
    /// [`AuthorityError::Request`] if the request is malformed or not signed by its own key.
    pub fn issue_for_request(
        &self,
        peer: PeerIdentity,
        request: &[u8],
    ) -> Result<CertificateDer<'static>, AuthorityError> {
        self.issue(peer, &requested_key(request)?)
    }

    /// This server's own identity in `role`: made at the first call with a random id, renewed when it nears its end,
    /// and durable on return.
    ///
    /// # Errors
    /// See [`AuthorityError`].
    pub fn own_identity(&self, role: Role) -> Result<LinkIdentity, AuthorityError> {
        let path = format!("{}/identity-{}", self.directory, role.short_name());
        let stored = LinkIdentity::load(&*self.files, &path)?;
        if let Some(identity) = &stored
            && identity.authority == self.certificate
            && !identity.is_due(self.clock.wall())
        {
            return Ok(identity.clone());
        }
        // The id outlives key and certificate: others know this server by it.
        let id = stored.as_ref().map_or_else(|| self.entropy.bytes(), |identity| identity.peer.id);
        let peer = PeerIdentity { role, id };
        let key = PrivateKey::generate(&*self.entropy);
        let certificate = self.issue(peer, &key.public())?;
        let identity = LinkIdentity { peer, key, certificate, authority: self.certificate.clone() };
        identity.store(&*self.files, &path)?;
        Ok(identity)
    }

    /// A new one-time token, durable on return.
    ///
    /// # Errors
    /// [`AuthorityError::Token`] if the addresses do not fit, [`AuthorityError::Storage`].
    pub fn order_token(&self, order: &TokenOrder) -> Result<JoinToken, AuthorityError> {
        check_addresses(&order.addresses)?;
        let mut secret = Zeroizing::new([0; 32]);
        self.entropy.fill(&mut *secret);
        let id: [u8; 8] = self.entropy.bytes();
        let expires = self.clock.wall().seconds().saturating_add(order.valid_for.as_secs());
        let issued = record::encode(
            Kind::TokenIssued,
            &[
                &[order.role.code()],
                order.id.as_ref().map_or(&[][..], |id| &id[..]),
                &expires.to_le_bytes(),
                blake3::hash(&*secret).as_bytes(),
            ],
        );
        let path = self.token_path(&id, "issued");
        durable::publish(&*self.files, &path, &[&issued], "new").map_err(|source| storage(&path, source))?;
        Ok(JoinToken {
            role: order.role,
            expires: WallTime::from_seconds(expires),
            fingerprint: self.fingerprint(),
            id,
            addresses: order.addresses.clone(),
            secret,
        })
    }

    /// Removes `peer` from those who may connect, for ever. Durable on return.
    ///
    /// # Errors
    /// [`AuthorityError::Storage`]: the peer is denied until this process ends, and maybe beyond.
    pub fn deny(&self, peer: PeerIdentity) -> Result<(), AuthorityError> {
        self.denied.deny(peer);
        let path = format!("{}/denied/{}-{}", self.directory, peer.role.short_name(), hex(&peer.id));
        let unique = hex(&self.entropy.bytes::<8>());
        match durable::publish(&*self.files, &path, &[&record::encode(Kind::Denied, &[&peer.to_bytes()])], &unique) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other.map_err(|source| storage(&path, source)),
        }
    }

    fn load_denied(&self) -> Result<(), AuthorityError> {
        let directory = format!("{}/denied", self.directory);
        let names = self.files.list_files(&directory).map_err(|source| storage(&directory, source))?;
        for name in names.iter().filter(|name| !durable::is_temporary(name)) {
            let path = format!("{directory}/{name}");
            let bytes = self.files.read(&path).map_err(|source| storage(&path, source))?;
            let peer = record::decode::<1>(Kind::Denied, &bytes).and_then(|[peer]| PeerIdentity::from_bytes(peer));
            self.denied.deny(peer.map_err(|error| damaged(&path, error))?);
        }
        Ok(())
    }

    fn token_path(&self, id: &[u8; 8], state: &str) -> String {
        format!("{}/tokens/{}.{state}", self.directory, hex(id))
    }

    /// Binds the token to `key`, or finds that it already was.
    fn use_token(&self, id: &[u8; 8], peer: PeerIdentity, key: &PublicKey) -> Result<UsedToken, AuthorityError> {
        let path = self.token_path(id, "used");
        let used = record::encode(Kind::TokenUsed, &[&key.0, &peer.to_bytes()]);
        // Two machines may come at the same time; their temporary files must differ.
        let unique = hex(&self.entropy.bytes::<8>());
        match durable::publish(&*self.files, &path, &[&used], &unique) {
            Ok(()) => Ok(UsedToken { key: *key, peer }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.used_token(id)?.ok_or_else(|| storage(&path, io::Error::from(io::ErrorKind::NotFound)))
            }
            Err(source) => Err(storage(&path, source)),
        }
    }

    fn used_token(&self, id: &[u8; 8]) -> Result<Option<UsedToken>, AuthorityError> {
        let path = self.token_path(id, "used");
        let Some(bytes) = read_if_there(&*self.files, &path)? else { return Ok(None) };
        let parse = || {
            let [key, peer] = record::decode(Kind::TokenUsed, &bytes)?;
            Ok(UsedToken { key: PublicKey(record::fixed(key)?), peer: PeerIdentity::from_bytes(peer)? })
        };
        parse().map(Some).map_err(|error| damaged(&path, error))
    }

    fn issued_token(&self, id: &[u8; 8]) -> Result<Option<IssuedToken>, AuthorityError> {
        let path = self.token_path(id, "issued");
        let Some(bytes) = read_if_there(&*self.files, &path)? else { return Ok(None) };
        let parse = || {
            let [role, id, expires, secret_hash] = record::decode(Kind::TokenIssued, &bytes)?;
            let [role] = record::fixed(role)?;
            Ok(IssuedToken {
                role: Role::from_code(role).ok_or(RecordError::Damaged)?,
                id: if id.is_empty() { None } else { Some(record::fixed(id)?) },
                expires: record::time(expires)?,
                secret_hash: blake3::Hash::from_bytes(record::fixed(secret_hash)?),
            })
        };
        parse().map(Some).map_err(|error| damaged(&path, error))
    }
}

struct IssuedToken {
    role: Role,
    id: Option<[u8; 16]>,
    expires: WallTime,
    secret_hash: blake3::Hash,
}

struct UsedToken {
    key: PublicKey,
    peer: PeerIdentity,
}

impl Admission for Authority {
    fn admit(&self, request: &JoinRequest) -> Result<JoinGrant, JoinRefusal> {
        let unavailable = |error: AuthorityError| {
            tracing::error!(error = &error as &dyn std::error::Error, "a join could not be served");
            JoinRefusal::Unavailable
        };
        let issued = self.issued_token(&request.token).map_err(unavailable)?.ok_or(JoinRefusal::UnknownToken)?;
        // Comparing hashes of this type takes constant time.
        if blake3::hash(&*request.secret) != issued.secret_hash {
            return Err(JoinRefusal::WrongSecret);
        }
        let key = requested_key(&request.certificate_request).map_err(|_| JoinRefusal::BadRequest)?;
        let before = self.used_token(&request.token).map_err(unavailable)?;
        if before.as_ref().is_some_and(|used| used.key != key) {
            return Err(JoinRefusal::AlreadyUsed);
        }
        if self.clock.wall() >= issued.expires {
            return Err(JoinRefusal::Expired { at: issued.expires });
        }
        let used = match before {
            Some(used) => used,
            None => {
                let id = issued.id.unwrap_or_else(|| self.entropy.bytes());
                let peer = PeerIdentity { role: issued.role, id };
                self.use_token(&request.token, peer, &key).map_err(unavailable)?
            }
        };
        if used.key != key {
            return Err(JoinRefusal::AlreadyUsed);
        }
        if self.denied.contains(&used.peer) {
            return Err(JoinRefusal::Denied);
        }
        let certificate = self.issue(used.peer, &key).map_err(unavailable)?;
        tracing::info!(peer = %used.peer, "joined");
        Ok(JoinGrant { certificate, authority: self.certificate.clone() })
    }

    fn renew(&self, peer: PeerIdentity, key: &PublicKey) -> Result<JoinGrant, JoinRefusal> {
        // A server renews its own by itself; nobody else has a server's key.
        if !matches!(peer.role, Role::Agent | Role::RecoveryHost) {
            return Err(JoinRefusal::BadRequest);
        }
        if self.denied.contains(&peer) {
            return Err(JoinRefusal::Denied);
        }
        let certificate = self.issue(peer, key).map_err(|error| {
            tracing::error!(error = &error as &dyn std::error::Error, "a renewal could not be served");
            JoinRefusal::Unavailable
        })?;
        tracing::info!(%peer, "renewed");
        Ok(JoinGrant { certificate, authority: self.certificate.clone() })
    }
}

/// The key that a PKCS #10 request is about, after checking the request's own signature.
pub(crate) fn requested_key(request: &[u8]) -> Result<PublicKey, AuthorityError> {
    let request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(request))
        .map_err(|error| AuthorityError::Request(error.to_string()))?;
    if request.public_key.algorithm() != &rcgen::PKCS_ED25519 {
        return Err(AuthorityError::Request("its key is not an Ed25519 key".to_owned()));
    }
    let key = request.public_key.der_bytes().try_into();
    Ok(PublicKey(key.map_err(|_| AuthorityError::Request("its key does not have 32 bytes".to_owned()))?))
}

fn make_authority(entropy: &dyn Entropy, now: WallTime) -> Result<Zeroizing<Vec<u8>>, AuthorityError> {
    let key = PrivateKey::generate(entropy);
    let mut params = CertificateParams::default();
    set_validity(&mut params, now.seconds(), Duration::from_secs(AUTHORITY_DAYS * DAY_SECONDS));
    params.serial_number = Some(serial(entropy));
    // A name of its own, so that another installation's certificates fail as strangers, not as forgeries.
    params.distinguished_name = named(&format!("Farshore authority {}", hex(&entropy.bytes::<8>())));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = params.self_signed(&key).map_err(certificate_error)?;
    Ok(record::encode(Kind::Authority, &[key.seed(), certificate.der()]))
}

pub(crate) fn parse_authority(stored: &[u8]) -> Result<(PrivateKey, CertificateDer<'static>), RecordError> {
    let [seed, certificate] = record::decode(Kind::Authority, stored)?;
    let key = PrivateKey::from_seed(Zeroizing::new(record::fixed(seed)?));
    Ok((key, CertificateDer::from(certificate.to_vec())))
}

/// Valid from shortly before `now` (seconds since 1970), and for `lifetime` from then on.
fn set_validity(params: &mut CertificateParams, now: u64, lifetime: Duration) {
    // Certificates write four-digit years; a clock beyond them is wrong, and adding to it must not overflow.
    const LATEST: u64 = 250_000_000_000;
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let at = |seconds: u64| epoch + Duration::from_secs(seconds.min(LATEST));
    params.not_before = at(now.saturating_sub(BACKDATE_DAYS * DAY_SECONDS));
    params.not_after = at(now.saturating_add(lifetime.as_secs()));
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// A random positive serial number that DER writes in exactly 16 bytes.
fn serial(entropy: &dyn Entropy) -> SerialNumber {
    let mut bytes: [u8; 16] = entropy.bytes();
    bytes[0] = bytes[0] & 0x3f | 0x40;
    SerialNumber::from_slice(&bytes)
}

fn read_if_there(files: &dyn Files, path: &str) -> Result<Option<Zeroizing<Vec<u8>>>, AuthorityError> {
    match files.read(path) {
        Ok(bytes) => Ok(Some(Zeroizing::new(bytes))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(storage(path, source)),
    }
}

fn storage(path: &str, source: io::Error) -> AuthorityError {
    AuthorityError::Storage { path: path.to_owned(), source }
}

fn damaged(path: &str, error: RecordError) -> AuthorityError {
    AuthorityError::Damaged { path: path.to_owned(), reason: error.to_string() }
}

fn certificate_error(error: rcgen::Error) -> AuthorityError {
    AuthorityError::Certificate(error.to_string())
}
