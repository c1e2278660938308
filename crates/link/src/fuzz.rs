//! Fuzz targets of this crate: what arrives over a link, in a join, on a command line, or from the identity's files.
//! Compiled for tests and fuzzers only; see `fuzz/README.md`.
//!
//! A checksum keeps a fuzzer out, so targets of checked formats also read the input with a checksum made right.

use std::collections::VecDeque;

use crate::authority;
use crate::frame::Assembler;
use crate::identity::{LinkIdentity, PeerIdentity};
use crate::join;
use crate::record::{self, Kind};
use crate::token::{self, JoinToken};

/// Largest frame body of the frame target, in bytes: small, so that its limit is met.
const FRAME_MAX: usize = 300;

/// The plaintext stream of a link. The first byte says in pieces of which length it comes.
pub fn link_frames(data: &[u8]) -> bool {
    let Some((&step, stream)) = data.split_first() else { return false };
    let mut whole = VecDeque::new();
    let at_once = Assembler::new(FRAME_MAX).push(stream, &mut whole);
    let mut cut = VecDeque::new();
    let mut assembler = Assembler::new(FRAME_MAX);
    let in_pieces = stream.chunks(usize::from(step).max(1)).try_for_each(|piece| assembler.push(piece, &mut cut));
    assert_eq!((whole.len(), at_once.is_ok()), (cut.len(), in_pieces.is_ok()), "cutting changes nothing");
    assert_eq!(whole, cut);
    assert!(whole.iter().all(|frame| frame.len() <= FRAME_MAX));
    let mut written = Vec::new();
    for frame in whole {
        written.extend_from_slice(&frame.header());
        frame.parts().for_each(|part| written.extend_from_slice(part));
    }
    assert!(stream.starts_with(&written), "frames are what was on the wire");
    at_once.is_ok() && !cut.is_empty()
}

/// A join token as typed, and as bytes under a right checksum.
pub fn join_token(data: &[u8]) -> bool {
    let typed = std::str::from_utf8(data).ok().and_then(|text| JoinToken::parse(text).ok());
    let sealed = JoinToken::parse(&token::print_bytes(data)).ok();
    for token in [&typed, &sealed].into_iter().flatten() {
        let text = token.to_text().expect("what was read fits a token");
        let again = JoinToken::parse(&text).expect("what is printed is read");
        assert_eq!(again.to_text().expect("it fits a token"), text);
    }
    if sealed.is_some() {
        let text = sealed.and_then(|token| token.to_text().ok()).expect("it was printed above");
        assert_eq!(*text, *token::print_bytes(data), "a token has one form");
        return true;
    }
    typed.is_some()
}

/// What either side says during a join, raw and under a right checksum.
pub fn join_message(data: &[u8]) -> bool {
    let [plain, sealed] = [data, &record::reseal(data)].map(join::survives);
    plain || sealed
}

/// A PKCS #10 request inside a join request.
pub fn certificate_request(data: &[u8]) -> bool {
    authority::requested_key(data).is_ok()
}

/// The files of identity and authority, raw and under a right checksum.
pub fn link_record(data: &[u8]) -> bool {
    let mut valid = false;
    for bytes in [data, &record::reseal(data)] {
        if let Ok(identity) = LinkIdentity::decode(bytes) {
            assert_eq!(identity.encode()[..], *bytes, "an identity has one form");
            valid = true;
        }
        if let Ok((key, certificate)) = authority::parse_authority(bytes) {
            let again = record::encode(Kind::Authority, &[key.seed(), certificate.as_ref()]);
            assert_eq!(again[..], *bytes, "an authority has one form");
            valid = true;
        }
    }
    if let Some(peer) = std::str::from_utf8(data).ok().and_then(PeerIdentity::from_uri) {
        assert_eq!(peer.to_uri().as_bytes(), data);
        valid = true;
    }
    valid
}

#[cfg(test)]
#[path = "../../../fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Frame;
    use crate::identity::{PrivateKey, Role};
    use rustls::pki_types::CertificateDer;
    use world::WallTime;
    use zeroize::Zeroizing;

    /// One frame as it stands on the wire.
    fn on_wire(frame: Frame) -> Vec<u8> {
        let header = frame.header();
        [&header[..], &frame.into_body()].concat()
    }

    fn token() -> JoinToken {
        JoinToken {
            role: Role::Agent,
            expires: WallTime::from_seconds(1_800_000_000),
            fingerprint: [1; 32],
            id: [2; 8],
            addresses: vec!["ps1.example:7443".into(), "[::1]:7443".into()],
            secret: Zeroizing::new([3; 32]),
        }
    }

    fn key() -> PrivateKey {
        PrivateKey::from_seed(Zeroizing::new([7; 32]))
    }

    #[test]
    fn frames() {
        let frames = [Frame::new(1, vec![7; 20]), Frame::new(2, vec![]), Frame::new(3, vec![9; FRAME_MAX])];
        let stream: Vec<u8> = frames.into_iter().flat_map(on_wire).collect();
        let seeds = [("in-pieces", [&[7], &stream[..]].concat()), ("at-once", [&[255], &stream[..5 + 20]].concat())];
        replay::replay("link_frames", link_frames, &seeds);
    }

    #[test]
    fn tokens() {
        let text = token().to_text().expect("it fits");
        let bare = JoinToken { addresses: Vec::new(), ..token() }.to_text().expect("it fits");
        let bytes = token::read_bytes(&text).expect("just printed").to_vec();
        let seeds =
            [("printed", text.as_bytes().to_vec()), ("shouted", bare.to_uppercase().into_bytes()), ("bytes", bytes)];
        replay::replay("join_token", join_token, &seeds);
    }

    #[test]
    fn joins() {
        let seeds: Vec<_> = join::samples(&token());
        replay::replay("join_message", join_message, &seeds);
    }

    #[test]
    fn certificate_requests() {
        let request = key().certificate_request().expect("a request can be made");
        replay::replay("certificate_request", certificate_request, &[("request", request)]);
    }

    #[test]
    fn records() {
        let peer = PeerIdentity { role: Role::ProcessServer, id: [5; 16] };
        let certificate = CertificateDer::from(vec![1, 2, 3]);
        let authority = record::encode(Kind::Authority, &[key().seed(), certificate.as_ref()]).to_vec();
        let identity = LinkIdentity { peer, key: key(), authority: certificate.clone(), certificate };
        let identity = identity.encode().to_vec();
        let seeds = [("identity", identity), ("authority", authority), ("uri", peer.to_uri().into_bytes())];
        replay::replay("link_record", link_record, &seeds);
    }
}
