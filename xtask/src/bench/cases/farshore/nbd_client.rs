//! As much of an NBD client as writing and reading blocks takes. This program has no dependency on the product's crates, so that it
//! compiles fast; the protocol is that of the NetworkBlockDevice project (`doc/proto.md`).

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, ensure};

const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
/// Fixed newstyle, and no padding behind the size.
const CLIENT_FLAGS: u32 = 3;
const OPT_EXPORT_NAME: u32 = 1;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
/// Requests under way at once, like an application with a queue.
const DEPTH: usize = 16;

/// A connection to an export.
pub(super) struct NbdClient {
    stream: UnixStream,
    under_way: usize,
}

impl NbdClient {
    pub(super) fn connect(socket: &Path, export: &str) -> Result<NbdClient> {
        let mut stream = UnixStream::connect(socket).context("cannot connect to the disk")?;
        let mut hello = [0; 18];
        stream.read_exact(&mut hello)?;
        ensure!(hello.get(8..16) == Some(OPTION_MAGIC), "the server does not speak NBD");
        let mut choice = CLIENT_FLAGS.to_be_bytes().to_vec();
        choice.extend(OPTION_MAGIC);
        choice.extend(OPT_EXPORT_NAME.to_be_bytes());
        choice.extend(u32::try_from(export.len())?.to_be_bytes());
        choice.extend(export.as_bytes());
        stream.write_all(&choice)?;
        let mut size_and_flags = [0; 10];
        stream.read_exact(&mut size_and_flags).context("the server does not have this export")?;
        Ok(NbdClient { stream, under_way: 0 })
    }

    /// Writes a block; it may not be acknowledged yet on return.
    pub(super) fn write(&mut self, offset: u64, block: &[u8]) -> Result<()> {
        if self.under_way == DEPTH {
            self.reply()?;
        }
        self.request(WRITE, offset, u32::try_from(block.len())?, block)
    }

    /// Reads `len` bytes at each of `offsets`, `depth` requests at a time.
    pub(super) fn read_each(&mut self, offsets: impl Iterator<Item = u64>, len: u64, depth: usize) -> Result<()> {
        let mut buffer = vec![0; usize::try_from(len)?];
        let mut offsets = offsets.fuse();
        loop {
            let next = offsets.next();
            if let Some(offset) = next {
                self.request(READ, offset, u32::try_from(len)?, &[])?;
            }
            if next.is_none() && self.under_way == 0 {
                return Ok(());
            }
            if next.is_none() || self.under_way == depth {
                self.reply()?;
                self.stream.read_exact(&mut buffer).context("the disk is gone")?;
            }
        }
    }

    /// Waits for all writes, and until they are durable.
    pub(super) fn flush(&mut self) -> Result<()> {
        while self.under_way > 0 {
            self.reply()?;
        }
        self.request(FLUSH, 0, 0, &[])?;
        self.reply()
    }

    fn request(&mut self, command: u16, offset: u64, len: u32, data: &[u8]) -> Result<()> {
        let mut request = REQUEST_MAGIC.to_be_bytes().to_vec();
        request.extend([0; 2]);
        request.extend(command.to_be_bytes());
        request.extend(0_u64.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(len.to_be_bytes());
        request.extend(data);
        self.under_way += 1;
        self.stream.write_all(&request).context("the disk is gone")
    }

    fn reply(&mut self) -> Result<()> {
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply).context("the disk is gone")?;
        self.under_way -= 1;
        ensure!(reply[..4] == REPLY_MAGIC.to_be_bytes(), "the server's reply makes no sense");
        ensure!(reply[4..8] == [0; 4], "the disk refused a request: error {:?}", &reply[4..8]);
        Ok(())
    }
}
