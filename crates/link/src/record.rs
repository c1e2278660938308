//! The form of everything small that this crate stores or says during a join: a checked list of byte fields.
//!
//! ```text
//! "FSHRLINK"  kind u8  version u8  count u8  { length u32 LE  bytes }*  checksum: BLAKE3 of all before, first 16 bytes
//! ```

use world::WallTime;
use zeroize::Zeroizing;

use crate::limits::FIELD_BYTES_MAX;

const MAGIC: &[u8; 8] = b"FSHRLINK";
const VERSION: u8 = 1;
const CHECKSUM_BYTES: usize = 16;

/// What a record is. A record is never read as another kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Authority = 1,
    Identity = 2,
    PendingKey = 3,
    TokenIssued = 4,
    TokenUsed = 5,
    Denied = 6,
    JoinRequest = 16,
    JoinAnswer = 17,
}

/// Why bytes are not the record asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RecordError {
    #[error("it is not a record of this product")]
    Foreign,
    #[error("its format version {0} is not known to this program")]
    Version(u8),
    #[error("it is damaged")]
    Damaged,
}

/// The record's bytes. Wiped when dropped, since some fields are secret.
pub(crate) fn encode(kind: Kind, fields: &[&[u8]]) -> Zeroizing<Vec<u8>> {
    let len: usize = fields.iter().map(|field| 4 + field.len()).sum();
    // Exact capacity: growing would leave copies of secrets behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAGIC.len() + 3 + len + CHECKSUM_BYTES));
    bytes.extend_from_slice(MAGIC);
    let count = u8::try_from(fields.len()).expect("records have a handful of fields");
    bytes.extend_from_slice(&[kind as u8, VERSION, count]);
    for field in fields {
        assert!(field.len() <= FIELD_BYTES_MAX, "a field of {} bytes is a mistake of the caller", field.len());
        bytes.extend_from_slice(&(field.len() as u32).to_le_bytes());
        bytes.extend_from_slice(field);
    }
    let checksum = blake3::hash(&bytes);
    bytes.extend_from_slice(&checksum.as_bytes()[..CHECKSUM_BYTES]);
    bytes
}

/// The `N` fields of a record of `kind`.
pub(crate) fn decode<const N: usize>(kind: Kind, bytes: &[u8]) -> Result<[&[u8]; N], RecordError> {
    let header = MAGIC.len() + 3;
    if bytes.len() < header + CHECKSUM_BYTES || &bytes[..MAGIC.len()] != MAGIC || bytes[MAGIC.len()] != kind as u8 {
        return Err(RecordError::Foreign);
    }
    if bytes[MAGIC.len() + 1] != VERSION {
        return Err(RecordError::Version(bytes[MAGIC.len() + 1]));
    }
    let (body, checksum) = bytes.split_at(bytes.len() - CHECKSUM_BYTES);
    if blake3::hash(body).as_bytes()[..CHECKSUM_BYTES] != *checksum || usize::from(body[header - 1]) != N {
        return Err(RecordError::Damaged);
    }
    let mut rest = &body[header..];
    let mut fields = [&[][..]; N];
    for field in &mut fields {
        let (length, after) = rest.split_first_chunk::<4>().ok_or(RecordError::Damaged)?;
        let length = u32::from_le_bytes(*length) as usize;
        if length > FIELD_BYTES_MAX || length > after.len() {
            return Err(RecordError::Damaged);
        }
        (*field, rest) = after.split_at(length);
    }
    if rest.is_empty() { Ok(fields) } else { Err(RecordError::Damaged) }
}

/// A field that holds seconds since 1970. A time that no clock can show is not taken for an earlier one.
pub(crate) fn time(field: &[u8]) -> Result<WallTime, RecordError> {
    let seconds = number(field)?;
    Some(WallTime::from_seconds(seconds)).filter(|time| time.seconds() == seconds).ok_or(RecordError::Damaged)
}

/// `bytes` with their last bytes made the checksum of the rest, so that a fuzzer gets past it.
#[cfg(any(test, fuzzing))]
pub(crate) fn reseal(bytes: &[u8]) -> Vec<u8> {
    let body = &bytes[..bytes.len().saturating_sub(CHECKSUM_BYTES)];
    [body, &blake3::hash(body).as_bytes()[..CHECKSUM_BYTES]].concat()
}

/// A field of a fixed size.
pub(crate) fn fixed<const N: usize>(field: &[u8]) -> Result<[u8; N], RecordError> {
    field.try_into().map_err(|_| RecordError::Damaged)
}

/// A field that holds a number.
pub(crate) fn number(field: &[u8]) -> Result<u64, RecordError> {
    fixed(field).map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_was_encoded_is_decoded_and_any_changed_byte_is_noticed(
            a in proptest::collection::vec(any::<u8>(), 0..64),
            b in proptest::collection::vec(any::<u8>(), 0..64),
            at in any::<prop::sample::Index>(),
            flip in 1u8..,
        ) {
            let mut bytes = encode(Kind::Identity, &[&a, &b]).to_vec();
            prop_assert_eq!(decode::<2>(Kind::Identity, &bytes), Ok([&a[..], &b[..]]));
            prop_assert_eq!(decode::<2>(Kind::Authority, &bytes), Err(RecordError::Foreign));
            prop_assert!(decode::<1>(Kind::Identity, &bytes).is_err());
            prop_assert!(decode::<2>(Kind::Identity, &bytes[..at.index(bytes.len())]).is_err());
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert!(decode::<2>(Kind::Identity, &bytes).is_err());
        }

        #[test]
        fn garbage_with_a_right_checksum_never_panics(body in proptest::collection::vec(any::<u8>(), 0..64), n in 0u8..4) {
            let mut bytes = MAGIC.to_vec();
            bytes.extend_from_slice(&[Kind::JoinRequest as u8, VERSION, n]);
            bytes.extend_from_slice(&body);
            let checksum = blake3::hash(&bytes);
            bytes.extend_from_slice(&checksum.as_bytes()[..CHECKSUM_BYTES]);
            if let Ok(fields) = decode::<3>(Kind::JoinRequest, &bytes) {
                prop_assert_eq!(fields.iter().map(|f| f.len() + 4).sum::<usize>(), body.len());
            }
        }
    }
}
