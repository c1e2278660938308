//! Tokens, joins, certificates: who gets in, who does not, and what they are told.

mod site;

use std::sync::Arc;
use std::time::Duration;

use link::{
    Admission, FrameLink, JoinError, JoinPlan, JoinRefusal, JoinToken, LinkError, LinkIdentity, PeerRefusal,
    PrivateKey, Role, join,
};
use site::{ANY_SERVER, SOON, Site, open_authority};
use world::{Clock, Files, RealFiles, SystemEntropy};

/// The token with other addresses in it.
fn at(mut token: JoinToken, addresses: &[&str]) -> JoinToken {
    token.addresses = addresses.iter().map(|address| (*address).to_owned()).collect();
    token
}

#[test]
fn a_machine_joins_and_both_sides_know_each_other() {
    let site = Site::new();
    let token = site.token_for(Role::Agent, Some([9; 16]));
    let printed = JoinToken::parse(&token.to_text().expect("prints")).expect("parses");
    let agent = site.join("a", &printed).expect("joins");
    assert_eq!((agent.peer.role, agent.peer.id), (Role::Agent, [9; 16]));

    let near = site.connect(&agent).expect("connects");
    let (peer, far) = site.accept();
    assert_eq!(peer, agent.peer);
    assert_eq!(near.peer(), site.authority.own_identity(Role::ProcessServer).expect("kept").peer);
    near.send(link::Frame::new(7, "hello")).expect("open");
    assert_eq!(far.recv(SOON).expect("open"), Some(link::Frame::new(7, "hello")));

    let files = RealFiles::new(site.folder.path());
    let kept = LinkIdentity::load(&files, "machines/a").expect("readable").expect("there");
    assert_eq!((kept.peer, kept.certificate), (agent.peer, agent.certificate));
    assert_eq!(files.list_files("machines").expect("lists"), ["a"], "no key is left beside the identity");
    assert!(matches!(site.join("a", &token), Err(JoinError::AlreadyJoined(_))));
}

#[test]
fn a_token_works_once() {
    let site = Site::new();
    let token = site.token();
    site.join("first", &token).expect("joins");
    let refused = site.join("second", &token).expect_err("used");
    assert!(matches!(refused, JoinError::Refused(JoinRefusal::AlreadyUsed)), "{refused}");
}

#[test]
fn an_interrupted_join_is_repeated_by_the_same_key_even_across_a_restart() {
    let site = Site::new();
    let token = site.token();
    // The server bound the token and made a certificate, which never arrived.
    let first = site.join("a", &token).expect("joins");
    let files = RealFiles::new(site.folder.path());
    let seed_again = {
        // What the machine had kept at that moment: its key only. Joining with the same key needs that file.
        let lost = site.join("b", &site.token()).expect("another machine");
        assert_ne!(lost.peer.id, first.peer.id);
        first.key.clone()
    };
    let request =
        |key: &PrivateKey| link::join::JoinRequest::new(&token, key.certificate_request().expect("a request"));
    let reopened = open_authority(site.folder.path(), &site.clock);
    let grant = reopened.admit(&request(&seed_again)).expect("the same key may repeat");
    assert_eq!(grant.authority, first.authority);
    let other = PrivateKey::generate(&SystemEntropy);
    assert_eq!(reopened.admit(&request(&other)), Err(JoinRefusal::AlreadyUsed));
    site.clock.advance_days(2);
    let late = reopened.admit(&request(&seed_again));
    assert!(matches!(late, Err(JoinRefusal::Expired { .. })), "repeating ends with the token: {late:?}");
    drop(files);
}

#[test]
fn a_join_that_never_reached_the_server_keeps_its_key_for_the_next_attempt() {
    let site = Site::new();
    let token = site.token();
    let files = RealFiles::new(site.folder.path());
    let nowhere = at(token.clone(), &["127.0.0.1:1"]);
    let error = site.join("a", &nowhere).expect_err("nobody is there");
    assert!(matches!(&error, JoinError::Link(LinkError::Refused { address }) if address == "127.0.0.1:1"), "{error:?}");
    let key = files.read("machines/a.joining").expect("the key is kept");
    site.join("a", &token).expect("joins");
    let identity = files.read("machines/a").expect("there");
    let seed = &key[15..47];
    assert!(identity.windows(32).any(|window| window == seed), "the first attempt's key was used");
    assert!(matches!(site.join("z", &at(token, &[])), Err(JoinError::NoAddress)));
}

#[test]
fn of_two_machines_with_one_token_exactly_one_wins() {
    let site = Site::new();
    for round in 0..5 {
        let token = site.token();
        let results: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|n| {
                    scope.spawn({
                        let (site, token) = (&site, &token);
                        move || site.join(&format!("m-{round}-{n}"), token)
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
        for error in results.into_iter().filter_map(Result::err) {
            assert!(matches!(error, JoinError::Refused(JoinRefusal::AlreadyUsed)), "{error}");
        }
    }
}

#[test]
fn expired_unknown_and_wrong_tokens_are_told_apart() {
    let site = Site::new();
    let (expiring, good) = (site.token(), site.token());
    let text = good.to_text().expect("prints");

    let other_site = Site::new();
    let unknown = {
        let mut token = at(other_site.token(), &[&site.address()]);
        token.fingerprint = site.authority.fingerprint();
        token
    };
    let error = site.join("x", &unknown).expect_err("unknown");
    assert!(matches!(error, JoinError::Refused(JoinRefusal::UnknownToken)), "{error}");

    let mut wrong = unknown;
    wrong.id = good.id;
    let error = site.join("x", &wrong).expect_err("wrong secret");
    assert!(matches!(error, JoinError::Refused(JoinRefusal::WrongSecret)), "{error}");

    site.clock.advance_days(1);
    let error = site.join("x", &expiring).expect_err("expired");
    assert!(matches!(error, JoinError::Refused(JoinRefusal::Expired { at }) if at == expiring.expires), "{error}");
    assert!(error.to_string().contains("2027-01-16"), "{error}");

    // A failed attempt uses nothing up.
    site.clock.go_back_days(1);
    site.join("x", &JoinToken::parse(&text).expect("parses")).expect("joins");
}

#[test]
fn the_secret_is_not_sent_to_another_installation() {
    let (site, impostor) = (Site::new(), Site::new());
    let token = at(site.token(), &[&impostor.address()]);
    let error = site.join("a", &token).expect_err("an impostor");
    assert!(matches!(error, JoinError::Link(LinkError::ForeignCertificate)), "{error:?}");
    site.join("a", &at(token, &[&impostor.address(), &site.address()]))
        .expect("the token is unused, and the next address is tried");
}

#[test]
fn an_enrolled_agent_cannot_pose_as_a_server() {
    let site = Site::new();
    let rogue = site.agent("rogue");
    let reception = link::Reception::new(rogue, site.authority.trust(), None, site.clock.clone());
    let listener = link::Listener::bind(&site.runtime, "127.0.0.1:0", reception).expect("listens");
    let token = at(site.token(), &[&listener.address().to_string()]);
    let error = site.join("victim", &token).expect_err("not a server");
    assert!(matches!(&error, JoinError::Link(LinkError::BadCertificate(_) | LinkError::RefusedByPeer(_))), "{error:?}");
    let victim = site.agent("victim2");
    let error =
        site.connector(&victim).connect(&listener.address().to_string(), &ANY_SERVER).expect_err("not a server");
    assert!(matches!(&error, LinkError::BadCertificate(_)), "{error:?}");
}

#[test]
fn strangers_are_refused_by_both_sides_with_the_reason() {
    let (ours, theirs) = (Site::new(), Site::new());
    let (our_agent, their_agent) = (ours.agent("a"), theirs.agent("a"));
    // Our agent at their server: the agent refuses.
    let error = ours.connector(&our_agent).connect(&theirs.address(), &ANY_SERVER).expect_err("foreign");
    assert!(matches!(error, LinkError::ForeignCertificate), "{error:?}");
    // Their agent, which trusts our server, at our server: the server refuses and the agent is told why.
    let gullible = LinkIdentity { authority: our_agent.authority.clone(), ..their_agent };
    let error = ours.connect(&gullible).expect_err("foreign");
    assert!(matches!(&error, LinkError::RefusedByPeer(PeerRefusal::Foreign)), "{error:?}");
    assert!(ours.listener.accept(Duration::ZERO).expect("listening").is_none());
}

#[test]
fn an_ended_certificate_is_good_within_the_grace_only() {
    let site = Site::new();
    let agent = site.agent("a");
    site.clock.advance_days(90 + 180);
    drop((site.connect(&agent).expect("the last day of the grace"), site.accept()));
    site.clock.advance_days(1);
    // Both certificates have the same age; the agent sees the server's first.
    let error = site.connect(&agent).expect_err("too old");
    assert!(matches!(error, LinkError::CertificateExpired { .. }), "{error:?}");
    // With a patient agent it is the server that refuses, and says why.
    let patient =
        link::Trust::new(agent.authority.clone(), site.clock.clone(), Default::default()).with_grace_days(999);
    let connector = link::Connector::new(site.runtime.clone(), agent.clone(), patient, site.clock.clone());
    let error = connector.connect(&site.address(), &ANY_SERVER).expect_err("too old");
    assert!(matches!(&error, LinkError::RefusedByPeer(PeerRefusal::Expired)), "{error:?}");
    // A clock that jumps back by months stops nothing; one that jumps back by years is named.
    site.clock.go_back_days(300);
    drop((site.connect(&agent).expect("clocks jump"), site.accept()));
    site.clock.go_back_days(1000);
    let error = site.connect(&agent).expect_err("years back");
    assert!(matches!(error, LinkError::CertificateNotYetValid { .. }), "{error:?}");
}

#[test]
fn a_denied_peer_is_cut_off_and_stays_out_across_a_restart() {
    let site = Site::new();
    let agent = site.agent("a");
    let near = site.connect(&agent).expect("connects");
    let (_, far) = site.accept();
    site.authority.deny(agent.peer).expect("denied");
    assert!(matches!(far.recv(SOON), Err(LinkError::Denied)));
    assert!(matches!(near.recv(SOON), Err(LinkError::PeerClosed | LinkError::Lost { .. })));
    let error = site.connect(&agent).expect_err("denied");
    assert!(matches!(&error, LinkError::RefusedByPeer(PeerRefusal::Denied)), "{error:?}");
    let error = site.join("b", &site.token_for(Role::Agent, Some(agent.peer.id))).expect_err("denied");
    assert!(matches!(error, JoinError::Refused(JoinRefusal::Denied)), "{error}");
    assert!(open_authority(site.folder.path(), &site.clock).trust().denied().contains(&agent.peer));
}

#[test]
fn the_wrong_peer_is_named() {
    let site = Site::new();
    let agent = site.agent("a");
    let expected = link::Expected { role: Role::ProcessServer, id: Some([1; 16]) };
    let error = site.connector(&agent).connect(&site.address(), &expected).expect_err("another one");
    assert!(matches!(&error, LinkError::WrongPeer { found, .. } if found.role == Role::ProcessServer), "{error:?}");
    let expected = link::Expected { role: Role::MasterTarget, id: None };
    let error = site.connector(&agent).connect(&site.address(), &expected).expect_err("another role");
    assert!(error.to_string().contains("instead of any master target"), "{error}");
}

#[test]
fn addresses_where_nobody_is_are_told_apart() {
    let site = Site::new();
    let agent = site.agent("a");
    let error = site.connector(&agent).connect("127.0.0.1:1", &ANY_SERVER).expect_err("closed port");
    assert!(matches!(error, LinkError::Refused { .. }), "{error:?}");
    let error = site.connector(&agent).connect("nowhere.invalid:7443", &ANY_SERVER).expect_err("no such name");
    assert!(matches!(error, LinkError::Unreachable { .. }), "{error:?}");
}

#[test]
fn the_authority_survives_restarts_keeps_secrets_private_and_is_never_replaced_when_damaged() {
    use std::os::unix::fs::PermissionsExt;
    let site = Site::new();
    let token = site.token();
    let server = site.authority.own_identity(Role::ProcessServer).expect("kept");
    let reopened = open_authority(site.folder.path(), &site.clock);
    assert_eq!(reopened.fingerprint(), site.authority.fingerprint());
    assert_eq!(reopened.own_identity(Role::ProcessServer).expect("kept").certificate, server.certificate);
    site.clock.advance_days(61);
    let renewed = reopened.own_identity(Role::ProcessServer).expect("renewed");
    assert_eq!(renewed.peer, server.peer, "others know the server by its id");
    assert_ne!(renewed.certificate, server.certificate);

    for name in ["authority", "identity-ps"] {
        let path = site.folder.path().join("authority").join(name);
        assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600, "{name}");
    }
    let printed = token.to_text().expect("prints");
    let files = RealFiles::new(site.folder.path());
    for name in files.list_files("authority/tokens").expect("lists") {
        let stored = files.read(&format!("authority/tokens/{name}")).expect("reads");
        assert!(!contains_secret(&stored, &printed), "{name} holds the secret itself");
    }

    let path = site.folder.path().join("authority/authority");
    let mut bytes = std::fs::read(&path).expect("reads");
    bytes[40] ^= 1;
    std::fs::write(&path, bytes).expect("writes");
    let damaged = link::Authority::open(Arc::new(files), site.clock.clone(), Arc::new(SystemEntropy), "authority");
    assert!(matches!(damaged.err(), Some(link::AuthorityError::Damaged { .. })));
}

#[test]
fn a_peer_renews_its_certificate_while_it_is_accepted() {
    let site = Site::new();
    let token = site.token_for(Role::RecoveryHost, None);
    let host = site.join("host", &token).expect("joins");
    assert!(!host.is_due(site.clock.wall()));
    site.clock.advance_days(61);
    assert!(host.is_due(site.clock.wall()));
    let renew = |identity: &LinkIdentity| site.connector(identity).renew(&site.address(), &ANY_SERVER);
    let renewed = renew(&host).expect("renewed");
    assert_eq!((renewed.peer, renewed.key.public()), (host.peer, host.key.public()));
    assert!(!renewed.is_due(site.clock.wall()));
    site.connect(&renewed).expect("it is accepted");
    site.clock.advance_days(200);
    let again = renew(&renewed).expect("the grace is for renewing");
    site.authority.deny(again.peer).expect("denied");
    let denied = renew(&again).expect_err("removed");
    assert!(matches!(denied, JoinError::Link(_) | JoinError::Refused(JoinRefusal::Denied)), "{denied:?}");
    // A server's certificate is not given out by renewing.
    let server = site.authority.own_identity(Role::ProcessServer).expect("kept");
    assert!(matches!(renew(&server), Err(JoinError::Refused(JoinRefusal::BadRequest))));
}

#[test]
fn a_certificate_is_due_in_the_last_third_of_its_life() {
    let site = Site::new();
    let short = open_authority(site.folder.path(), &site.clock).with_lifetime(Duration::from_secs(90));
    let made = short.own_identity(Role::MasterTarget).expect("an identity");
    let (now, second) = (site.clock.wall().seconds(), world::WallTime::from_seconds);
    assert_eq!((made.due(), made.ends()), (second(now + 60), second(now + 90)));
    assert!(!made.is_due(second(now + 59)) && made.is_due(second(now + 60)));
    assert!(!made.has_ended(second(now + 90)) && made.has_ended(second(now + 91)));
    let usual = site.agent("usual");
    assert_eq!(usual.due().seconds(), now + 60 * 86_400);
    assert_eq!(usual.accepted_until().seconds(), now + 270 * 86_400);
}

#[test]
fn a_listener_shows_a_renewed_certificate_without_closing() {
    let site = Site::new();
    let agent = site.agent("a");
    site.clock.advance_days(89);
    let renewed = site.authority.own_identity(Role::ProcessServer).expect("renewed");
    // Half a year later the first one would be refused.
    site.listener.set_identity(&renewed).expect("shown");
    let agent = site.connector(&agent).renew(&site.address(), &ANY_SERVER).expect("renewed");
    site.clock.advance_days(200);
    site.connect(&agent).expect("the server's certificate is good still");
    site.accept();
}

/// Whether `stored` holds the 32 secret bytes of the printed token, which start 50 bytes into it.
fn contains_secret(stored: &[u8], printed: &str) -> bool {
    const ALPHABET: &[u8] = b"abcdefghijklmnopqrstuvwxyz234567";
    let digits = printed.strip_prefix("farshore-join-").expect("a token");
    let bits: String = digits
        .bytes()
        .map(|digit| format!("{:05b}", ALPHABET.iter().position(|known| *known == digit).expect("a digit")))
        .collect();
    let bytes: Vec<u8> = bits
        .as_bytes()
        .chunks_exact(8)
        .map(|bits| u8::from_str_radix(std::str::from_utf8(bits).expect("bits"), 2).expect("bits"))
        .collect();
    stored.windows(32).any(|window| window == &bytes[50..82])
}

#[test]
fn requests_that_are_not_signed_by_their_key_get_nothing() {
    let site = Site::new();
    let token = site.token();
    let mut request = PrivateKey::generate(&SystemEntropy).certificate_request().expect("a request");
    let last = request.len() - 1;
    request[last] ^= 1;
    let refused = site.authority.admit(&link::join::JoinRequest::new(&token, request));
    assert_eq!(refused, Err(JoinRefusal::BadRequest));
    assert_eq!(
        site.authority.admit(&link::join::JoinRequest::new(&token, vec![0x30; 99])),
        Err(JoinRefusal::BadRequest)
    );
    site.join("a", &token).expect("the token was not used up");
}

#[test]
fn nothing_secret_is_shown_by_debug() {
    let site = Site::new();
    let agent = site.agent("a");
    let files = RealFiles::new(site.folder.path());
    let stored = files.read("machines/a").expect("reads");
    // magic 8, kind, version, count, length 4, identity 17, length 4: then the seed.
    let seed = &stored[36..68];
    assert_eq!(agent.key.public(), ring_public(seed), "the offset is right");
    let hex: String = seed.iter().map(|byte| format!("{byte:02x}")).collect();
    let list = format!("{seed:?}");
    for shown in [format!("{agent:?}"), format!("{:?}", site.authority.trust())] {
        assert!(!shown.contains(&hex) && !shown.contains(list.trim_matches(['[', ']'])), "{shown}");
    }
}

fn ring_public(seed: &[u8]) -> link::PublicKey {
    use ring::signature::KeyPair as _;
    let pair = ring::signature::Ed25519KeyPair::from_seed_unchecked(seed).expect("a seed");
    link::PublicKey(pair.public_key().as_ref().try_into().expect("32 bytes"))
}

#[test]
fn a_server_without_admission_takes_no_joins() {
    let site = Site::new();
    let identity = site.authority.own_identity(Role::ProcessServer).expect("kept");
    let reception = link::Reception::new(identity, site.authority.trust(), None, site.clock.clone());
    let listener = link::Listener::bind(&site.runtime, "127.0.0.1:0", reception).expect("listens");
    let files = RealFiles::new(site.folder.path());
    let token = at(site.token(), &[&listener.address().to_string()]);
    let plan = JoinPlan {
        files: &files,
        path: "machines/a",
        clock: site.clock.clone(),
        entropy: &SystemEntropy,
        addresses: &[],
    };
    let error = join(&site.runtime, &plan, &token).expect_err("no joins here");
    assert!(matches!(&error, JoinError::Link(LinkError::RefusedByPeer(PeerRefusal::Protocol))), "{error:?}");
}
