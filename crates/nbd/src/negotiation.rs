//! The server's side of the handshake: options in, replies out. Pure but for the lookup of exports.
//!
//! ```text
//! greeting ─► client flags ─► options … ─► Agreed (transmission begins)
//!                                │  └────► StartTls (then options again, everything before it forgotten)
//!                                └───────► Close
//! ```

use std::sync::Arc;

use crate::export::{BlockSizes, Export, Exports};
use crate::limits;
use crate::protocol::{
    CONTEXT_ALLOCATION, CONTEXT_ALLOCATION_ID, FLAG_CAN_MULTI_CONN, FLAG_HAS_FLAGS, FLAG_READ_ONLY, FLAG_SEND_CACHE,
    FLAG_SEND_DF, FLAG_SEND_FAST_ZERO, FLAG_SEND_FLUSH, FLAG_SEND_FUA, FLAG_SEND_TRIM, FLAG_SEND_WRITE_ZEROES,
    HANDSHAKE_FIXED_NEWSTYLE, HANDSHAKE_NO_ZEROES, INFO_BLOCK_SIZE, INFO_DESCRIPTION, INFO_EXPORT, INFO_NAME,
    MAGIC_OPTION, MAGIC_OPTION_REPLY, MAGIC_SERVER, OPT_ABORT, OPT_EXPORT_NAME, OPT_GO, OPT_INFO, OPT_LIST,
    OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT, OPT_STARTTLS, OPT_STRUCTURED_REPLY, REP_ACK, REP_ERR_BLOCK_SIZE_REQD,
    REP_ERR_INVALID, REP_ERR_TLS_REQD, REP_ERR_TOO_BIG, REP_ERR_UNKNOWN, REP_ERR_UNSUP, REP_INFO, REP_META_CONTEXT,
    REP_SERVER, split,
};
use crate::request::Terms;

/// Bytes of an option before its data.
pub const OPTION_HEADER_BYTES: usize = 16;

/// Whether the connection is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encryption {
    /// It is not, and the server has no certificate.
    Unavailable,
    /// It is not yet, and nothing is told before it is.
    Required,
    /// It is.
    Established,
}

/// What both sides settled on.
#[derive(Clone)]
pub struct Agreed {
    /// The disk.
    pub export: Arc<dyn Export>,
    /// The name it was asked for by.
    pub name: String,
    /// How it may be used.
    pub terms: Terms,
}

/// What to do once the reply to an option is sent.
pub enum Next {
    /// Read the next option.
    Option,
    /// Begin TLS.
    StartTls,
    /// Read requests.
    Transmission(Box<Agreed>),
    /// Close the connection.
    Close,
}

/// Why the handshake cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Not an option.
    #[error("the client sent {0:#018x} where an option must begin")]
    Magic(u64),
    /// More data than any option has.
    #[error("the client announced an option of {0} bytes")]
    TooLong(u32),
    /// Flags this server does not know.
    #[error("the client asked for unknown handshake flags {0:#x}")]
    Flags(u32),
}

/// The first thing a server sends.
pub fn greeting() -> [u8; 18] {
    let mut greeting = [0; 18];
    greeting[..8].copy_from_slice(&MAGIC_SERVER.to_be_bytes());
    greeting[8..16].copy_from_slice(&MAGIC_OPTION.to_be_bytes());
    greeting[16..].copy_from_slice(&(HANDSHAKE_FIXED_NEWSTYLE | HANDSHAKE_NO_ZEROES).to_be_bytes());
    greeting
}

/// The number of an option and the length of its data.
///
/// # Errors
/// [`Malformed`]: close the connection.
pub fn decode_option(header: [u8; OPTION_HEADER_BYTES]) -> Result<(u32, u32), Malformed> {
    let [m0, m1, m2, m3, m4, m5, m6, m7, o0, o1, o2, o3, l0, l1, l2, l3] = header;
    let magic = u64::from_be_bytes([m0, m1, m2, m3, m4, m5, m6, m7]);
    if magic != MAGIC_OPTION {
        return Err(Malformed::Magic(magic));
    }
    let length = u32::from_be_bytes([l0, l1, l2, l3]);
    if length > limits::OPTION_BYTES_MAX {
        return Err(Malformed::TooLong(length));
    }
    Ok((u32::from_be_bytes([o0, o1, o2, o3]), length))
}

/// The state between options.
pub struct Negotiation<'a> {
    exports: &'a dyn Exports,
    encryption: Encryption,
    pad_export_name: bool,
    structured: bool,
    /// The export whose allocation map was asked for.
    allocation_of: Option<String>,
}

impl<'a> Negotiation<'a> {
    /// The state after the client answered the greeting with `flags`.
    ///
    /// # Errors
    /// [`Malformed`]: close the connection.
    pub fn new(exports: &'a dyn Exports, encryption: Encryption, flags: u32) -> Result<Negotiation<'a>, Malformed> {
        if flags & !u32::from(HANDSHAKE_FIXED_NEWSTYLE | HANDSHAKE_NO_ZEROES) != 0 {
            return Err(Malformed::Flags(flags));
        }
        Ok(Negotiation {
            exports,
            encryption,
            pad_export_name: flags & u32::from(HANDSHAKE_NO_ZEROES) == 0,
            structured: false,
            allocation_of: None,
        })
    }

    /// TLS was set up; what was said in the clear counts no more.
    pub fn encrypted(&mut self) {
        self.encryption = Encryption::Established;
        self.structured = false;
        self.allocation_of = None;
    }

    /// Answers one option by appending to `out`.
    pub fn option(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Next {
        if self.encryption == Encryption::Required {
            return match option {
                OPT_STARTTLS => self.start_tls(data, out),
                OPT_ABORT => acknowledge(out, option, Next::Close),
                // This option has no error reply.
                OPT_EXPORT_NAME => Next::Close,
                _ => refuse(out, option, REP_ERR_TLS_REQD, "this server speaks only TLS"),
            };
        }
        match option {
            OPT_EXPORT_NAME => self.export_name(data, out),
            OPT_ABORT => acknowledge(out, option, Next::Close),
            OPT_LIST => self.list(data, out),
            OPT_STARTTLS => self.start_tls(data, out),
            OPT_INFO | OPT_GO => self.info(option, data, out),
            OPT_STRUCTURED_REPLY if !data.is_empty() => refuse(out, option, REP_ERR_INVALID, "unexpected data"),
            OPT_STRUCTURED_REPLY => {
                self.structured = true;
                acknowledge(out, option, Next::Option)
            }
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => self.meta_context(option, data, out),
            _ => refuse(out, option, REP_ERR_UNSUP, "this server does not know the option"),
        }
    }

    fn start_tls(&self, data: &[u8], out: &mut Vec<u8>) -> Next {
        match self.encryption {
            _ if !data.is_empty() => refuse(out, OPT_STARTTLS, REP_ERR_INVALID, "unexpected data"),
            Encryption::Unavailable => refuse(out, OPT_STARTTLS, REP_ERR_UNSUP, "this server has no certificate"),
            Encryption::Established => refuse(out, OPT_STARTTLS, REP_ERR_INVALID, "the connection is encrypted"),
            Encryption::Required => acknowledge(out, OPT_STARTTLS, Next::StartTls),
        }
    }

    fn list(&self, data: &[u8], out: &mut Vec<u8>) -> Next {
        if !data.is_empty() {
            return refuse(out, OPT_LIST, REP_ERR_INVALID, "unexpected data");
        }
        for listed in self.exports.list().into_iter().take(limits::EXPORTS_LISTED_MAX) {
            if listed.name.len() > limits::NAME_BYTES_MAX {
                continue;
            }
            let mut body = (listed.name.len() as u32).to_be_bytes().to_vec();
            body.extend(listed.name.as_bytes());
            body.extend(clip(&listed.description).as_bytes());
            push_reply(out, OPT_LIST, REP_SERVER, &body);
        }
        acknowledge(out, OPT_LIST, Next::Option)
    }

    fn export_name(&self, data: &[u8], out: &mut Vec<u8>) -> Next {
        let Some(agreed) = str::from_utf8(data).ok().and_then(|name| self.agree(name)) else {
            return Next::Close;
        };
        out.extend(agreed.terms.size.to_be_bytes());
        out.extend(transmission_flags(&agreed.terms).to_be_bytes());
        if self.pad_export_name {
            out.extend([0; 124]);
        }
        Next::Transmission(Box::new(agreed))
    }

    fn info(&self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Next {
        let Some((name, wanted)) = parse_info(data) else {
            return refuse(out, option, REP_ERR_INVALID, "the request for an export is malformed");
        };
        if name.len() > limits::NAME_BYTES_MAX {
            return refuse(out, option, REP_ERR_TOO_BIG, "the name of the export is too long");
        }
        let Some(agreed) = str::from_utf8(name).ok().and_then(|name| self.agree(name)) else {
            return refuse(out, option, REP_ERR_UNKNOWN, "there is no export of that name");
        };
        let sizes = agreed.export.block_sizes();
        if option == OPT_GO && sizes.minimum > 1 && !wanted.contains(&INFO_BLOCK_SIZE) {
            return refuse(out, option, REP_ERR_BLOCK_SIZE_REQD, "this export demands a minimum block size");
        }
        let mut body = INFO_EXPORT.to_be_bytes().to_vec();
        body.extend(agreed.terms.size.to_be_bytes());
        body.extend(transmission_flags(&agreed.terms).to_be_bytes());
        push_reply(out, option, REP_INFO, &body);
        if wanted.contains(&INFO_NAME) {
            push_reply(out, option, REP_INFO, &[&INFO_NAME.to_be_bytes()[..], name].concat());
        }
        let description = agreed.export.description();
        if wanted.contains(&INFO_DESCRIPTION) && !description.is_empty() {
            let body = [&INFO_DESCRIPTION.to_be_bytes()[..], clip(&description).as_bytes()].concat();
            push_reply(out, option, REP_INFO, &body);
        }
        if wanted.contains(&INFO_BLOCK_SIZE) || sizes.minimum > 1 {
            let mut body = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
            for size in [agreed.terms.block_bytes, sizes.preferred.max(512), agreed.terms.request_bytes_max] {
                body.extend(size.to_be_bytes());
            }
            push_reply(out, option, REP_INFO, &body);
        }
        let next = if option == OPT_GO { Next::Transmission(Box::new(agreed)) } else { Next::Option };
        acknowledge(out, option, next)
    }

    fn meta_context(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Next {
        if option == OPT_SET_META_CONTEXT {
            self.allocation_of = None;
            if !self.structured {
                return refuse(out, option, REP_ERR_INVALID, "structured replies come first");
            }
        }
        let Some((name, queries)) = parse_meta_context(data) else {
            return refuse(out, option, REP_ERR_INVALID, "the request for metadata contexts is malformed");
        };
        let Some(name) = str::from_utf8(name).ok().filter(|name| self.exports.open(name).is_some()) else {
            return refuse(out, option, REP_ERR_UNKNOWN, "there is no export of that name");
        };
        let listing = option == OPT_LIST_META_CONTEXT;
        let matches = queries.iter().any(|query| *query == CONTEXT_ALLOCATION.as_bytes())
            || (listing && (queries.is_empty() || queries.iter().any(|query| *query == b"base:")));
        if matches {
            let id = if listing { 0 } else { CONTEXT_ALLOCATION_ID };
            let body = [&id.to_be_bytes()[..], CONTEXT_ALLOCATION.as_bytes()].concat();
            push_reply(out, option, REP_META_CONTEXT, &body);
            if !listing {
                self.allocation_of = Some(name.to_owned());
            }
        }
        acknowledge(out, option, Next::Option)
    }

    fn agree(&self, name: &str) -> Option<Agreed> {
        let export = self.exports.open(name).filter(|_| name.len() <= limits::NAME_BYTES_MAX)?;
        let BlockSizes { minimum, maximum, .. } = export.block_sizes();
        let terms = Terms {
            size: export.device().size(),
            read_only: export.is_read_only(),
            block_bytes: minimum.max(1),
            request_bytes_max: maximum.min(limits::REQUEST_BYTES_MAX),
            zeroes_fast: export.zeroes_fast(),
            structured: self.structured,
            allocation: self.structured && self.allocation_of.as_deref() == Some(name),
        };
        Some(Agreed { export, name: name.to_owned(), terms })
    }
}

fn transmission_flags(terms: &Terms) -> u16 {
    let mut flags = FLAG_HAS_FLAGS | FLAG_SEND_FLUSH | FLAG_SEND_FUA | FLAG_CAN_MULTI_CONN | FLAG_SEND_CACHE;
    if terms.read_only {
        flags |= FLAG_READ_ONLY;
    } else {
        flags |= FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES;
        if terms.zeroes_fast {
            flags |= FLAG_SEND_FAST_ZERO;
        }
    }
    if terms.structured {
        flags |= FLAG_SEND_DF;
    }
    flags
}

/// `length name, count, count × kind`; nothing may follow.
fn parse_info(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let (name, rest) = parse_string(data)?;
    let (count, rest) = split::<2>(rest)?;
    if rest.len() != usize::from(u16::from_be_bytes(count)) * 2 {
        return None;
    }
    Some((name, rest.chunks_exact(2).map(|kind| u16::from_be_bytes([kind[0], kind[1]])).collect()))
}

/// `length name, count, count × (length query)`; nothing may follow.
fn parse_meta_context(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let (name, rest) = parse_string(data)?;
    let (count, mut rest) = split::<4>(rest)?;
    let mut queries = Vec::new();
    // Each query takes four bytes at least, so the data's own length bounds the loop.
    for _ in 0..u32::from_be_bytes(count) {
        let (query, after) = parse_string(rest)?;
        queries.push(query);
        rest = after;
    }
    rest.is_empty().then_some((name, queries))
}

fn parse_string(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = split::<4>(data)?;
    rest.split_at_checked(usize::try_from(u32::from_be_bytes(length)).ok()?)
}

fn acknowledge(out: &mut Vec<u8>, option: u32, next: Next) -> Next {
    push_reply(out, option, REP_ACK, &[]);
    next
}

fn refuse(out: &mut Vec<u8>, option: u32, kind: u32, message: &str) -> Next {
    push_reply(out, option, kind, message.as_bytes());
    Next::Option
}

fn push_reply(out: &mut Vec<u8>, option: u32, kind: u32, body: &[u8]) {
    out.extend(MAGIC_OPTION_REPLY.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    let length = u32::try_from(body.len()).expect("every body is bounded by the length of two strings");
    out.extend(length.to_be_bytes());
    out.extend(body);
}

fn clip(text: &str) -> &str {
    let mut end = text.len().min(limits::NAME_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::{DeviceExport, ExportTable};
    use proptest::prelude::*;
    use std::ops::Range;
    use world::{BlockDevice, BlockError};

    struct Nothing;

    impl BlockDevice for Nothing {
        fn size(&self) -> u64 {
            12_345
        }
        fn read_at(&self, _: u64, _: &mut [u8]) -> Result<(), BlockError> {
            Ok(())
        }
        fn write_at(&self, _: u64, _: &[u8]) -> Result<(), BlockError> {
            Ok(())
        }
        fn write_zeroes(&self, _: Range<u64>) -> Result<(), BlockError> {
            Ok(())
        }
        fn discard(&self, _: Range<u64>) -> Result<(), BlockError> {
            Ok(())
        }
        fn flush(&self) -> Result<(), BlockError> {
            Ok(())
        }
    }

    fn table() -> ExportTable {
        let table = ExportTable::new();
        table.insert("disk", Arc::new(DeviceExport::new(Arc::new(Nothing)).described("a disk")));
        table.insert("other", Arc::new(DeviceExport::read_only(Arc::new(Nothing))));
        table
    }

    fn string(text: &str) -> Vec<u8> {
        [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
    }

    fn kinds(mut out: &[u8]) -> Vec<u32> {
        let mut kinds = Vec::new();
        while let Some((header, rest)) = split::<20>(out) {
            assert_eq!(header[..8], MAGIC_OPTION_REPLY.to_be_bytes());
            kinds.push(u32::from_be_bytes(header[12..16].try_into().unwrap()));
            out = &rest[u32::from_be_bytes(header[16..].try_into().unwrap()) as usize..];
        }
        assert!(out.is_empty());
        kinds
    }

    fn ask(negotiation: &mut Negotiation, option: u32, data: &[u8]) -> (Vec<u32>, Next) {
        let mut out = Vec::new();
        let next = negotiation.option(option, data, &mut out);
        (kinds(&out), next)
    }

    #[test]
    fn contexts_count_for_the_export_they_were_set_for() {
        let table = table();
        for (asked, expected) in [("disk", true), ("other", false)] {
            let mut negotiation = Negotiation::new(&table, Encryption::Unavailable, 3).unwrap();
            let set = [string("disk"), 1u32.to_be_bytes().to_vec(), string(CONTEXT_ALLOCATION)].concat();
            assert_eq!(ask(&mut negotiation, OPT_SET_META_CONTEXT, &set).0, [REP_ERR_INVALID]);
            assert_eq!(ask(&mut negotiation, OPT_STRUCTURED_REPLY, &[]).0, [REP_ACK]);
            assert_eq!(ask(&mut negotiation, OPT_SET_META_CONTEXT, &set).0, [REP_META_CONTEXT, REP_ACK]);
            let go = [string(asked), vec![0, 0]].concat();
            let (kinds, Next::Transmission(agreed)) = ask(&mut negotiation, OPT_GO, &go) else {
                panic!("not agreed");
            };
            assert_eq!(kinds, [REP_INFO, REP_ACK]);
            assert_eq!((agreed.terms.allocation, agreed.terms.size), (expected, 12_345));
            assert_eq!(agreed.terms.read_only, asked == "other");
        }
    }

    #[test]
    fn nothing_is_told_before_encryption() {
        let table = table();
        let mut negotiation = Negotiation::new(&table, Encryption::Required, 3).unwrap();
        let go = [string("disk"), vec![0, 0]].concat();
        assert_eq!(ask(&mut negotiation, OPT_LIST, &[]).0, [REP_ERR_TLS_REQD]);
        assert_eq!(ask(&mut negotiation, OPT_GO, &go).0, [REP_ERR_TLS_REQD]);
        assert!(matches!(ask(&mut negotiation, OPT_EXPORT_NAME, b"disk").1, Next::Close));
        assert!(matches!(ask(&mut negotiation, OPT_STARTTLS, &[]).1, Next::StartTls));
        negotiation.encrypted();
        assert_eq!(ask(&mut negotiation, OPT_LIST, &[]).0, [REP_SERVER, REP_SERVER, REP_ACK]);
        assert!(matches!(ask(&mut negotiation, OPT_GO, &go).1, Next::Transmission(_)));
    }

    #[test]
    fn an_unknown_export_or_option_is_refused_and_the_haggling_goes_on() {
        let table = table();
        let mut negotiation = Negotiation::new(&table, Encryption::Unavailable, 1).unwrap();
        let go = [string("none"), vec![0, 0]].concat();
        assert_eq!(ask(&mut negotiation, OPT_GO, &go).0, [REP_ERR_UNKNOWN]);
        assert_eq!(ask(&mut negotiation, 99, b"whatever").0, [REP_ERR_UNSUP]);
        assert_eq!(ask(&mut negotiation, OPT_STARTTLS, &[]).0, [REP_ERR_UNSUP]);
        assert_eq!(ask(&mut negotiation, OPT_GO, &go[..go.len() - 1]).0, [REP_ERR_INVALID]);
        let mut out = Vec::new();
        assert!(matches!(negotiation.option(OPT_EXPORT_NAME, b"disk", &mut out), Next::Transmission(_)));
        assert_eq!(out.len(), 10 + 124);
        assert!(Negotiation::new(&table, Encryption::Unavailable, 4).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]
        #[test]
        fn random_options_never_panic(options in proptest::collection::vec(
            (0u32..14, proptest::collection::vec(prop_oneof![Just(0u8), 0u8..8, any::<u8>()], 0..60)), 1..12)) {
            let table = table();
            let mut negotiation = Negotiation::new(&table, Encryption::Unavailable, 3).unwrap();
            for (option, data) in options {
                let mut out = Vec::new();
                match negotiation.option(option, &data, &mut out) {
                    Next::Option => prop_assert!(!kinds(&out).is_empty(), "every option is answered"),
                    Next::Close | Next::Transmission(_) | Next::StartTls => break,
                }
            }
        }

        #[test]
        fn random_option_headers_never_panic(header in any::<[u8; 16]>()) {
            let valid = header[..8] == MAGIC_OPTION.to_be_bytes();
            prop_assert!(valid || decode_option(header).is_err());
        }
    }
}
