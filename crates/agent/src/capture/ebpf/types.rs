//! What the running kernel says of its types, as far as the loader library does not tell it: the arguments of a tracepoint.
//!
//! The format is BTF (`Documentation/bpf/btf.rst`): a header, types of different length one after the other, numbered from
//! one, then strings. Pure; makes no demands on the bytes.

/// Where the kernel describes its types.
pub(super) const OF_THE_KERNEL: &str = "/sys/kernel/btf/vmlinux";

const MAGIC: u16 = 0xeb9f;
/// Bytes of what all kinds of types begin with.
const HEAD_BYTES: usize = 12;
const KIND_POINTER: u32 = 2;
const KIND_TYPEDEF: u32 = 8;
const KIND_FUNCTION_TYPE: u32 = 13;

/// How many arguments the programs on `tracepoint` get; `None` if `types` do not say.
///
/// The kernel describes them as `typedef void (*btf_trace_NAME)(void *, ...)`.
pub(super) fn arguments_of(types: &[u8], tracepoint: &str) -> Option<usize> {
    let types = Types::parse(types)?;
    let name = format!("btf_trace_{tracepoint}");
    let defined = types.all().find(|it| it.kind == KIND_TYPEDEF && types.is_named(it, &name))?;
    let pointer = types.numbered(defined.refers_to).filter(|it| it.kind == KIND_POINTER)?;
    let function = types.numbered(pointer.refers_to).filter(|it| it.kind == KIND_FUNCTION_TYPE)?;
    function.members.checked_sub(1)
}

struct Type {
    name_at: usize,
    kind: u32,
    members: usize,
    /// Another type, for kinds that refer to one.
    refers_to: u32,
}

/// The sections of a description. Types are read as they are needed: a kernel has more than a hundred thousand.
struct Types<'a> {
    types: &'a [u8],
    strings: &'a [u8],
}

impl<'a> Types<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Types<'a>> {
        let half = |at: usize| Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
        let header_word = |at: usize| word(bytes, at).map(|value| value as usize);
        let (header, types_at, types_len) = (header_word(4)?, header_word(8)?, header_word(12)?);
        let (strings_at, strings_len) = (header_word(16)?, header_word(20)?);
        if half(0)? != MAGIC {
            return None;
        }
        let section = |at: usize, len: usize| bytes.get(header.checked_add(at)?..)?.get(..len);
        Some(Types { types: section(types_at, types_len)?, strings: section(strings_at, strings_len)? })
    }

    /// In order, from number one; ends at one of a kind that is not known.
    fn all(&self) -> impl Iterator<Item = Type> {
        let mut rest = self.types;
        std::iter::from_fn(move || {
            let (name_at, info, refers_to) = (word(rest, 0)? as usize, word(rest, 4)?, word(rest, 8)?);
            let (kind, members) = (info >> 24 & 31, (info & 0xffff) as usize);
            rest = rest.get(HEAD_BYTES + tail_bytes(kind, members)?..)?;
            Some(Type { name_at, kind, members, refers_to })
        })
    }

    fn numbered(&self, number: u32) -> Option<Type> {
        self.all().nth((number as usize).checked_sub(1)?)
    }

    fn is_named(&self, it: &Type, name: &str) -> bool {
        let text = self.strings.get(it.name_at..).and_then(|text| text.split(|byte| *byte == 0).next());
        text == Some(name.as_bytes())
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Bytes after the head of a type; `None` for a kind that is not known.
fn tail_bytes(kind: u32, members: usize) -> Option<usize> {
    Some(match kind {
        // Integer, variable, declaration tag.
        1 | 14 | 17 => 4,
        // Array.
        3 => 12,
        // Structure, union, section, enumeration of 64 bits.
        4 | 5 | 15 | 19 => 12 * members,
        // Enumeration, function type.
        6 | KIND_FUNCTION_TYPE => 8 * members,
        // What only names or refers.
        KIND_POINTER | 7..=12 | 16 | 18 => 0,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `typedef void (*btf_trace_NAME)(...)` with `arguments` arguments, behind one type of each other kind.
    fn described(name: &str, arguments: u32) -> Vec<u8> {
        let strings = format!("\0btf_trace_{name}\0btf_trace_\0");
        let mut types: Vec<u32> = Vec::new();
        let mut number = 0;
        for kind in [1, 3, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15, 16, 17, 18, 19] {
            types.extend([0, kind << 24 | 2, 0]);
            types.extend(vec![1; tail_bytes(kind, 2).expect("known") / 4]);
            number += 1;
        }
        types.extend([1, KIND_TYPEDEF << 24, number + 2, 0, KIND_POINTER << 24, number + 3]);
        types.extend([0, KIND_FUNCTION_TYPE << 24 | arguments, 0]);
        types.extend(vec![0; 2 * arguments as usize]);
        let types: Vec<u8> = types.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let lengths = [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32];
        let mut bytes = [&MAGIC.to_ne_bytes()[..], &[1, 0]].concat();
        bytes.extend(lengths.iter().flat_map(|word| word.to_ne_bytes()));
        [bytes, types, strings.into_bytes()].concat()
    }

    #[test]
    fn arguments_are_counted() {
        assert_eq!(arguments_of(&described("block_rq_issue", 2), "block_rq_issue"), Some(1));
        assert_eq!(arguments_of(&described("block_rq_issue", 3), "block_rq_issue"), Some(2));
        assert_eq!(arguments_of(&described("block_rq_issue", 3), "block_rq"), None);
        assert_eq!(arguments_of(&described("block_rq_issue", 0), "block_rq_issue"), None, "not even the first");
    }

    #[test]
    fn this_kernel_tells_them() {
        // Where there is none, nothing is captured, and the capture's own tests say so.
        let Ok(types) = std::fs::read(OF_THE_KERNEL) else { return };
        assert_eq!(arguments_of(&types, "block_rq_complete"), Some(3));
        assert_eq!(arguments_of(&types, "block_bio_complete"), Some(2));
        assert!(matches!(arguments_of(&types, "block_bio_queue"), Some(1 | 2)));
        assert_eq!(arguments_of(&types, "block_of_wood"), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn damaged_descriptions_are_survived(at: prop::sample::Index, value: u8, cut: prop::sample::Index) {
            let mut bytes = described("block_rq_issue", 3);
            let place = at.index(bytes.len());
            bytes[place] = value;
            bytes.truncate(cut.index(bytes.len() + 1));
            let _ = arguments_of(&bytes, "block_rq_issue");
        }
    }
}
