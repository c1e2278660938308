//! A process server that forgets everything, for measuring the agent alone:
//! `cargo run --release -p agent --example discarding_server` prints a join token, then figures once a second.

use std::io::Write;
use std::time::Duration;

#[path = "../tests/site/mod.rs"]
mod site;

fn main() {
    let server = site::Server::start(true);
    println!("{}", *server.token().to_text().expect("the address fits a token"));
    let (mut heal, mut stream) = (0, 0);
    loop {
        std::thread::sleep(Duration::from_secs(1));
        let store = server.store();
        if (heal, stream) != (store.heal_bytes, store.stream_bytes) {
            let figures = format!(
                "heal {} MB/s, stream {} MB/s",
                (store.heal_bytes - heal) / 1_000_000,
                (store.stream_bytes - stream) / 1_000_000
            );
            // Whoever reads may have gone.
            let _ = writeln!(std::io::stdout(), "{figures}");
            (heal, stream) = (store.heal_bytes, store.stream_bytes);
        }
    }
}
