//! One-time join tokens: what an operator copies from the server to a machine that is to be enrolled.
//!
//! Printed form: `farshore-join-` and base 32 (RFC 4648 alphabet, lower case, no padding) of
//! ```text
//! version u8 = 1  role u8  expires u64 LE (seconds since 1970)  authority fingerprint [32]  token id [8]
//! secret [32]  address count u8  { length u8  text }*  checksum: BLAKE3 of all before, first 4 bytes
//! ```
//! The checksum only catches slips of copying. White space and upper case are forgiven.

use std::fmt;

use world::WallTime;
use zeroize::Zeroizing;

use crate::identity::Role;
use crate::limits::{ADDRESS_BYTES_MAX, TOKEN_ADDRESSES_MAX, TOKEN_CHARS_MAX};
use crate::record;

const PREFIX: &str = "farshore-join-";
const VERSION: u8 = 1;
const FIXED_BYTES: usize = 1 + 1 + 8 + 32 + 8 + 32 + 1;
const CHECKSUM_BYTES: usize = 4;

/// Why a text is not a join token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It does not begin as a token does, or is far too long.
    #[error("this is not a join token: it does not begin with \"farshore-join-\"")]
    NotAToken,
    /// It was changed while being copied.
    #[error("the join token is incomplete or mistyped; copy it again as a whole")]
    Mistyped,
    /// It was made by a newer program.
    #[error("the join token has format version {0}, which this program does not know; upgrade it")]
    Version(u8),
    /// It has more or longer addresses than a token can carry.
    #[error(
        "a token carries at most {TOKEN_ADDRESSES_MAX} addresses of 1 to {ADDRESS_BYTES_MAX} characters without spaces"
    )]
    Addresses,
}

/// A join token. Holds a secret; `Debug` does not show it and [`JoinToken::to_text`] is the only way to print it.
#[derive(Clone)]
pub struct JoinToken {
    /// What the machine that joins will be.
    pub role: Role,
    /// When the token ends, by the server's clock.
    pub expires: WallTime,
    /// BLAKE3 of the authority's certificate, by which the server is known.
    pub fingerprint: [u8; 32],
    /// The token's public name.
    pub id: [u8; 8],
    /// Where the server may be reached, `host:port`. May be empty.
    pub addresses: Vec<String>,
    pub(crate) secret: Zeroizing<[u8; 32]>,
}

impl JoinToken {
    /// The printed form. Wiped when dropped.
    ///
    /// # Errors
    /// [`TokenError::Addresses`] if the addresses do not fit a token.
    pub fn to_text(&self) -> Result<Zeroizing<String>, TokenError> {
        check_addresses(&self.addresses)?;
        let text: usize = self.addresses.iter().map(|address| 1 + address.len()).sum();
        let mut bytes = Zeroizing::new(Vec::with_capacity(FIXED_BYTES + text));
        bytes.extend_from_slice(&[VERSION, self.role.code()]);
        bytes.extend_from_slice(&self.expires.seconds().to_le_bytes());
        bytes.extend_from_slice(&self.fingerprint);
        bytes.extend_from_slice(&self.id);
        bytes.extend_from_slice(&*self.secret);
        bytes.push(self.addresses.len() as u8);
        for address in &self.addresses {
            bytes.push(address.len() as u8);
            bytes.extend_from_slice(address.as_bytes());
        }
        Ok(print_bytes(&bytes))
    }

    /// The token that `text` prints.
    ///
    /// # Errors
    /// See [`TokenError`]; never panics, whatever the text.
    pub fn parse(text: &str) -> Result<JoinToken, TokenError> {
        JoinToken::from_bytes(&read_bytes(text)?)
    }

    fn from_bytes(body: &[u8]) -> Result<JoinToken, TokenError> {
        let mut rest = Fields { rest: body };
        let [version] = rest.take()?;
        if version != VERSION {
            return Err(TokenError::Version(version));
        }
        let [role] = rest.take()?;
        let role = Role::from_code(role).ok_or(TokenError::Mistyped)?;
        let expires = record::time(&rest.take::<8>()?).map_err(|_| TokenError::Mistyped)?;
        let fingerprint = rest.take()?;
        let id = rest.take()?;
        let secret = Zeroizing::new(rest.take()?);
        let [count] = rest.take()?;
        let mut addresses = Vec::new();
        for _ in 0..count {
            let [len] = rest.take()?;
            let text = rest.slice(usize::from(len))?;
            addresses.push(std::str::from_utf8(text).map_err(|_| TokenError::Mistyped)?.to_owned());
        }
        if !rest.rest.is_empty() {
            return Err(TokenError::Mistyped);
        }
        check_addresses(&addresses)?;
        Ok(JoinToken { role, expires, fingerprint, id, addresses, secret })
    }
}

/// The printed form of a token's bytes, with their checksum.
pub(crate) fn print_bytes(body: &[u8]) -> Zeroizing<String> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(body.len() + CHECKSUM_BYTES));
    bytes.extend_from_slice(body);
    bytes.extend_from_slice(&blake3::hash(body).as_bytes()[..CHECKSUM_BYTES]);
    let mut text = Zeroizing::new(String::with_capacity(PREFIX.len() + bytes.len().div_ceil(5) * 8));
    text.push_str(PREFIX);
    base32_encode(&bytes, &mut text);
    text
}

/// The bytes that `text` prints, whose checksum was right.
pub(crate) fn read_bytes(text: &str) -> Result<Zeroizing<Vec<u8>>, TokenError> {
    if text.len() > TOKEN_CHARS_MAX {
        return Err(TokenError::NotAToken);
    }
    let mut clean = Zeroizing::new(String::with_capacity(text.len()));
    clean.extend(text.chars().filter(|c| !c.is_whitespace()).map(|c| c.to_ascii_lowercase()));
    let digits = clean.strip_prefix(PREFIX).ok_or(TokenError::NotAToken)?;
    let bytes = base32_decode(digits).ok_or(TokenError::Mistyped)?;
    let (body, checksum) = bytes.split_last_chunk::<CHECKSUM_BYTES>().ok_or(TokenError::Mistyped)?;
    if blake3::hash(body).as_bytes()[..CHECKSUM_BYTES] != *checksum {
        return Err(TokenError::Mistyped);
    }
    Ok(Zeroizing::new(body.to_vec()))
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken")
            .field("role", &self.role)
            .field("expires", &self.expires)
            .field("fingerprint", &hex(&self.fingerprint))
            .field("id", &hex(&self.id))
            .field("addresses", &self.addresses)
            .finish_non_exhaustive()
    }
}

pub(crate) fn check_addresses(addresses: &[String]) -> Result<(), TokenError> {
    let fits = |address: &String| {
        (1..=ADDRESS_BYTES_MAX).contains(&address.len())
            && !address.chars().any(|c| c.is_whitespace() || c.is_control())
    };
    if addresses.len() <= TOKEN_ADDRESSES_MAX && addresses.iter().all(fits) {
        Ok(())
    } else {
        Err(TokenError::Addresses)
    }
}

/// Bytes that are taken from the front.
struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], TokenError> {
        let (field, rest) = self.rest.split_first_chunk::<N>().ok_or(TokenError::Mistyped)?;
        self.rest = rest;
        Ok(*field)
    }

    fn slice(&mut self, len: usize) -> Result<&'a [u8], TokenError> {
        let (field, rest) = self.rest.split_at_checked(len).ok_or(TokenError::Mistyped)?;
        self.rest = rest;
        Ok(field)
    }
}

const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

fn base32_encode(bytes: &[u8], text: &mut String) {
    for chunk in bytes.chunks(5) {
        let mut bits = [0; 8];
        bits[3..3 + chunk.len()].copy_from_slice(chunk);
        let bits = u64::from_be_bytes(bits);
        for digit in 0..(chunk.len() * 8).div_ceil(5) {
            text.push(char::from(ALPHABET[(bits >> (35 - 5 * digit)) as usize & 31]));
        }
    }
}

/// `None` for anything that [`base32_encode`] does not write.
fn base32_decode(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(text.len() * 5 / 8));
    for chunk in text.as_bytes().chunks(8) {
        if matches!(chunk.len(), 1 | 3 | 6) {
            return None;
        }
        let mut bits = 0;
        for (position, digit) in chunk.iter().enumerate() {
            let value = ALPHABET.iter().position(|known| known == digit)? as u64;
            bits |= value << (35 - 5 * position);
        }
        let len = chunk.len() * 5 / 8;
        let all = bits.to_be_bytes();
        if all[3 + len..].iter().any(|byte| *byte != 0) {
            return None;
        }
        bytes.extend_from_slice(&all[3..3 + len]);
    }
    Some(bytes)
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn token(addresses: Vec<String>) -> JoinToken {
        JoinToken {
            role: Role::Agent,
            expires: WallTime::from_seconds(1_800_000_000),
            fingerprint: [3; 32],
            id: [4; 8],
            addresses,
            secret: Zeroizing::new([0x5e; 32]),
        }
    }

    #[test]
    fn base32_is_that_of_rfc_4648() {
        for (plain, digits) in
            [("", ""), ("f", "my"), ("fo", "mzxq"), ("foo", "mzxw6"), ("foob", "mzxw6yq"), ("fooba", "mzxw6ytb")]
        {
            let mut text = String::new();
            base32_encode(plain.as_bytes(), &mut text);
            assert_eq!(text, digits);
            assert_eq!(base32_decode(digits).expect("decodes").as_slice(), plain.as_bytes());
        }
        assert!(base32_decode("mz").is_none(), "bits beyond the last byte must be zero");
    }

    #[test]
    fn a_token_survives_wrapping_and_shouting_but_no_slip() {
        let text = token(vec!["ps.example:7443".into(), "[::1]:7443".into()]).to_text().expect("prints");
        let wrapped = format!("  {}\n {} ", &text[..60].to_uppercase(), &text[60..]);
        let parsed = JoinToken::parse(&wrapped).expect("parses");
        assert_eq!(parsed.to_text().expect("prints"), text);
        assert_eq!(parsed.addresses, ["ps.example:7443", "[::1]:7443"]);
        for at in PREFIX.len()..text.len() {
            let mut changed = text.as_bytes().to_vec();
            changed[at] = if changed[at] == b'a' { b'b' } else { b'a' };
            let changed = String::from_utf8(changed).expect("ASCII");
            assert_eq!(JoinToken::parse(&changed).expect_err("a slip"), TokenError::Mistyped, "at {at}");
            assert!(JoinToken::parse(&text[..at]).is_err());
        }
        assert_eq!(JoinToken::parse("hello").expect_err("no token"), TokenError::NotAToken);
    }

    #[test]
    fn debug_shows_no_secret() {
        let shown = format!("{:?}", token(Vec::new()));
        assert!(!shown.contains("5e5e") && !shown.contains("94, 94"), "{shown}");
    }

    #[test]
    fn too_many_or_odd_addresses_are_refused() {
        for addresses in [vec!["a:1".to_owned(); 9], vec!["x".repeat(256)], vec![String::new()], vec!["a b".to_owned()]]
        {
            assert_eq!(token(addresses).to_text().expect_err("too much"), TokenError::Addresses);
        }
    }

    proptest! {
        #[test]
        fn any_text_may_be_parsed(text in "(farshore-join-)?[a-z2-7]{0,200}\\PC{0,4}") {
            let _ = JoinToken::parse(&text);
        }

        #[test]
        fn any_bytes_with_a_right_checksum_may_be_parsed(
            version in prop_oneof![Just(1u8), any::<u8>()],
            role in prop_oneof![Just(1u8), any::<u8>()],
            rest in proptest::collection::vec(any::<u8>(), 60..160),
        ) {
            let mut body = vec![version, role];
            body.extend(rest);
            let checksum = blake3::hash(&body);
            body.extend_from_slice(&checksum.as_bytes()[..CHECKSUM_BYTES]);
            let mut text = PREFIX.to_owned();
            base32_encode(&body, &mut text);
            if let Ok(token) = JoinToken::parse(&text) {
                prop_assert_eq!(&*token.to_text().expect("prints"), &text);
            }
        }
    }
}
