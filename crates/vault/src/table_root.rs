//! The root frame of a table: its two top pages and its sources, small enough to be read at once.

use bytes::Bytes;
use replication::codec::{DecodeError, Decoder, Encoder};

use crate::limits;
use crate::object::{FrameClass, FrameRef};
use crate::store::ObjectName;
use crate::table::{PAGE_BYTES_MAX, SOURCES_MAX, SOURCES_PER_PAGE, Tree};
use crate::table_page::{Page, decode_frame, encode_frame};

const LAYOUT: u8 = 1;
/// Largest page of sources, in bytes.
pub(crate) const SOURCE_PAGE_BYTES_MAX: usize = SOURCES_PER_PAGE * (limits::OBJECT_NAME_BYTES_MAX + 2) + 8;

/// A decoded root.
#[derive(Debug)]
pub(crate) struct Root {
    pub(crate) entries: u64,
    pub(crate) sources: Sources,
    pub(crate) narrow: Option<Page>,
    pub(crate) wide: Option<Page>,
}

/// The objects that a table refers to, besides its host.
#[derive(Debug)]
pub(crate) enum Sources {
    /// All of them; source index 1 is the first.
    Inline(Vec<ObjectName>),
    /// Frames of the host object, each with [`SOURCES_PER_PAGE`] names.
    Paged { count: u32, pages: Vec<FrameRef> },
}

/// What goes into a root.
#[derive(Debug)]
pub(crate) struct RootParts {
    pub(crate) entries: u64,
    pub(crate) sources: Sources,
    /// Encoded top pages.
    pub(crate) narrow: Option<Vec<u8>>,
    pub(crate) wide: Option<Vec<u8>>,
}

impl RootParts {
    /// Encodes the root.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Encoder::new();
        out.u8(LAYOUT).varint(self.entries);
        match &self.sources {
            Sources::Inline(names) => {
                out.varint(names.len() as u64).u8(0);
                encode_names(names, &mut out);
            }
            Sources::Paged { count, pages } => {
                out.varint((*count).into()).u8(1);
                pages.iter().for_each(|page| encode_frame(*page, &mut out));
            }
        }
        for top in [&self.narrow, &self.wide] {
            // An empty string is no page: a page has at least its kind.
            out.bytes(top.as_deref().unwrap_or_default());
        }
        out.finish()
    }
}

impl Root {
    /// Decodes a root frame.
    pub(crate) fn decode(bytes: Bytes) -> Result<Root, DecodeError> {
        let mut input = Decoder::new(bytes);
        match input.u8("table layout")? {
            LAYOUT => {}
            value => return Err(DecodeError::Undefined { field: "table layout", value: value.into() }),
        }
        let entries = input.varint("table entries")?;
        let count = input.varint_max("table sources", SOURCES_MAX as u64)? as usize;
        let sources = match input.u8("paged sources")? {
            0 if count <= SOURCES_PER_PAGE => Sources::Inline(decode_names(&mut input, count)?),
            1 => {
                let pages = (0..count.div_ceil(SOURCES_PER_PAGE))
                    .map(|_| decode_frame(&mut input, FrameClass::Index, SOURCE_PAGE_BYTES_MAX))
                    .collect::<Result<_, _>>()?;
                Sources::Paged { count: count as u32, pages }
            }
            value => return Err(DecodeError::Undefined { field: "paged sources", value: value.into() }),
        };
        let mut top = |tree| {
            let page = input.bytes("top page", PAGE_BYTES_MAX)?;
            if page.is_empty() { Ok(None) } else { Page::decode(page, tree).map(Some) }
        };
        let root = Root { entries, sources, narrow: top(Tree::Narrow)?, wide: top(Tree::Wide)? };
        input.finish()?;
        Ok(root)
    }
}

/// Encodes one page of source names.
pub(crate) fn encode_source_page(names: &[ObjectName]) -> Vec<u8> {
    let mut out = Encoder::new();
    encode_names(names, &mut out);
    out.finish()
}

/// Decodes the page of sources that begins at source `page * SOURCES_PER_PAGE` of `count`.
pub(crate) fn decode_source_page(bytes: Bytes, count: u32, page: usize) -> Result<Vec<ObjectName>, DecodeError> {
    let mut input = Decoder::new(bytes);
    let names = (count as usize).saturating_sub(page * SOURCES_PER_PAGE).min(SOURCES_PER_PAGE);
    let names = decode_names(&mut input, names)?;
    input.finish()?;
    Ok(names)
}

fn encode_names(names: &[ObjectName], out: &mut Encoder) {
    for name in names {
        out.text(name.as_str());
    }
}

fn decode_names(input: &mut Decoder, count: usize) -> Result<Vec<ObjectName>, DecodeError> {
    (0..count).map(|_| decode_name(input)).collect()
}

/// Reads one object name.
pub(crate) fn decode_name(input: &mut Decoder) -> Result<ObjectName, DecodeError> {
    let text = input.text("object name", limits::OBJECT_NAME_BYTES_MAX)?;
    ObjectName::new(text).map_err(|_| DecodeError::Inconsistent("a text is not an object name"))
}
