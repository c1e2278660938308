//! Serves an image file or block device on a unix socket until standard input ends.
//!
//! `cargo run --release -p nbd --example serve_file -- DISK SOCKET`

use std::io::Read;
use std::sync::Arc;

use nbd::{DeviceExport, ExportTable, Listen, Server, ServerOptions};
use world::{Access, FileDevice};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(disk), Some(socket)) = (arguments.next(), arguments.next()) else {
        return Err("usage: serve_file DISK SOCKET".into());
    };
    let exports = ExportTable::new();
    exports.insert("disk", Arc::new(DeviceExport::new(Arc::new(FileDevice::open(disk, Access::ReadWrite)?))));
    let server = Server::start(Arc::new(exports), ServerOptions::default(), &[Listen::Unix(socket.into())])?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    server.stop();
    Ok(())
}
