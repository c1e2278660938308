//! Renewal: an enrolled peer gets a new certificate for the key it has, while the one it shows is still accepted.
//!
//! ```text
//! peer                                            server with the authority
//!   TLS 1.3, mutual, as on a replication link ─►    chain, denial, validity with grace
//!   { renew } ─────────────────────────────────►    issue for the same identity and key
//!   identity, durable ◄─────────────────────────    { certificate, authority's certificate } or a refusal
//! ```
//! Nothing is bound or used up, so it can be repeated. The handshake proved possession of the key.

use std::sync::Arc;

use bytes::Bytes;
use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::connector::{Connector, Expected, dial};
use crate::error::LinkError;
use crate::frame::Frame;
use crate::identity::{LinkIdentity, PublicKey};
use crate::join::{
    ANSWER_KIND, Admission, JOIN_FRAME_MAX, JoinError, JoinRefusal, checked, decode_answer, encode_answer,
};
use crate::limits::{CONNECT_TIMEOUT, HANDSHAKE_TIMEOUT, JOIN_TIMEOUT};
use crate::session::{TlsSocket, within};
use crate::tls::{self, ALPN_RENEW};
use crate::trust::identity_of_der;

const RENEW_KIND: u8 = 3;

/// The key that a certificate (DER) is for.
pub(crate) fn key_of(certificate: &[u8]) -> Option<PublicKey> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    <[u8; 32]>::try_from(&*parsed.public_key().subject_public_key.data).ok().map(PublicKey)
}

/// The server's half, on a socket whose handshake chose this protocol.
pub(crate) async fn serve(socket: &TlsSocket, admission: Arc<dyn Admission>) -> Result<(), LinkError> {
    let certificate =
        socket.peer_certificate().ok_or_else(|| LinkError::BadCertificate("it showed none".to_owned()))?;
    let frame = socket.receive().await?;
    let known = identity_of_der(&certificate).zip(key_of(&certificate));
    let answer = match known.filter(|_| frame.kind() == RENEW_KIND) {
        Some((peer, key)) => tokio::task::spawn_blocking(move || admission.renew(peer, &key))
            .await
            .unwrap_or(Err(JoinRefusal::Unavailable)),
        None => Err(JoinRefusal::BadRequest),
    };
    if let Err(refusal) = &answer {
        tracing::warn!(%refusal, from = %socket.address(), "a renewal was refused");
    }
    socket.send(Frame::new(ANSWER_KIND, encode_answer(&answer))).await?;
    socket.farewell().await;
    Ok(())
}

impl Connector {
    /// A new certificate for this connector's identity from the server at `address`, which must hold the same authority.
    /// Nothing is stored. Blocks; not for async callers.
    ///
    /// # Errors
    /// See [`JoinError`]. The identity that this connector has stays as good as it was.
    pub fn renew(&self, address: &str, expected: &Expected) -> Result<LinkIdentity, JoinError> {
        let answer = self.runtime.block_on(async {
            let stream = within("connecting", CONNECT_TIMEOUT, dial(address)).await?;
            let session = tls::peer_client(&self.identity, &self.trust, self.clock.clone(), ALPN_RENEW)?;
            let socket = TlsSocket::new(stream, session, JOIN_FRAME_MAX);
            within("the TLS handshake", HANDSHAKE_TIMEOUT, socket.handshake()).await?;
            if socket.protocol().as_deref() != Some(ALPN_RENEW) {
                return Err(LinkError::ProtocolViolation("it renews no certificates".to_owned()));
            }
            let peer = socket.peer_certificate().and_then(|certificate| identity_of_der(&certificate));
            let peer = peer.ok_or_else(|| LinkError::BadCertificate("it names no identity".to_owned()))?;
            if !expected.is(&peer) {
                return Err(LinkError::WrongPeer { expected: expected.to_string(), found: peer });
            }
            let conversation = async {
                socket.send(Frame::new(RENEW_KIND, Bytes::new())).await?;
                socket.receive().await
            };
            let frame = within("the renewal", JOIN_TIMEOUT, conversation).await?;
            socket.farewell().await;
            Ok::<Frame, LinkError>(frame)
        })?;
        if answer.kind() != ANSWER_KIND {
            return Err(JoinError::BadAnswer("it is not an answer"));
        }
        let answer = decode_answer(&answer.into_body()).map_err(|_| JoinError::BadAnswer("it is malformed"))?;
        let grant = answer.map_err(JoinError::Refused)?;
        if grant.authority != self.identity.authority {
            return Err(JoinError::BadAnswer("its authority is another one"));
        }
        let renewed = checked(grant, self.identity.key.clone(), &self.clock.0)?;
        if renewed.peer != self.identity.peer {
            return Err(JoinError::BadAnswer("its certificate is for another identity"));
        }
        Ok(renewed)
    }
}

/// From when to when a certificate (DER) is valid, in seconds since 1970; zeroes if that cannot be read.
pub(crate) fn validity_of(certificate: &CertificateDer<'_>) -> (u64, u64) {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return (0, 0) };
    let seconds = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
    (seconds(parsed.validity().not_before), seconds(parsed.validity().not_after))
}
