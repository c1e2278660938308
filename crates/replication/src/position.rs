//! Names of things and places in history: machines, chains, disks, generations, sequence numbers, epochs.

use std::fmt;

macro_rules! identifier {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl std::str::FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                parse_id(text).map($name)
            }
        }
    };
}

/// A text is not the 32 hexadecimal digits of an identifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an identifier has 32 hexadecimal digits")]
pub struct ParseIdError;

fn parse_id(text: &str) -> Result<[u8; 16], ParseIdError> {
    let digits = text.as_bytes();
    if digits.len() != 32 {
        return Err(ParseIdError);
    }
    let mut id = [0; 16];
    for (byte, pair) in id.iter_mut().zip(digits.chunks_exact(2)) {
        let nibble = |digit: u8| (digit as char).to_digit(16).ok_or(ParseIdError);
        *byte = (nibble(pair[0])? << 4 | nibble(pair[1])?) as u8;
    }
    Ok(id)
}

identifier! {
    /// A protected machine, for its whole life, whatever chain it follows.
    MachineId
}
identifier! {
    /// A line of history with one writer at a time.
    ChainId
}
identifier! {
    /// A run of the agent: new at each start, so that two agents with one identity are noticed.
    InstanceId
}

/// A disk of one machine: small, assigned once, never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct DiskId(pub u16);

impl fmt::Display for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "disk {}", self.0)
    }
}

/// One writer session on a chain. Won by creating the chain's next manifest; a stale writer can commit nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Generation(pub u32);

impl Generation {
    /// Largest generation: `generation × 2⁴⁴` must fit into 64 bits.
    pub const MAX: Generation = Generation((1 << 20) - 1);

    /// The number before this generation's first change.
    pub fn base(self) -> SequenceNumber {
        assert!(self <= Generation::MAX, "generations end at 2^20 - 1");
        SequenceNumber(u64::from(self.0) << SequenceNumber::COUNTER_BITS)
    }

    /// The generation after this one.
    pub fn next(self) -> Generation {
        assert!(self < Generation::MAX, "generations end at 2^20 - 1");
        Generation(self.0 + 1)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "generation {}", self.0)
    }
}

/// A place in a chain: how many changes, over all disks of the machine, came before and including it.
///
/// Each generation starts at `generation × 2⁴⁴`, so numbers are never reused even when a tail is abandoned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct SequenceNumber(pub u64);

impl SequenceNumber {
    const COUNTER_BITS: u32 = 44;

    /// The generation whose writer assigned this number.
    pub fn generation(self) -> Generation {
        Generation((self.0 >> SequenceNumber::COUNTER_BITS) as u32)
    }

    /// Whether a generation that goes on from here has room for more changes than can ever come.
    pub(crate) fn has_room(self) -> bool {
        self.0 >> (SequenceNumber::COUNTER_BITS - 1) & 1 == 0
    }

    /// The number of the next change of the same generation.
    pub fn next(self) -> SequenceNumber {
        let next = SequenceNumber(self.0 + 1);
        assert_eq!(next.generation(), self.generation(), "2^44 changes do not fit into one generation");
        next
    }
}

impl fmt::Display for SequenceNumber {
    /// `3.1042`: generation, then the change's number within it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counter = self.0 & ((1 << SequenceNumber::COUNTER_BITS) - 1);
        write!(f, "{}.{counter}", self.generation().0)
    }
}

impl std::str::FromStr for SequenceNumber {
    type Err = ParseSequenceError;

    fn from_str(text: &str) -> Result<SequenceNumber, ParseSequenceError> {
        let (generation, counter) = text.split_once('.').ok_or(ParseSequenceError)?;
        let generation: u32 = generation.parse().map_err(|_| ParseSequenceError)?;
        let counter: u64 = counter.parse().map_err(|_| ParseSequenceError)?;
        if generation > Generation::MAX.0 || counter >> SequenceNumber::COUNTER_BITS != 0 {
            return Err(ParseSequenceError);
        }
        Ok(SequenceNumber(Generation(generation).base().0 | counter))
    }
}

/// A text is not `generation.number`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a sequence number is written generation.number, such as 3.1042")]
pub struct ParseSequenceError;

/// A place in the forest of chains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// The line of history.
    pub chain: ChainId,
    /// The place on it.
    pub sequence: SequenceNumber,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.chain, self.sequence)
    }
}

/// A stretch of capture between two rotations of the dirty maps. Counts up for as long as the maps live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Epoch(pub u32);

impl Epoch {
    /// The epoch after this one.
    pub fn next(self) -> Epoch {
        Epoch(self.0.checked_add(1).expect("2^32 rotations, one a second, take 136 years"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_generation_begins_above_everything_before_it() {
        let last = SequenceNumber(Generation(8).base().0 - 1);
        assert_eq!(last.generation(), Generation(7));
        assert!(Generation(8).base() > last);
        assert_eq!(Generation(8).base().next().to_string(), "8.1");
    }

    proptest! {
        #[test]
        fn identifiers_and_sequences_read_back(id: [u8; 16], sequence: u64) {
            prop_assert_eq!(MachineId(id).to_string().parse(), Ok(MachineId(id)));
            let sequence = SequenceNumber(sequence);
            prop_assert_eq!(sequence.to_string().parse(), Ok(sequence));
        }

        #[test]
        fn any_text_is_answered(text: String) {
            let _ = text.parse::<MachineId>();
            let _ = text.parse::<SequenceNumber>();
        }
    }
}
