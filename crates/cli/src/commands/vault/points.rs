//! `farshore vault points`: the moments to which a machine can be recovered, and the gaps between them.
//!
//! A machine that came home from a branch has a history of several chains. All of it is listed: what the newest chain
//! does not reach back to is on its parent's. Points of a parent after the position that was branched from were left
//! behind; they can be opened like any other.

use clap::Args;
use replication::{ChainId, Cut, CutKind, Generation, MarkerKind, PointTime, SequenceNumber};
use serde_json::json;
use vault::points::{Points as ChainPoints, Which};
use vault::{Catalog, ChainHistory, Gap, GapScope, GeometryChange, Moment};
use world::WallTime;

use crate::failure::{Done, usage};
use crate::moment;
use crate::output::{Output, Table, duration_ns};
use crate::vault_access::{ANCESTORS_MAX, KeyOptions, VaultPlace, choose, find_or_only, warn_if_rolled_back};

/// Options of `vault points`.
#[derive(Debug, Args)]
pub(crate) struct Points {
    /// Machine or branch; may be left out if the vault holds one machine
    machine: Option<String>,
    #[command(flatten)]
    place: VaultPlace,
    #[command(flatten)]
    keys: KeyOptions,
    /// Only points from this moment on: a time, or -90s before the newest
    #[arg(long, value_name = "MOMENT", allow_hyphen_values = true)]
    from: Option<String>,
    /// Only points up to this moment
    #[arg(long, value_name = "MOMENT", allow_hyphen_values = true)]
    to: Option<String>,
    /// At most this many, the newest
    #[arg(long, value_name = "COUNT", default_value_t = 100)]
    limit: usize,
    /// Only named points
    #[arg(long)]
    markers: bool,
    /// Only the point that this moment chooses, and why
    #[arg(long, value_name = "MOMENT", allow_hyphen_values = true, conflicts_with_all = ["from", "to", "markers"])]
    at: Option<String>,
}

impl Points {
    pub(crate) fn run(&self, output: Output) -> Done {
        let vault = self.place.unlock(&self.keys)?;
        let (store, keys) = (vault.store(), vault.keys());
        let catalog = Catalog::load(store, keys)?;
        let named = find_or_only(store, &catalog, self.machine.as_deref())?;
        if let Some(at) = &self.at {
            let (history, point) = choose(store, keys, named.chain, &moment::parse(at)?)?;
            let lacking: Vec<_> = point.lacking.iter().map(gap_object).collect();
            let mut object = cut_object(&point.cut);
            object["reason"] = json!(point.reason);
            object["lacking"] = json!(lacking);
            object["chain"] = json!(history.chain.to_string());
            object["skew_ns"] = json!(history.skew_ns);
            output.object(&object)?;
            output.line(format!("@{}  {}", point.cut.sequence, WallTime(point.cut.time.0)))?;
            output.line(&point.reason)?;
            return point.lacking.iter().try_for_each(|gap| output.line(format!("lacking: {gap}")));
        }
        let mut history = ChainHistory::load(store, keys, named.chain)?;
        warn_if_rolled_back(&vault, &history)?;
        let newest = history.proven_through;
        let tip = (newest, history.skew_ns);
        let from = self.from.as_deref().map_or(Ok(PointTime(0)), |text| limit_of(text, newest))?;
        let to = self.to.as_deref().map_or(Ok(PointTime(u64::MAX)), |text| limit_of(text, newest))?;
        let which = if self.markers { Which::Markers } else { Which::All };
        let limit = self.limit.max(1);
        let mut stretches: Vec<Stretch> = Vec::new();
        let (mut room, mut to, mut left) = (limit, to, None);
        for _ in 0..ANCESTORS_MAX {
            let points = ChainPoints::new(store, keys, &history);
            let cuts = points.between(from, to, room, which)?;
            room -= cuts.len();
            let shown_from = match cuts.first() {
                Some(first) if room == 0 => first.time,
                _ => from,
            };
            let visible = |gap: &&Gap| gap.time <= to && gap.until.is_none_or(|(_, end)| end >= shown_from);
            let gaps = points.gaps().iter().filter(visible).cloned().collect();
            let shown = |change: &GeometryChange| {
                let first = cuts.first().is_some_and(|first: &Cut| first.sequence <= change.sequence);
                change.geometry.is_removal() && (first || shown_from == PointTime(0))
            };
            let removals = history.geometries().into_iter().filter(shown).collect();
            stretches.push(Stretch { chain: history.chain, left, cuts, gaps, removals });
            let began = points.resolve(&Moment::Sequence(Generation(1).base())).map(|point| point.cut.time);
            let (Some(parent), true, Ok(began)) = (history.parent, room > 0, began) else { break };
            if began < from {
                break;
            }
            // Before its first point a branch is what its parent was.
            to = to.min(PointTime(began.0.saturating_sub(1)));
            left = Some(parent.sequence);
            history = ChainHistory::load(store, keys, parent.chain)?;
        }
        stretches.reverse();
        self.print(output, tip, &named.name, &stretches, room == 0)
    }

    fn print(
        &self,
        output: Output,
        (newest, skew_ns): (PointTime, i64),
        name: &str,
        stretches: &[Stretch],
        full: bool,
    ) -> Done {
        let mut table = Table::new(&["TIME", "POSITION", "POINT"]);
        for (index, stretch) in stretches.iter().enumerate() {
            if index > 0 {
                table.across(format!("  ── from here on chain {}", &stretch.chain.to_string()[..8]));
            }
            stretch.print(output, &mut table)?;
        }
        output.table(&table)?;
        let skew = duration_ns(skew_ns.unsigned_abs());
        let direction = if skew_ns < 0 { "ahead of" } else { "behind" };
        output.remark(format!(
            "{name} is current to {}; its clock is {skew} {direction} the server's",
            WallTime(newest.0)
        ))?;
        match full {
            true => output.remark(format!("the newest {} points; more with --limit, --from and --to", self.limit)),
            false => Ok(()),
        }
    }
}

/// What is listed of one chain.
struct Stretch {
    chain: ChainId,
    /// Where the next chain branched from this one: what comes after was left behind.
    left: Option<SequenceNumber>,
    cuts: Vec<Cut>,
    gaps: Vec<Gap>,
    /// Disks that were taken out of protection behind these positions.
    removals: Vec<GeometryChange>,
}

impl Stretch {
    fn print(&self, output: Output, table: &mut Table) -> Done {
        let chain = self.chain.to_string();
        let show_gap = |gap: &Gap, table: &mut Table| {
            gap_row(table, gap);
            let mut object = gap_object(gap);
            object["chain"] = json!(chain);
            output.object(&object)
        };
        let show_removal = |removal: &GeometryChange, table: &mut Table| {
            let (disk, path) = (removal.geometry.disk, &removal.geometry.path);
            table.across(format!("  ── {disk} ({path}) is not protected any more: later points do not have it"));
            output.object(&json!({
                "type": "removal", "behind": removal.sequence.to_string(), "disk": disk.0, "path": path, "chain": chain,
            }))
        };
        let mut gaps = self.gaps.iter().peekable();
        let mut removals = self.removals.iter().peekable();
        for cut in &self.cuts {
            while let Some(removal) = removals.next_if(|removal| removal.sequence < cut.sequence) {
                show_removal(removal, table)?;
            }
            while let Some(gap) = gaps.next_if(|gap| gap.after < cut.sequence) {
                show_gap(gap, table)?;
            }
            let left_behind = self.left.is_some_and(|left| cut.sequence > left);
            let note = if left_behind { ", left behind" } else { "" };
            let row = vec![WallTime(cut.time.0).to_string(), format!("@{}", cut.sequence), kind(cut) + note];
            table.row(row);
            let mut object = cut_object(cut);
            object["chain"] = json!(chain);
            object["left_behind"] = json!(left_behind);
            output.object(&object)?;
        }
        removals.try_for_each(|removal| show_removal(removal, table))?;
        gaps.try_for_each(|gap| show_gap(gap, table))
    }
}

/// A bound of the list: a time, or a way back from the newest moment.
fn limit_of(text: &str, newest: PointTime) -> Done<PointTime> {
    match moment::parse(text)? {
        Moment::At(time) => Ok(time),
        Moment::Back(seconds) => Ok(PointTime(newest.0.saturating_sub(seconds.saturating_mul(1_000_000_000)))),
        Moment::Latest => Ok(newest),
        _ => Err(usage(
            format!("{text:?} is no bound of a list"),
            "points are listed by time",
            "write \"2026-11-22 14:03:07\" (UTC) or -90s",
        )),
    }
}

fn kind(cut: &Cut) -> String {
    match &cut.kind {
        CutKind::Second => "second".to_owned(),
        CutKind::Marker { kind: kind @ MarkerKind::Attempted { failed }, name } => {
            format!("{name:?}, {}; application-consistent was asked for: {failed}", promise(kind))
        }
        CutKind::Marker { kind, name } => format!("{name:?}, {}", promise(kind)),
        CutKind::HealEnd => "end of a heal".to_owned(),
        CutKind::GenerationEnd => "last before a break or a change of writer".to_owned(),
    }
}

fn promise(kind: &MarkerKind) -> &'static str {
    match kind {
        MarkerKind::Crash | MarkerKind::Attempted { .. } => "crash-consistent",
        MarkerKind::Application => "application-consistent",
        MarkerKind::Final => "final, nothing in flight",
    }
}

fn gap_row(table: &mut Table, gap: &Gap) {
    let lasted =
        gap.until.map_or(String::new(), |(_, end)| format!(", {}", duration_ns(end.0.saturating_sub(gap.time.0))));
    table.across(format!("  ── gap: {gap}{lasted}"));
}

fn cut_object(cut: &Cut) -> serde_json::Value {
    let (kind, name, promise) = match &cut.kind {
        CutKind::Second => ("second", None, None),
        CutKind::Marker { kind, name } => ("marker", Some(name), Some(promise(kind))),
        CutKind::HealEnd => ("heal-end", None, None),
        CutKind::GenerationEnd => ("generation-end", None, None),
    };
    let failed = match &cut.kind {
        CutKind::Marker { kind: MarkerKind::Attempted { failed }, .. } => Some(failed),
        _ => None,
    };
    json!({
        "type": "point", "sequence": cut.sequence.to_string(), "time": WallTime(cut.time.0).to_string(),
        "time_ns": cut.time.0, "kind": kind, "marker": name, "consistency": promise,
        "failed": failed,
    })
}

fn gap_object(gap: &Gap) -> serde_json::Value {
    json!({
        "type": "gap", "after": gap.after.to_string(), "from": WallTime(gap.time.0).to_string(), "from_ns": gap.time.0,
        "until": gap.until.map(|(_, time)| WallTime(time.0).to_string()),
        "until_ns": gap.until.map(|(_, time)| time.0), "until_sequence": gap.until.map(|(at, _)| at.to_string()),
        "whole_machine": gap.scope == GapScope::Machine, "scope": gap.scope.to_string(), "cause": gap.cause,
    })
}
