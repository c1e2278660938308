//! Bytes as a script of events: what a fuzzer changes is what happens, never whether it can be read.

use bytes::Bytes;

use crate::wire::Message;

/// A script. Read to its end it gives zeroes.
pub(super) struct Script<'a> {
    bytes: &'a [u8],
}

impl<'a> Script<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Script<'a> {
        Script { bytes }
    }

    pub(super) fn is_over(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(super) fn u8(&mut self) -> u8 {
        match self.bytes.split_first() {
            Some((&first, rest)) => {
                self.bytes = rest;
                first
            }
            None => 0,
        }
    }

    pub(super) fn u16(&mut self) -> u16 {
        u16::from(self.u8()) << 8 | u16::from(self.u8())
    }

    pub(super) fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.bytes.split_at(count.min(self.bytes.len()));
        self.bytes = rest;
        taken
    }

    /// A position near `near`, at the edge of a generation, or far away.
    pub(super) fn position(&mut self, near: u64) -> u64 {
        match self.u8() {
            0..=191 => near,
            192..=215 => near.saturating_add(u64::from(self.u8())),
            216..=239 => near.saturating_sub(u64::from(self.u8())),
            240..=244 => ((near >> 44) + 1) << 44,
            245..=247 => near | ((1 << 44) - 1),
            248..=249 => u64::MAX,
            _ => u64::from(self.u16()) << (self.u8() % 49),
        }
    }
}

/// What a peer's message is once it has come over the wire; none if nobody could send it.
pub(super) fn over_the_wire(message: &Message) -> Option<Message> {
    let frame = message.encode();
    Message::decode(frame.kind, frame.body()).ok()
}

/// A message as raw bytes: kind and body.
pub(super) fn raw(script: &mut Script<'_>) -> Option<Message> {
    let (kind, len) = (script.u8(), usize::from(script.u16()));
    Message::decode(kind, Bytes::copy_from_slice(script.take(len))).ok()
}
