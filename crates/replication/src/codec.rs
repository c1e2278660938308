//! Reading and writing the explicit byte layouts of wire messages, journals and vault objects.
//!
//! All integers are little-endian; `varint` is LEB128. A [`Decoder`] works on bytes from outside: it never panics,
//! never allocates more than the input's own length, and every variable-length field names its limit.

use bytes::{Buf, Bytes};

/// Why bytes from outside could not be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The input ends inside a field.
    #[error("the input ends inside {field}")]
    Truncated {
        /// The field being read.
        field: &'static str,
    },
    /// A length or count is larger than its limit.
    #[error("{field} is {value}, the limit is {limit}")]
    TooLarge {
        /// The field being read.
        field: &'static str,
        /// The value found.
        value: u64,
        /// The largest value allowed.
        limit: u64,
    },
    /// A field holds a value that no version of the format defines.
    #[error("{field} has the undefined value {value}")]
    Undefined {
        /// The field being read.
        field: &'static str,
        /// The value found.
        value: u64,
    },
    /// A rule between fields is broken.
    #[error("{0}")]
    Inconsistent(&'static str),
    /// Bytes remain after the last field.
    #[error("{0} bytes follow the last field")]
    Trailing(usize),
}

/// Appends fields to a byte vector.
#[derive(Debug, Default, Clone)]
pub struct Encoder {
    bytes: Vec<u8>,
}

impl Encoder {
    /// An empty encoder.
    pub fn new() -> Encoder {
        Encoder::default()
    }

    /// An empty encoder with room for `capacity` bytes.
    pub fn with_capacity(capacity: usize) -> Encoder {
        Encoder { bytes: Vec::with_capacity(capacity) }
    }

    /// One byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes.push(value);
        self
    }

    /// Two bytes, little-endian.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Four bytes, little-endian.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Eight bytes, little-endian.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// LEB128: seven bits a byte, least significant first.
    pub fn varint(&mut self, mut value: u64) -> &mut Self {
        while value >= 0x80 {
            self.bytes.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.bytes.push(value as u8);
        self
    }

    /// Bytes of a length that the reader knows.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// A varint length, then the bytes.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.varint(bytes.len() as u64).raw(bytes)
    }

    /// A varint length, then UTF-8.
    pub fn text(&mut self, text: &str) -> &mut Self {
        self.bytes(text.as_bytes())
    }

    /// Bytes written so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing was written yet.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// What was written.
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// Takes fields off the front of a byte string.
#[derive(Debug, Clone)]
pub struct Decoder {
    rest: Bytes,
}

impl Decoder {
    /// Reads from `bytes`. Slices returned by [`Decoder::raw`] share its memory.
    pub fn new(bytes: impl Into<Bytes>) -> Decoder {
        Decoder { rest: bytes.into() }
    }

    /// Bytes not yet read.
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// One byte.
    pub fn u8(&mut self, field: &'static str) -> Result<u8, DecodeError> {
        self.need(1, field)?;
        Ok(self.rest.get_u8())
    }

    /// Two bytes, little-endian.
    pub fn u16(&mut self, field: &'static str) -> Result<u16, DecodeError> {
        self.need(2, field)?;
        Ok(self.rest.get_u16_le())
    }

    /// Four bytes, little-endian.
    pub fn u32(&mut self, field: &'static str) -> Result<u32, DecodeError> {
        self.need(4, field)?;
        Ok(self.rest.get_u32_le())
    }

    /// Eight bytes, little-endian.
    pub fn u64(&mut self, field: &'static str) -> Result<u64, DecodeError> {
        self.need(8, field)?;
        Ok(self.rest.get_u64_le())
    }

    /// LEB128. A value has exactly one accepted encoding: no more than ten bytes, no useless zero byte at the end.
    pub fn varint(&mut self, field: &'static str) -> Result<u64, DecodeError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8(field)?;
            if shift == 63 && byte > 1 || shift > 0 && byte == 0 {
                return Err(DecodeError::Undefined { field, value: u64::from(byte) });
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(DecodeError::Inconsistent("a varint is longer than ten bytes"))
    }

    /// A varint that must not exceed `limit`.
    pub fn varint_max(&mut self, field: &'static str, limit: u64) -> Result<u64, DecodeError> {
        let value = self.varint(field)?;
        if value > limit { Err(DecodeError::TooLarge { field, value, limit }) } else { Ok(value) }
    }

    /// A varint number of elements, each of which takes at least one byte of the input.
    pub fn count(&mut self, field: &'static str, limit: u64) -> Result<usize, DecodeError> {
        let count = self.varint_max(field, limit)?;
        if count > self.rest.len() as u64 {
            return Err(DecodeError::Truncated { field });
        }
        Ok(count as usize)
    }

    /// `N` bytes.
    pub fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], DecodeError> {
        self.need(N, field)?;
        let mut array = [0; N];
        self.rest.copy_to_slice(&mut array);
        Ok(array)
    }

    /// `len` bytes, sharing the input's memory.
    pub fn raw(&mut self, len: usize, field: &'static str) -> Result<Bytes, DecodeError> {
        self.need(len, field)?;
        Ok(self.rest.split_to(len))
    }

    /// A varint length of at most `limit`, then as many bytes, sharing the input's memory.
    pub fn bytes(&mut self, field: &'static str, limit: usize) -> Result<Bytes, DecodeError> {
        let len = self.varint_max(field, limit as u64)?;
        self.raw(len as usize, field)
    }

    /// A varint length of at most `limit` bytes, then UTF-8.
    pub fn text(&mut self, field: &'static str, limit: usize) -> Result<String, DecodeError> {
        String::from_utf8(self.bytes(field, limit)?.to_vec())
            .map_err(|_| DecodeError::Inconsistent("a text is not UTF-8"))
    }

    /// Confirms that everything was read.
    pub fn finish(self) -> Result<(), DecodeError> {
        if self.rest.is_empty() { Ok(()) } else { Err(DecodeError::Trailing(self.rest.len())) }
    }

    fn need(&self, len: usize, field: &'static str) -> Result<(), DecodeError> {
        if self.rest.len() < len { Err(DecodeError::Truncated { field }) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn fields_come_back_as_they_went_in(a: u8, b: u16, c: u32, d: u64, e: u64, f: Vec<u8>, g: String) {
            let mut encoder = Encoder::new();
            encoder.u8(a).u16(b).u32(c).u64(d).varint(e).bytes(&f).text(&g);
            let mut decoder = Decoder::new(encoder.finish());
            prop_assert_eq!(decoder.u8("a"), Ok(a));
            prop_assert_eq!(decoder.u16("b"), Ok(b));
            prop_assert_eq!(decoder.u32("c"), Ok(c));
            prop_assert_eq!(decoder.u64("d"), Ok(d));
            prop_assert_eq!(decoder.varint("e"), Ok(e));
            prop_assert_eq!(decoder.bytes("f", f.len()).expect("f").to_vec(), f);
            prop_assert_eq!(decoder.text("g", g.len()).expect("g"), g);
            prop_assert_eq!(decoder.finish(), Ok(()));
        }

        #[test]
        fn an_accepted_varint_is_the_only_encoding_of_its_value(bytes in prop::collection::vec(any::<u8>(), 0..12)) {
            let mut decoder = Decoder::new(bytes.clone());
            if let Ok(value) = decoder.varint("value") {
                let used = bytes.len() - decoder.remaining();
                let mut encoder = Encoder::new();
                encoder.varint(value);
                prop_assert_eq!(encoder.finish(), &bytes[..used]);
            }
        }
    }

    #[test]
    fn limits_are_named_in_the_error() {
        let mut decoder = Decoder::new(vec![200, 1]);
        let error = decoder.bytes("disk name", 100).expect_err("over the limit");
        assert_eq!(error.to_string(), "disk name is 200, the limit is 100");
    }
}
