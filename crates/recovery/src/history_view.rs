//! A chain together with everything below it, ready to be read.

use std::sync::Arc;

use replication::{ChainId, Position, SequenceNumber};
use vault::layer::LayerRef;
use vault::view::{ChainView, ViewBelow};
use vault::view_source::FrameSource;
use vault::{ChainHistory, VaultError};

/// Most chains below one another. Each is a branch of a branch; a longer line is a mistake or an attack.
const DEPTH_MAX: usize = 256;

/// The history of `chain` and a view of it and of every chain below.
///
/// # Errors
/// Those of the vault; [`VaultError::LimitExceeded`] if chains lie deeper than anyone would branch.
pub fn open_chain(source: &Arc<FrameSource>, chain: ChainId) -> Result<(ChainHistory, Arc<ChainView>), VaultError> {
    let history = ChainHistory::load(source.store(), source.keys(), chain)?;
    let view = view_of(source, &history)?;
    Ok((history, view))
}

/// A view of `history` and of every chain below.
///
/// # Errors
/// As [`open_chain`].
pub fn view_of(source: &Arc<FrameSource>, history: &ChainHistory) -> Result<Arc<ChainView>, VaultError> {
    let mut below: Vec<(Vec<LayerRef>, SequenceNumber)> = Vec::new();
    let mut parent: Option<Position> = history.parent;
    while let Some(position) = parent {
        if below.len() == DEPTH_MAX {
            let (what, limit) = ("the number of chains below one another", DEPTH_MAX as u64);
            return Err(VaultError::LimitExceeded { what, value: limit + 1, limit });
        }
        let ancestor = ChainHistory::load(source.store(), source.keys(), position.chain)?;
        let mut layers = ancestor.layers();
        layers.retain(|layer| layer.first <= position.sequence);
        below.push((layers, position.sequence));
        parent = ancestor.parent;
    }
    let mut view: Option<ViewBelow> = None;
    for (layers, at) in below.into_iter().rev() {
        view = Some(ViewBelow { view: Arc::new(ChainView::new(Arc::clone(source), layers, view)), at });
    }
    Ok(Arc::new(ChainView::new(Arc::clone(source), history.layers(), view)))
}
