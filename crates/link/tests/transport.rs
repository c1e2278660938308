//! Frames over TLS: order, back pressure, endings, and what strangers can do to the port.

mod site;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use link::{Connection, Frame, FrameLink, LinkError, TrySend};
use site::{SOON, Site};

/// A body that says which frame it is and cannot be mistaken for another.
fn body(number: u64, len: usize) -> Bytes {
    let mut bytes = Vec::with_capacity(len);
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes.into()
}

fn length(number: u64) -> usize {
    [0, 1, 5, 4095, 4096, 16_384, 70_000, 262_139, 262_144, 1_048_576, 3_000_001, 8 * 1024 * 1024][number as usize % 12]
}

#[test]
fn large_frames_flow_both_ways_while_both_sides_press() {
    let site = Site::new();
    let (a, b) = site.connected();
    const FRAMES: u64 = 60;
    let send = |link: &Connection| {
        for number in 0..FRAMES {
            let whole = body(number, length(number));
            // In pieces, to see that they arrive as one.
            let middle = whole.len() / 3;
            let frame = Frame::from_parts(number as u8, [whole.slice(..middle), whole.slice(middle..)]);
            link.send(frame).expect("open");
        }
    };
    let receive = |link: &Connection| {
        for number in 0..FRAMES {
            if number % 16 == 0 {
                // Lets the queues, the sockets and the other side fill up.
                std::thread::sleep(Duration::from_millis(30));
            }
            let frame = link.recv(SOON).expect("open").expect("in time");
            assert_eq!(frame.kind(), number as u8);
            assert!(frame.into_body() == body(number, length(number)), "frame {number} differs");
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| send(&a));
        scope.spawn(|| send(&b));
        scope.spawn(|| receive(&a));
        scope.spawn(|| receive(&b));
    });
}

#[test]
fn a_full_link_blocks_its_sender_and_holds_no_more_than_its_bounds() {
    let site = Site::new();
    let (a, b) = site.connected();
    let frame = Frame::new(1, vec![7; 1024 * 1024]);
    let mut taken = 0;
    let quiet_since = AtomicU64::new(0);
    let start = Instant::now();
    // Until nothing was taken for half a second: queues and kernel buffers are full.
    while start.elapsed().as_millis() as u64 - quiet_since.load(Ordering::Relaxed) < 500 {
        match a.try_send(frame.clone()).expect("open") {
            TrySend::Sent => {
                taken += 1;
                quiet_since.store(start.elapsed().as_millis() as u64, Ordering::Relaxed);
            }
            TrySend::Full(back) => {
                assert_eq!(back, frame);
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        assert!(taken < 64, "nothing bounds the link");
    }
    std::thread::scope(|scope| {
        let blocked = scope.spawn(|| a.send(frame.clone()));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!blocked.is_finished(), "there is no room");
        for _ in 0..=taken {
            assert_eq!(b.recv(SOON).expect("open").as_ref(), Some(&frame));
        }
        blocked.join().expect("no panic").expect("room now");
    });
    assert!(b.try_recv().expect("open").is_none(), "nothing was sent twice");
}

#[test]
fn closing_delivers_everything_sent_before() {
    let site = Site::new();
    let (a, b) = site.connected();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..200 {
                a.send(Frame::new(2, body(number, 50_000))).expect("open");
            }
            a.close(SOON).expect("everything was taken");
            assert!(a.send(Frame::new(2, "late")).is_err());
        });
        for number in 0..200 {
            let frame = b.recv(SOON).expect("open").expect("in time");
            assert!(frame.into_body() == body(number, 50_000), "frame {number} differs");
        }
        assert!(matches!(b.recv(SOON), Err(LinkError::PeerClosed)));
        assert!(matches!(b.send(Frame::new(2, "late")), Err(LinkError::PeerClosed)));
    });
}

#[test]
fn closing_waits_no_longer_than_it_may() {
    let site = Site::new();
    let (a, b) = site.connected();
    let frame = Frame::new(1, vec![7; 1024 * 1024]);
    let mut refused = 0;
    while refused < 300 {
        match a.try_send(frame.clone()).expect("open") {
            TrySend::Sent => refused = 0,
            TrySend::Full(_) => {
                refused += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
    assert!(matches!(a.close(Duration::from_millis(200)), Err(LinkError::TimedOut { .. })));
    // The peer gets what had left, then learns that it is not all.
    let end = loop {
        match b.recv(SOON) {
            Ok(frame) => assert!(frame.is_some(), "the end was noticed"),
            Err(end) => break end,
        }
    };
    assert!(matches!(end, LinkError::Lost { .. }), "{end:?}");
}

#[test]
fn a_crashed_peer_is_a_lost_connection() {
    let site = Site::new();
    let (a, b) = site.connected();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| b.recv(Duration::from_secs(60)));
        drop(a);
        let end = waiting.join().expect("no panic");
        assert!(matches!(end, Err(LinkError::Lost { .. })), "{end:?}");
    });
}

#[test]
fn the_end_of_the_runtime_wakes_blocked_threads() {
    let folder = Site::new();
    let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("threads");
    let given = link::LinkRuntime::from_handle(tokio.handle().clone());
    let agent = folder.agent("a");
    let trust = link::Trust::new(agent.authority.clone(), folder.clock.clone(), Default::default());
    let connector = link::Connector::new(given, agent, trust, folder.clock.clone());
    let a = connector.connect(&folder.address(), &site::ANY_SERVER).expect("connects");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| a.recv(Duration::from_secs(60)));
        tokio.shutdown_background();
        assert!(matches!(waiting.join().expect("no panic"), Err(LinkError::Closed)));
    });
}

#[test]
fn frames_that_may_not_be_sent_do_not_end_the_link() {
    let site = Site::new();
    let (a, b) = site.connected();
    let large = Frame::new(1, vec![0; link::limits::FRAME_BYTES_MAX + 1]);
    assert!(matches!(a.send(large), Err(LinkError::FrameTooLarge { len: 8_388_609, .. })));
    assert!(matches!(a.send(Frame::new(0xff, "")), Err(LinkError::ReservedKind(0xff))));
    a.send(Frame::new(1, "fine")).expect("open");
    assert_eq!(b.recv(SOON).expect("open"), Some(Frame::new(1, "fine")));
}

/// Waits until the listener has got rid of every stranger.
fn until_no_strangers(site: &Site) {
    let start = Instant::now();
    while site.listener.strangers() > 0 {
        assert!(start.elapsed() < SOON, "{} strangers are still there", site.listener.strangers());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn random_bytes_at_the_port_harm_nobody() {
    let site = Site::new();
    let agent = site.agent("a");
    for number in 0..60 {
        let mut stream = TcpStream::connect(site.listener.address()).expect("connects");
        let mut bytes = body(number, 1 + length(number) % 20_000).to_vec();
        if number % 3 == 1 {
            // The header of a TLS handshake record, so that the bytes get further.
            bytes.splice(0..0, [22, 3, 1, 0x3f, 0xff, 1, 0, 0x3f, 0xfb, 3, 3]);
        } else if number % 3 == 2 {
            bytes.splice(0..0, [22, 3, 3, 0, 4, 1, 0, 0, 200]);
        }
        // The server may have hung up already.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        stream.set_read_timeout(Some(SOON)).expect("sets");
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.len() < 100, "a stranger gets an alert at most, not {} bytes", answer.len());
    }
    until_no_strangers(&site);
    drop((site.connect(&agent).expect("the port still works"), site.accept()));
}

#[test]
fn who_dawdles_in_the_handshake_is_dropped_and_holds_nobody_up() {
    let site = Site::with_handshake_timeout(Duration::from_millis(400));
    let agent = site.agent("a");
    let mut slow: Vec<TcpStream> =
        (0..20).map(|_| TcpStream::connect(site.listener.address()).expect("connects")).collect();
    let start = Instant::now();
    // A handshake header, and then one byte at a time, more often than any time-out between bytes would notice.
    let mut dropped = 0;
    for stream in &mut slow {
        stream.write_all(&[22, 3, 1, 0x10, 0, 1, 0, 0x0f, 0xfc, 3, 3]).expect("writes");
    }
    drop((site.connect(&agent).expect("others are served meanwhile"), site.accept()));
    while dropped < slow.len() {
        assert!(start.elapsed() < SOON, "{} of {} dawdlers were dropped", dropped, slow.len());
        std::thread::sleep(Duration::from_millis(20));
        dropped = slow.iter_mut().filter_map(|stream| stream.write_all(&[0]).err()).count();
    }
    assert!(start.elapsed() >= Duration::from_millis(300), "they had their time");
    until_no_strangers(&site);
}

#[test]
fn dropping_the_listener_closes_the_port_and_ends_handshakes_but_not_connections() {
    let site = Site::new();
    let (a, b) = site.connected();
    let mut stranger = TcpStream::connect(site.listener.address()).expect("connects");
    let address = site.listener.address();
    let Site { listener, folder: _folder, .. } = site;
    drop(listener);
    stranger.set_read_timeout(Some(SOON)).expect("sets");
    assert!(matches!(stranger.read(&mut [0; 8]), Ok(0) | Err(_)), "hung up");
    let start = Instant::now();
    while TcpStream::connect(address).is_ok() {
        assert!(start.elapsed() < SOON, "the port is still open");
    }
    a.send(Frame::new(1, "still here")).expect("open");
    assert_eq!(b.recv(SOON).expect("open"), Some(Frame::new(1, "still here")));
}

#[test]
fn too_many_waiting_connections_are_told_that_the_server_is_busy() {
    let site = Site::new();
    let agent = site.agent("a");
    let held: Vec<Connection> =
        (0..link::limits::ACCEPT_QUEUE_MAX).map(|_| site.connect(&agent).expect("room")).collect();
    let error = site.connect(&agent).expect_err("full");
    assert!(matches!(&error, LinkError::RefusedByPeer(link::PeerRefusal::Busy)) && error.is_transient(), "{error:?}");
    site.accept();
    site.connect(&agent).expect("room again");
    drop(held);
}
