//! The join exchange: how a machine that has only a token becomes an enrolled peer.
//!
//! ```text
//! machine                                         server
//!   own key, durable ──────────────────────────►
//!   TLS 1.3: server must show the authority whose fingerprint the token carries, before anything is sent
//!   { token id, secret, PKCS #10 request } ─────►  check, bind the token to the key (durable)
//!   identity, durable ◄──────────────────────────  { certificate, authority's certificate } or a refusal
//! ```
//! A crash of either side at any moment leaves a join that the same machine can repeat with the same token: its key
//! is kept from the first attempt on.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use rustls::pki_types::CertificateDer;
use world::{Clock, Entropy, Files, WallTime, durable};
use zeroize::Zeroizing;

use crate::connector::{LinkRuntime, dial};
use crate::error::LinkError;
use crate::frame::Frame;
use crate::identity::{IdentityError, LinkIdentity, PeerIdentity, PrivateKey, PublicKey};
use crate::limits::{CONNECT_TIMEOUT, FIELD_BYTES_MAX, HANDSHAKE_TIMEOUT, JOIN_TIMEOUT};
use crate::record::{self, Kind, RecordError};
use crate::renew::key_of;
use crate::session::{TlsSocket, within};
use crate::tls::{self, ALPN_JOIN};
use crate::token::JoinToken;
use crate::trust::{ClockHandle, DenyList, Side, Trust, fingerprint};

/// The frame kinds of the join exchange, which is a protocol of its own.
const REQUEST_KIND: u8 = 1;
pub(crate) const ANSWER_KIND: u8 = 2;
/// Largest request or answer in bytes.
pub(crate) const JOIN_FRAME_MAX: usize = 4 * FIELD_BYTES_MAX;

/// Why the server did not take a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum JoinRefusal {
    /// The server never gave it out, or was set up anew since.
    #[error("the server does not know this token; order a new one")]
    UnknownToken,
    /// The token's name is known, its secret differs.
    #[error("the token's secret is wrong; copy the token again, or order a new one")]
    WrongSecret,
    /// It ended.
    #[error("the token ended at {at}; order a new one")]
    Expired {
        /// When it ended.
        at: WallTime,
    },
    /// Another machine (or this one, before it lost its key) used it.
    #[error("the token was used already by another key; if that was not you, remove that machine. Order a new token")]
    AlreadyUsed,
    /// The identity the token stands for was removed.
    #[error("the machine that this token stands for was removed; order a new token")]
    Denied,
    /// The server cannot read the request.
    #[error("the server cannot use the request; the two programs may be of different versions")]
    BadRequest,
    /// The server cannot do it now. Repeat the join with the same token.
    #[error("the server cannot serve joins at the moment; repeat the join with the same token")]
    Unavailable,
}

/// Why a join did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The server refused the token.
    #[error("the server refused to enrol this machine: {0}")]
    Refused(JoinRefusal),
    /// The server could not be reached, or is not the one the token is for. The secret was not sent unless the
    /// connection broke later; the join can be repeated.
    #[error("the join did not reach the server")]
    Link(#[from] LinkError),
    /// This machine is enrolled already. Nothing was changed.
    #[error("this machine is enrolled already as {}", .0.peer)]
    AlreadyJoined(Box<LinkIdentity>),
    /// The token carries no address and none was given.
    #[error("the token carries no server address; give one")]
    NoAddress,
    /// Key or identity cannot be kept.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The server's answer is not what was asked for. A bug, or not the server it claims to be.
    #[error("the server's answer cannot be used: {0}")]
    BadAnswer(&'static str),
}

/// What a machine sends to join.
pub struct JoinRequest {
    /// The token's public name.
    pub token: [u8; 8],
    /// The token's secret.
    pub secret: Zeroizing<[u8; 32]>,
    /// PKCS #10, DER.
    pub certificate_request: Vec<u8>,
}

/// What a machine gets when it is admitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinGrant {
    /// Its certificate, DER.
    pub certificate: CertificateDer<'static>,
    /// The authority's certificate, DER.
    pub authority: CertificateDer<'static>,
}

/// Who decides on joins: the [`crate::Authority`], later a configuration server.
pub trait Admission: Send + Sync {
    /// Decides on a request. What was decided is durable on return.
    ///
    /// # Errors
    /// The refusal that the machine is told.
    fn admit(&self, request: &JoinRequest) -> Result<JoinGrant, JoinRefusal>;

    /// A new certificate for a peer that proved to have `key` and the certificate of `peer`.
    ///
    /// # Errors
    /// The refusal that the peer is told.
    fn renew(&self, peer: PeerIdentity, key: &PublicKey) -> Result<JoinGrant, JoinRefusal>;
}

impl JoinRequest {
    /// A request to use `token` for the key of a PKCS #10 request.
    pub fn new(token: &JoinToken, certificate_request: Vec<u8>) -> JoinRequest {
        JoinRequest { token: token.id, secret: token.secret.clone(), certificate_request }
    }

    fn encode(&self) -> Bytes {
        // The wire's copy of the secret is wiped as well, once the frame is gone.
        Bytes::from_owner(record::encode(Kind::JoinRequest, &[&self.token, &*self.secret, &self.certificate_request]))
    }

    fn decode(bytes: &[u8]) -> Result<JoinRequest, RecordError> {
        let [token, secret, certificate_request] = record::decode(Kind::JoinRequest, bytes)?;
        Ok(JoinRequest {
            token: record::fixed(token)?,
            secret: Zeroizing::new(record::fixed(secret)?),
            certificate_request: certificate_request.to_vec(),
        })
    }
}

pub(crate) fn encode_answer(answer: &Result<JoinGrant, JoinRefusal>) -> Bytes {
    let (code, first, second): (u8, &[u8], &[u8]) = match answer {
        Ok(grant) => (0, &grant.certificate, &grant.authority),
        Err(JoinRefusal::UnknownToken) => (1, &[], &[]),
        Err(JoinRefusal::WrongSecret) => (2, &[], &[]),
        Err(JoinRefusal::Expired { at }) => (3, &at.seconds().to_le_bytes(), &[]),
        Err(JoinRefusal::AlreadyUsed) => (4, &[], &[]),
        Err(JoinRefusal::Denied) => (5, &[], &[]),
        Err(JoinRefusal::BadRequest) => (6, &[], &[]),
        Err(JoinRefusal::Unavailable) => (7, &[], &[]),
    };
    Bytes::from_owner(record::encode(Kind::JoinAnswer, &[&[code], first, second]))
}

pub(crate) fn decode_answer(bytes: &[u8]) -> Result<Result<JoinGrant, JoinRefusal>, RecordError> {
    let [code, first, second] = record::decode(Kind::JoinAnswer, bytes)?;
    let [code] = record::fixed(code)?;
    Ok(match code {
        0 => Ok(JoinGrant {
            certificate: CertificateDer::from(first.to_vec()),
            authority: CertificateDer::from(second.to_vec()),
        }),
        1 => Err(JoinRefusal::UnknownToken),
        2 => Err(JoinRefusal::WrongSecret),
        3 => Err(JoinRefusal::Expired { at: record::time(first)? }),
        4 => Err(JoinRefusal::AlreadyUsed),
        5 => Err(JoinRefusal::Denied),
        6 => Err(JoinRefusal::BadRequest),
        7 => Err(JoinRefusal::Unavailable),
        _ => return Err(RecordError::Damaged),
    })
}

/// Reads `bytes` as a request and as an answer; what is understood is written the same again.
#[cfg(any(test, fuzzing))]
pub(crate) fn survives(bytes: &[u8]) -> bool {
    let request = JoinRequest::decode(bytes);
    if let Ok(request) = &request {
        assert_eq!(request.encode(), bytes, "a request has one form");
    }
    let answer = decode_answer(bytes);
    if let Ok(answer) = &answer {
        assert_eq!(decode_answer(&encode_answer(answer)).as_ref(), Ok(answer));
    }
    request.is_ok() || answer.is_ok()
}

/// What is said in joins, by name.
#[cfg(test)]
pub(crate) fn samples(token: &JoinToken) -> Vec<(&'static str, Vec<u8>)> {
    let grant = JoinGrant { certificate: vec![1, 2].into(), authority: vec![3].into() };
    let expired = JoinRefusal::Expired { at: WallTime::from_seconds(77) };
    vec![
        ("request", JoinRequest::new(token, vec![4; 40]).encode().to_vec()),
        ("grant", encode_answer(&Ok(grant)).to_vec()),
        ("expired", encode_answer(&Err(expired)).to_vec()),
        ("denied", encode_answer(&Err(JoinRefusal::Denied)).to_vec()),
    ]
}

/// The server's half, on a socket whose handshake chose the join protocol.
pub(crate) async fn serve(socket: &TlsSocket, admission: Arc<dyn Admission>) -> Result<(), LinkError> {
    let frame = socket.receive().await?;
    let answer = match JoinRequest::decode(&frame.into_body()) {
        // Deciding syncs files, which must not hold up the runtime's threads.
        Ok(request) => tokio::task::spawn_blocking(move || admission.admit(&request))
            .await
            .unwrap_or(Err(JoinRefusal::Unavailable)),
        Err(_) => Err(JoinRefusal::BadRequest),
    };
    if let Err(refusal) = &answer {
        tracing::warn!(%refusal, from = %socket.address(), "a join was refused");
    }
    socket.send(Frame::new(ANSWER_KIND, encode_answer(&answer))).await?;
    socket.farewell().await;
    Ok(())
}

/// Where and how a machine joins.
pub struct JoinPlan<'a> {
    /// Where key and identity are kept.
    pub files: &'a dyn Files,
    /// The identity's path; the key of an unfinished join is kept beside it.
    pub path: &'a str,
    /// Judges the server's certificate.
    pub clock: Arc<dyn Clock>,
    /// Makes the key.
    pub entropy: &'a dyn Entropy,
    /// Where the server is, `host:port`; tried before the token's own addresses.
    pub addresses: &'a [String],
}

/// Enrols this machine with `token` and returns its identity, durable on return. Blocks; not for async callers.
///
/// # Errors
/// See [`JoinError`]. After [`JoinError::Link`] and [`JoinRefusal::Unavailable`] the same call can be repeated.
pub fn join(runtime: &LinkRuntime, plan: &JoinPlan<'_>, token: &JoinToken) -> Result<LinkIdentity, JoinError> {
    if let Some(identity) = LinkIdentity::load(plan.files, plan.path)? {
        return Err(JoinError::AlreadyJoined(Box::new(identity)));
    }
    if plan.addresses.is_empty() && token.addresses.is_empty() {
        return Err(JoinError::NoAddress);
    }
    let key = pending_key(plan)?;
    let certificate_request =
        key.certificate_request().map_err(|_| JoinError::BadAnswer("no certificate request could be made"))?;
    let request = JoinRequest::new(token, certificate_request);
    let addresses = plan.addresses.iter().chain(&token.addresses);
    let answer = runtime.block_on(exchange_with_any(addresses, token.fingerprint, &plan.clock, &request))?;
    let identity = accept(answer.map_err(JoinError::Refused)?, key, token, &plan.clock)?;
    identity.store(plan.files, plan.path)?;
    // The key is part of the identity now. Losing this error costs a file that the next join would reuse.
    let _ = plan.files.remove(&pending_path(plan.path));
    Ok(identity)
}

fn pending_path(path: &str) -> String {
    format!("{path}.joining")
}

/// The key of an earlier, unfinished join, or a new one, durable before it is used.
fn pending_key(plan: &JoinPlan<'_>) -> Result<PrivateKey, JoinError> {
    let path = pending_path(plan.path);
    let storage = |source| IdentityError::Storage { path: path.clone(), source };
    match plan.files.read(&path) {
        Ok(bytes) => {
            let bytes = Zeroizing::new(bytes);
            let seed = record::decode(Kind::PendingKey, &bytes).and_then(|[seed]| record::fixed(seed));
            let seed =
                seed.map_err(|error| IdentityError::Damaged { path: path.clone(), reason: error.to_string() })?;
            Ok(PrivateKey::from_seed(Zeroizing::new(seed)))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = PrivateKey::generate(plan.entropy);
            let stored = record::encode(Kind::PendingKey, &[key.seed()]);
            durable::replace_private(plan.files, &path, &stored, "key").map_err(storage)?;
            Ok(key)
        }
        Err(source) => Err(storage(source).into()),
    }
}

async fn exchange_with_any(
    addresses: impl Iterator<Item = &String>,
    fingerprint: [u8; 32],
    clock: &Arc<dyn Clock>,
    request: &JoinRequest,
) -> Result<Result<JoinGrant, JoinRefusal>, JoinError> {
    let mut last = JoinError::NoAddress;
    for address in addresses {
        match exchange(address, fingerprint, clock, request).await {
            Ok(answer) => return Ok(answer),
            Err(error) => {
                tracing::warn!(%address, error = &error as &dyn std::error::Error, "a join did not reach the server");
                last = error;
            }
        }
    }
    Err(last)
}

async fn exchange(
    address: &str,
    fingerprint: [u8; 32],
    clock: &Arc<dyn Clock>,
    request: &JoinRequest,
) -> Result<Result<JoinGrant, JoinRefusal>, JoinError> {
    let stream = within("connecting", CONNECT_TIMEOUT, dial(address)).await?;
    let session = tls::join_client(fingerprint, ClockHandle(clock.clone()))?;
    let socket = TlsSocket::new(stream, session, JOIN_FRAME_MAX);
    within("the TLS handshake", HANDSHAKE_TIMEOUT, socket.handshake()).await?;
    if socket.protocol().as_deref() != Some(ALPN_JOIN) {
        return Err(LinkError::ProtocolViolation("it chose no protocol".to_owned()).into());
    }
    let conversation = async {
        socket.send(Frame::new(REQUEST_KIND, request.encode())).await?;
        socket.receive().await
    };
    let frame = within("the join", JOIN_TIMEOUT, conversation).await?;
    socket.farewell().await;
    if frame.kind() != ANSWER_KIND {
        return Err(JoinError::BadAnswer("it is not an answer"));
    }
    decode_answer(&frame.into_body()).map_err(|_| JoinError::BadAnswer("it is malformed"))
}

/// The identity that a grant gives, after checking every part of it.
fn accept(
    grant: JoinGrant,
    key: PrivateKey,
    token: &JoinToken,
    clock: &Arc<dyn Clock>,
) -> Result<LinkIdentity, JoinError> {
    if fingerprint(&grant.authority) != token.fingerprint {
        return Err(JoinError::BadAnswer("its authority is not the token's"));
    }
    let identity = checked(grant, key, clock)?;
    if identity.peer.role != token.role {
        return Err(JoinError::BadAnswer("its certificate is for another role"));
    }
    Ok(identity)
}

/// The identity that a grant of an authority that is trusted gives `key`.
pub(crate) fn checked(grant: JoinGrant, key: PrivateKey, clock: &Arc<dyn Clock>) -> Result<LinkIdentity, JoinError> {
    let trust = Trust::new(grant.authority.clone(), clock.clone(), DenyList::default());
    let peer = trust
        .check(&grant.certificate, Side::Client)
        .map_err(|_| JoinError::BadAnswer("its certificate is not of its authority"))?;
    if key_of(&grant.certificate) != Some(key.public()) {
        return Err(JoinError::BadAnswer("its certificate is for another key"));
    }
    Ok(LinkIdentity { peer, key, certificate: grant.certificate, authority: grant.authority })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_answer_survives_the_wire() {
        let at = WallTime::from_seconds(77);
        let grant = JoinGrant { certificate: vec![1, 2].into(), authority: vec![3].into() };
        for answer in [
            Ok(grant),
            Err(JoinRefusal::UnknownToken),
            Err(JoinRefusal::WrongSecret),
            Err(JoinRefusal::Expired { at }),
            Err(JoinRefusal::AlreadyUsed),
            Err(JoinRefusal::Denied),
            Err(JoinRefusal::BadRequest),
            Err(JoinRefusal::Unavailable),
        ] {
            assert_eq!(decode_answer(&encode_answer(&answer)).expect("decodes"), answer);
        }
    }

    proptest! {
        #[test]
        fn any_fields_may_arrive(fields in proptest::array::uniform3(proptest::collection::vec(any::<u8>(), 0..40))) {
            let fields: Vec<&[u8]> = fields.iter().map(Vec::as_slice).collect();
            let _ = decode_answer(&record::encode(Kind::JoinAnswer, &fields));
            let _ = JoinRequest::decode(&record::encode(Kind::JoinRequest, &fields));
        }
    }
}
