//! Reading a table: look-ups, ranges and streaming. Pages are fetched as needed through a [`FrameSource`], which
//! caches them; a table itself holds only its root.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::Arc;

use replication::geometry::{ByteRange, GRANULE_BYTES};
use replication::{DiskId, LeafHash};

use crate::error::VaultError;
use crate::object::FrameRef;
use crate::table::{Entry, LEVELS_MAX, SOURCES_PER_PAGE, SourceIndex, Tree};
use crate::table_page::{Child, InnerPage, LeafPage, Page};
use crate::view_source::{FrameSource, ObjectId};

/// An open table.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) host: ObjectId,
    pub(crate) entries: u64,
    pub(crate) narrow: Option<Arc<Page>>,
    pub(crate) wide: Option<Arc<Page>>,
    pub(crate) sources: TableSources,
}

/// The objects a table refers to.
#[derive(Debug)]
pub(crate) enum TableSources {
    Inline(Vec<ObjectId>),
    Paged { count: u32, pages: Vec<FrameRef> },
}

impl Table {
    /// The object behind an index of this table.
    pub(crate) fn source(&self, index: SourceIndex, frames: &FrameSource) -> Result<ObjectId, VaultError> {
        let Some(position) = (index.0 as usize).checked_sub(1) else { return Ok(self.host) };
        let found = match &self.sources {
            TableSources::Inline(objects) => objects.get(position).copied(),
            TableSources::Paged { count, pages } => match pages.get(position / SOURCES_PER_PAGE) {
                Some(frame) => {
                    let page = frames.source_page(self.host, *frame, *count, position / SOURCES_PER_PAGE)?;
                    page.get(position % SOURCES_PER_PAGE).copied()
                }
                None => None,
            },
        };
        found.ok_or_else(|| frames.damaged(self.host, "an entry refers to a source that its table does not name"))
    }

    /// Calls `visit` for every entry of both trees that overlaps `range`. Within a tree they come in order.
    pub(crate) fn visit(
        &self,
        frames: &FrameSource,
        disk: DiskId,
        range: ByteRange,
        visit: &mut dyn FnMut(&Entry, &[LeafHash]),
    ) -> Result<(), VaultError> {
        self.visit_tree(Tree::Wide, frames, disk, range, visit)?;
        self.visit_tree(Tree::Narrow, frames, disk, range, visit)
    }

    /// As [`Table::visit`], one tree only.
    pub(crate) fn visit_tree(
        &self,
        tree: Tree,
        frames: &FrameSource,
        disk: DiskId,
        range: ByteRange,
        visit: &mut dyn FnMut(&Entry, &[LeafHash]),
    ) -> Result<(), VaultError> {
        match self.top(tree) {
            Some(top) => self.visit_page(top, tree, 0, frames, disk, range, visit),
            None => Ok(()),
        }
    }

    /// The start of the first narrow entry of `disk` that begins at `from` or later.
    pub(crate) fn next_narrow_start(
        &self,
        frames: &FrameSource,
        disk: DiskId,
        from: u64,
    ) -> Result<Option<u64>, VaultError> {
        let Some(mut page) = self.narrow.clone() else { return Ok(None) };
        // The first key right of the path taken, for when the leaf reached has nothing at or after `from`.
        let mut right = None;
        for _ in 0..LEVELS_MAX {
            let inner = match &*page {
                Page::Leaf(leaf) => {
                    let entries = leaf.entries();
                    let index = entries.partition_point(|e| (e.disk, e.range.start) < (disk, from));
                    let found = entries.get(index).map(|e| (e.disk, e.range.start)).or(right);
                    return Ok(found.filter(|(d, _)| *d == disk).map(|(_, start)| start));
                }
                Page::Inner(inner) => inner,
            };
            let index = inner.children.partition_point(|c| (c.first.0, c.first.1) < (disk, from));
            if let Some(next) = inner.children.get(index) {
                right = Some((next.first.0, next.first.1));
            }
            let Some(child) = inner.children.get(index.saturating_sub(1)) else { return Ok(None) };
            if index == 0 {
                return Ok(right.filter(|(d, _)| *d == disk).map(|(_, start)| start));
            }
            page = self.child(child, Tree::Narrow, frames)?;
        }
        Err(frames.damaged(self.host, "its table has too many levels"))
    }

    /// All entries of one tree, in order.
    pub(crate) fn stream<'a>(&'a self, tree: Tree, frames: &'a FrameSource) -> Result<Stream<'a>, VaultError> {
        let mut stream = Stream { table: self, tree, frames, path: Vec::new(), leaf: None };
        if let Some(top) = self.top(tree) {
            stream.descend(Arc::clone(top))?;
        }
        Ok(stream)
    }

    /// The objects besides the host that hold pages of one tree.
    pub(crate) fn page_objects(&self, tree: Tree, frames: &FrameSource) -> Result<BTreeSet<ObjectId>, VaultError> {
        let mut objects = BTreeSet::new();
        let mut level: Vec<Arc<Page>> = self.top(tree).cloned().into_iter().collect();
        for _ in 0..LEVELS_MAX {
            let mut below = Vec::new();
            for page in &level {
                let Page::Inner(inner) = &**page else { continue };
                for child in &inner.children {
                    objects.insert(self.source(child.source, frames)?);
                }
                // Leaves name no pages, and all leaves are at one depth: looking at one child tells for all.
                let Some(first) = inner.children.first() else { continue };
                if matches!(*self.child(first, tree, frames)?, Page::Inner(_)) {
                    for child in &inner.children {
                        below.push(self.child(child, tree, frames)?);
                    }
                }
            }
            level = below;
        }
        Ok(objects)
    }

    fn top(&self, tree: Tree) -> Option<&Arc<Page>> {
        match tree {
            Tree::Narrow => self.narrow.as_ref(),
            Tree::Wide => self.wide.as_ref(),
        }
    }

    fn child(&self, child: &Child, tree: Tree, frames: &FrameSource) -> Result<Arc<Page>, VaultError> {
        frames.page(self.source(child.source, frames)?, child.frame, tree)
    }

    #[allow(clippy::too_many_arguments)]
    fn visit_page(
        &self,
        page: &Page,
        tree: Tree,
        level: usize,
        frames: &FrameSource,
        disk: DiskId,
        range: ByteRange,
        visit: &mut dyn FnMut(&Entry, &[LeafHash]),
    ) -> Result<(), VaultError> {
        if level > LEVELS_MAX {
            return Err(frames.damaged(self.host, "its table has too many levels"));
        }
        match page {
            Page::Leaf(leaf) => visit_leaf(leaf, tree, disk, range, visit),
            Page::Inner(inner) => {
                for child in children_of_interest(inner, tree, disk, range) {
                    let page = self.child(child, tree, frames)?;
                    self.visit_page(&page, tree, level + 1, frames, disk, range, visit)?;
                }
            }
        }
        Ok(())
    }
}

/// Where entries of `tree` that overlap `range` can begin. A narrow entry begins in the granule it overlaps.
fn lowest_start(tree: Tree, range: ByteRange) -> u64 {
    match tree {
        Tree::Narrow => range.start / GRANULE_BYTES * GRANULE_BYTES,
        Tree::Wide => 0,
    }
}

fn visit_leaf(leaf: &LeafPage, tree: Tree, disk: DiskId, range: ByteRange, visit: &mut dyn FnMut(&Entry, &[LeafHash])) {
    let lowest = (disk, lowest_start(tree, range));
    let from = leaf.entries().partition_point(|e| (e.disk, e.range.start) < lowest);
    for (offset, entry) in leaf.entries()[from..].iter().enumerate() {
        if (entry.disk, entry.range.start) >= (disk, range.end()) {
            break;
        }
        if entry.range.end() > range.start {
            visit(entry, leaf.hashes(from + offset));
        }
    }
}

fn children_of_interest(inner: &InnerPage, tree: Tree, disk: DiskId, range: ByteRange) -> impl Iterator<Item = &Child> {
    let lowest = (disk, lowest_start(tree, range));
    // Entries with one key may continue in the next page, so the child before the first that begins at `lowest`
    // counts too.
    let from = inner.children.partition_point(|c| (c.first.0, c.first.1) < lowest).saturating_sub(1);
    let from = if tree == Tree::Wide { 0 } else { from };
    inner.children[from..]
        .iter()
        .take_while(move |c| (c.first.0, c.first.1) < (disk, range.end()))
        .filter(move |c| c.end > (disk, range.start))
}

/// A position in the sequence of a tree's entries.
pub(crate) struct Stream<'a> {
    table: &'a Table,
    tree: Tree,
    frames: &'a FrameSource,
    /// Inner pages above the leaf, each with the child taken.
    path: Vec<(Arc<Page>, usize)>,
    leaf: Option<(Arc<Page>, usize)>,
}

impl Stream<'_> {
    /// The entry at this position with its leaf hashes; `None` at the end.
    pub(crate) fn current(&self) -> Option<(&Entry, &[LeafHash])> {
        let (page, index) = self.leaf.as_ref()?;
        match &**page {
            Page::Leaf(leaf) => leaf.entries().get(*index).map(|entry| (entry, leaf.hashes(*index))),
            Page::Inner(_) => None,
        }
    }

    /// Moves to the next entry.
    pub(crate) fn advance(&mut self) -> Result<(), VaultError> {
        let Some((page, index)) = &mut self.leaf else { return Ok(()) };
        *index += 1;
        let exhausted = matches!(&**page, Page::Leaf(leaf) if *index >= leaf.entries().len());
        if exhausted { self.next_leaf() } else { Ok(()) }
    }

    fn next_leaf(&mut self) -> Result<(), VaultError> {
        self.leaf = None;
        while let Some((page, index)) = self.path.pop() {
            let Page::Inner(inner) = &*page else { continue };
            let Some(child) = inner.children.get(index + 1).copied() else { continue };
            self.path.push((Arc::clone(&page), index + 1));
            let next = self.table.child(&child, self.tree, self.frames)?;
            return self.descend(next);
        }
        Ok(())
    }

    fn descend(&mut self, mut page: Arc<Page>) -> Result<(), VaultError> {
        loop {
            let next = match self.step_down(&page) {
                ControlFlow::Break(()) => return if self.current().is_none() { self.next_leaf() } else { Ok(()) },
                ControlFlow::Continue(child) => child,
            };
            if self.path.len() > LEVELS_MAX {
                return Err(self.frames.damaged(self.table.host, "its table has too many levels"));
            }
            page = self.table.child(&next, self.tree, self.frames)?;
        }
    }

    fn step_down(&mut self, page: &Arc<Page>) -> ControlFlow<(), Child> {
        match &**page {
            Page::Leaf(_) => {
                self.leaf = Some((Arc::clone(page), 0));
                ControlFlow::Break(())
            }
            Page::Inner(inner) => match inner.children.first() {
                Some(child) => {
                    self.path.push((Arc::clone(page), 0));
                    ControlFlow::Continue(*child)
                }
                None => ControlFlow::Break(()),
            },
        }
    }
}
