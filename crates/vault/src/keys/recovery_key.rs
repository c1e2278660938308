//! The recovery key: 256 random bits, shown once as 24 pronounceable five-letter words, kept on paper.
//!
//! Each word is a *proquint* (consonant, vowel, consonant, vowel, consonant: 16 bits) that carries 11 bits of the key
//! and a 5-bit check. The check is a CRC, so every single wrong letter is caught in its own word, and it includes the
//! word's position, so swapped words are caught too. The words need no list, hence no language and no dictionary file.

use std::fmt;

use world::Entropy;
use zeroize::{Zeroize, ZeroizeOnDrop};

const CONSONANTS: &[u8; 16] = b"bdfghjklmnprstvz";
const VOWELS: &[u8; 4] = b"aiou";
/// Words of a key: 24 × 11 bits are the key's 256 bits and 8 bits of its hash.
const WORDS: usize = 24;
const WORD_DATA_BITS: usize = 11;

/// 256 bits that unlock the vault without the passphrase.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct RecoveryKey([u8; 32]);

/// A text is not a recovery key; says where it is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecoveryKeyError {
    /// Words are missing or there are too many.
    #[error("a recovery key has 24 words, {0} were given")]
    WrongCount(usize),
    /// One word was mistyped, or stands in another's place.
    #[error("word {position} ({word:?}) is mistyped or not in its place")]
    WrongWord {
        /// Which word, counted from 1.
        position: usize,
        /// What was typed.
        word: String,
    },
    /// Each word is well-formed but together they are no key that was ever shown.
    #[error("every word is well-formed but together they are not a recovery key: some belong to another key")]
    WrongTogether,
}

impl RecoveryKey {
    /// A new key.
    pub fn generate(entropy: &dyn Entropy) -> RecoveryKey {
        RecoveryKey(entropy.bytes())
    }

    pub(super) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 24 words, in four rows of six, as they are printed. The only way to see the key.
    pub fn to_words(&self) -> String {
        let mut bits = Bits { bytes: self.0.iter().copied().chain([self.checksum()]).collect() };
        let words: Vec<String> =
            (0..WORDS).map(|position| word(bits.get(position * WORD_DATA_BITS), position)).collect();
        bits.bytes.zeroize();
        words.chunks(6).map(|row| row.join(" ")).collect::<Vec<_>>().join("\n")
    }

    /// Reads what a person typed: any case, any separators.
    ///
    /// # Errors
    /// Says which word is wrong.
    pub fn parse(text: &str) -> Result<RecoveryKey, RecoveryKeyError> {
        let typed: Vec<String> = text
            .split(|letter: char| !letter.is_alphabetic())
            .filter(|word| !word.is_empty())
            .map(str::to_lowercase)
            .collect();
        if typed.len() != WORDS {
            return Err(RecoveryKeyError::WrongCount(typed.len()));
        }
        let mut bits = Bits { bytes: vec![0; 33] };
        for (position, typed) in typed.iter().enumerate() {
            let data = read_word(typed, position)
                .ok_or_else(|| RecoveryKeyError::WrongWord { position: position + 1, word: typed.clone() })?;
            bits.put(position * WORD_DATA_BITS, data);
        }
        let key = RecoveryKey(*bits.bytes.first_chunk().expect("33 bytes"));
        let told = bits.bytes[32];
        bits.bytes.zeroize();
        if key.checksum() == told { Ok(key) } else { Err(RecoveryKeyError::WrongTogether) }
    }

    fn checksum(&self) -> u8 {
        blake3::derive_key("farshore recovery key checksum v1", &self.0)[0]
    }
}

impl fmt::Debug for RecoveryKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RecoveryKey(secret)")
    }
}

struct Bits {
    bytes: Vec<u8>,
}

impl Bits {
    fn get(&self, at: usize) -> u16 {
        (at..at + WORD_DATA_BITS).fold(0, |value, bit| value << 1 | u16::from(self.bytes[bit / 8] >> (7 - bit % 8) & 1))
    }

    fn put(&mut self, at: usize, value: u16) {
        for offset in 0..WORD_DATA_BITS {
            let bit = at + offset;
            self.bytes[bit / 8] |= ((value >> (WORD_DATA_BITS - 1 - offset) & 1) as u8) << (7 - bit % 8);
        }
    }
}

/// CRC-5 (polynomial x⁵ + x² + 1) of the 11 data bits, mixed with the position. It detects every burst of up to five
/// bits, and a letter is at most four.
fn check(data: u16, position: usize) -> u16 {
    let mut register = u32::from(data) << 5;
    for bit in (5..16).rev() {
        if register >> bit & 1 == 1 {
            register ^= 0b10_0101 << (bit - 5);
        }
    }
    register as u16 ^ position as u16
}

fn word(data: u16, position: usize) -> String {
    let bits = data << 5 | check(data, position);
    let consonant = |shift: u16| CONSONANTS[usize::from(bits >> shift & 15)] as char;
    let vowel = |shift: u16| VOWELS[usize::from(bits >> shift & 3)] as char;
    [consonant(12), vowel(10), consonant(6), vowel(4), consonant(0)].iter().collect()
}

fn read_word(word: &str, position: usize) -> Option<u16> {
    let letters: &[u8; 5] = word.as_bytes().try_into().ok()?;
    let find = |letter: u8, alphabet: &[u8]| alphabet.iter().position(|other| *other == letter);
    let mut bits = 0u16;
    for (index, letter) in letters.iter().enumerate() {
        bits = if index % 2 == 0 {
            bits << 4 | find(*letter, CONSONANTS)? as u16
        } else {
            bits << 2 | find(*letter, VOWELS)? as u16
        };
    }
    let data = bits >> 5;
    (bits & 31 == check(data, position)).then_some(data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_is_printed_can_be_typed(bytes: [u8; 32]) {
            let key = RecoveryKey(bytes);
            let words = key.to_words();
            prop_assert_eq!(words.split_whitespace().count(), 24);
            prop_assert_eq!(RecoveryKey::parse(&words), Ok(key.clone()));
            prop_assert_eq!(RecoveryKey::parse(&words.to_uppercase().replace([' ', '\n'], " - ")), Ok(key));
        }

        #[test]
        fn every_wrong_letter_is_found_in_its_word(bytes: [u8; 32], place in 0usize..24, letter in 0usize..5, other in 0usize..16) {
            let words = RecoveryKey(bytes).to_words();
            let mut typed: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
            let alphabet: &[u8] = if letter % 2 == 0 { CONSONANTS } else { VOWELS };
            let replacement = alphabet[other % alphabet.len()] as char;
            prop_assume!(typed[place].as_bytes()[letter] as char != replacement);
            typed[place].replace_range(letter..=letter, &replacement.to_string());
            let error = RecoveryKey::parse(&typed.join(" ")).expect_err("a letter is wrong");
            prop_assert_eq!(error, RecoveryKeyError::WrongWord { position: place + 1, word: typed[place].clone() });
        }

        #[test]
        fn swapped_words_are_found(bytes: [u8; 32], a in 0usize..24, b in 0usize..24) {
            let words = RecoveryKey(bytes).to_words();
            let mut typed: Vec<&str> = words.split_whitespace().collect();
            prop_assume!(a != b);
            typed.swap(a, b);
            prop_assert!(RecoveryKey::parse(&typed.join(" ")).is_err());
        }

        #[test]
        fn any_text_is_answered(text: String) {
            let _ = RecoveryKey::parse(&text);
        }
    }

    #[test]
    fn missing_words_are_counted() {
        let words = RecoveryKey([7; 32]).to_words();
        let fewer: Vec<&str> = words.split_whitespace().take(20).collect();
        assert_eq!(RecoveryKey::parse(&fewer.join(" ")), Err(RecoveryKeyError::WrongCount(20)));
    }
}
