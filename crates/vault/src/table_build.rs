//! Building a table: entries come in order, pages go out as they fill. Memory is one page per level and the list of
//! sources, whatever the number of entries.

use std::collections::HashMap;

use replication::{LeafHash, SequenceNumber};

use crate::object::FrameRef;
use crate::store::ObjectName;
use crate::table::{Content, Entry, PAGE_BYTES_TARGET, SOURCES_MAX, SOURCES_PER_PAGE, SourceIndex, Tree};
use crate::table::{End, Key};
use crate::table_page::{Child, InnerPage, LeafWriter};
use crate::table_root::{RootParts, Sources, encode_source_page};

/// Children of one inner page. Keeps pages below [`crate::table::PAGE_BYTES_MAX`] however long their fields are.
const CHILDREN_MAX: usize = 512;

/// Where pages go: sealed into an object that is being built.
pub(crate) trait PageSink {
    /// What can go wrong.
    type Error;

    /// Stores a page and says where; no name means the object that hosts the table.
    fn page(&mut self, plain: Vec<u8>) -> Result<(Option<ObjectName>, FrameRef), Self::Error>;

    /// Stores a page, or the root, in the object that hosts the table. No [`PageSink::page`] follows.
    fn host_page(&mut self, plain: Vec<u8>) -> Result<FrameRef, Self::Error>;
}

/// A table that is being built.
#[derive(Debug)]
pub(crate) struct TableBuilder {
    sources: Vec<ObjectName>,
    source_index: HashMap<ObjectName, SourceIndex>,
    narrow: TreeBuilder,
    wide: TreeBuilder,
    summary: TableSummary,
    page_bytes_target: usize,
    children_max: usize,
}

/// What a finished table holds.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct TableSummary {
    pub(crate) entries: u64,
    /// Bytes of data that entries refer to, before compression.
    pub(crate) data_bytes: u64,
    /// Bytes of pages and root, before encryption.
    pub(crate) index_bytes: u64,
    /// Smallest and largest sequence; equal and zero if there is no entry.
    pub(crate) first_sequence: SequenceNumber,
    pub(crate) last_sequence: SequenceNumber,
    /// Smallest `(disk, start)` and largest `(disk, end)`.
    pub(crate) begin: End,
    pub(crate) end: End,
}

impl TableBuilder {
    /// An empty table.
    pub(crate) fn new() -> TableBuilder {
        TableBuilder {
            sources: Vec::new(),
            source_index: HashMap::new(),
            narrow: TreeBuilder::new(Tree::Narrow),
            wide: TreeBuilder::new(Tree::Wide),
            summary: TableSummary::default(),
            page_bytes_target: PAGE_BYTES_TARGET,
            children_max: CHILDREN_MAX,
        }
    }

    /// With smaller pages, so that tests see deep trees.
    #[cfg(test)]
    pub(crate) fn with_pages(page_bytes_target: usize, children_max: usize) -> TableBuilder {
        TableBuilder { page_bytes_target, children_max, ..TableBuilder::new() }
    }

    /// The index under which entries of this table refer to `object`.
    pub(crate) fn source(&mut self, object: &ObjectName) -> SourceIndex {
        if let Some(&index) = self.source_index.get(object) {
            return index;
        }
        self.sources.push(object.clone());
        assert!(self.sources.len() <= SOURCES_MAX, "a table has at most 2^24 sources");
        let index = SourceIndex(self.sources.len() as u32);
        self.source_index.insert(object.clone(), index);
        index
    }

    /// Appends an entry, which must not sort before the last one of its tree.
    pub(crate) fn push<S: PageSink>(
        &mut self,
        entry: &Entry,
        hashes: &[LeafHash],
        sink: &mut S,
    ) -> Result<(), S::Error> {
        self.summary.add(entry);
        let page_bytes_target = self.page_bytes_target;
        let tree = match entry.tree() {
            Tree::Narrow => &mut self.narrow,
            Tree::Wide => &mut self.wide,
        };
        if tree.leaf.len() + entry_bytes_max(hashes) > page_bytes_target && tree.leaf.span().is_some() {
            let (page, span) = tree.take_leaf();
            let child = self.store(page, span, sink)?;
            self.add_child(entry.tree(), 0, child, sink)?;
        }
        let tree = match entry.tree() {
            Tree::Narrow => &mut self.narrow,
            Tree::Wide => &mut self.wide,
        };
        tree.leaf.push(entry, hashes);
        Ok(())
    }

    /// Writes what is left. The last frame is the root; its reference comes back.
    pub(crate) fn finish<S: PageSink>(mut self, sink: &mut S) -> Result<(FrameRef, TableSummary), S::Error> {
        let narrow = self.finish_tree(Tree::Narrow, sink)?;
        let wide = self.finish_tree(Tree::Wide, sink)?;
        let sources = if self.sources.len() <= SOURCES_PER_PAGE {
            Sources::Inline(std::mem::take(&mut self.sources))
        } else {
            let mut pages = Vec::new();
            for names in self.sources.chunks(SOURCES_PER_PAGE) {
                let page = encode_source_page(names);
                self.summary.index_bytes += page.len() as u64;
                pages.push(sink.host_page(page)?);
            }
            Sources::Paged { count: self.sources.len() as u32, pages }
        };
        let root = RootParts { entries: self.summary.entries, sources, narrow, wide }.encode();
        self.summary.index_bytes += root.len() as u64;
        Ok((sink.host_page(root)?, self.summary))
    }

    fn tree(&mut self, tree: Tree) -> &mut TreeBuilder {
        match tree {
            Tree::Narrow => &mut self.narrow,
            Tree::Wide => &mut self.wide,
        }
    }

    fn store<S: PageSink>(&mut self, page: Vec<u8>, span: (Key, End), sink: &mut S) -> Result<Child, S::Error> {
        self.summary.index_bytes += page.len() as u64;
        let (object, frame) = sink.page(page)?;
        let source = object.map_or(SourceIndex::HOST, |object| self.source(&object));
        Ok(Child { first: span.0, end: span.1, source, frame })
    }

    fn add_child<S: PageSink>(&mut self, tree: Tree, level: usize, child: Child, sink: &mut S) -> Result<(), S::Error> {
        let children_max = self.children_max;
        let levels = &mut self.tree(tree).levels;
        if levels.len() == level {
            levels.push(InnerPage::default());
        }
        levels[level].children.push(child);
        if levels[level].children.len() < children_max {
            return Ok(());
        }
        let full = std::mem::take(&mut levels[level]);
        self.store_inner(tree, level, &full, sink)
    }

    fn store_inner<S: PageSink>(
        &mut self,
        tree: Tree,
        level: usize,
        page: &InnerPage,
        sink: &mut S,
    ) -> Result<(), S::Error> {
        let Some(first) = page.children.first() else { return Ok(()) };
        let end = page.children.iter().map(|child| child.end).max().expect("there is a first child");
        let child = self.store(page.encode(tree), (first.first, end), sink)?;
        self.add_child(tree, level + 1, child, sink)
    }

    /// Closes all levels but the top one, which goes into the root.
    fn finish_tree<S: PageSink>(&mut self, tree: Tree, sink: &mut S) -> Result<Option<Vec<u8>>, S::Error> {
        if self.tree(tree).leaf.span().is_none() {
            return Ok(None);
        }
        let (leaf, span) = self.tree(tree).take_leaf();
        if self.tree(tree).levels.is_empty() {
            return Ok(Some(leaf));
        }
        let child = self.store(leaf, span, sink)?;
        self.add_child(tree, 0, child, sink)?;
        let mut level = 0;
        loop {
            let page = std::mem::take(&mut self.tree(tree).levels[level]);
            if level + 1 == self.tree(tree).levels.len() {
                return Ok(Some(page.encode(tree)));
            }
            self.store_inner(tree, level, &page, sink)?;
            level += 1;
        }
    }
}

/// The most that an entry can add to a page.
fn entry_bytes_max(hashes: &[LeafHash]) -> usize {
    64 + size_of_val(hashes)
}

#[derive(Debug)]
struct TreeBuilder {
    kind: Tree,
    leaf: LeafWriter,
    /// Inner pages being filled, the one above the leaves first.
    levels: Vec<InnerPage>,
}

impl TreeBuilder {
    fn new(kind: Tree) -> TreeBuilder {
        TreeBuilder { kind, leaf: LeafWriter::new(kind), levels: Vec::new() }
    }

    fn take_leaf(&mut self) -> (Vec<u8>, (Key, End)) {
        let full = std::mem::replace(&mut self.leaf, LeafWriter::new(self.kind));
        let span = full.span().expect("a page is closed only with an entry in it");
        (full.finish(), span)
    }
}

impl TableSummary {
    fn add(&mut self, entry: &Entry) {
        let begin = (entry.disk, entry.range.start);
        if self.entries == 0 {
            (self.first_sequence, self.last_sequence) = (entry.sequence, entry.sequence);
            (self.begin, self.end) = (begin, entry.end());
        }
        self.entries += 1;
        self.first_sequence = self.first_sequence.min(entry.sequence);
        self.last_sequence = self.last_sequence.max(entry.sequence);
        self.begin = self.begin.min(begin);
        self.end = self.end.max(entry.end());
        if matches!(entry.content, Content::Data(_)) {
            self.data_bytes += entry.range.len;
        }
    }
}
