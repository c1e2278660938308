//! The tables, for the terminal and for `docs/benchmarks.md`.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::disk::{Reference, describe_size};
use super::promises::Promise;
use super::{MIB, Measured, Question, Row};

const PAGE: &str = "docs/benchmarks.md";
/// What stands between these lines is ours; the text around them is kept.
const BEGIN: &str = "<!-- measured: begin -->";
const END: &str = "<!-- measured: end -->";

/// What the figures depend on.
#[derive(Debug)]
pub(super) struct Machine {
    date: String,
    processor: String,
    cores: usize,
    memory_bytes: u64,
    kernel: String,
}

impl Machine {
    pub(super) fn here() -> Result<Machine> {
        let date = Command::new("date").args(["-u", "+%Y-%m-%d"]).output().context("cannot run date")?;
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            line.split_once(':').map(|(_, value)| value.trim().to_owned())
        };
        let processors = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kib = field(&memory, "MemTotal").and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Ok(Machine {
            date: String::from_utf8_lossy(&date.stdout).trim().to_owned(),
            processor: field(&processors, "model name").unwrap_or_else(|| "unknown processor".to_owned()),
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            memory_bytes: kib.unwrap_or(0) * 1024,
            kernel: kernel.trim().to_owned(),
        })
    }
}

/// The whole measured part as Markdown that reads well on a terminal too.
pub(super) fn render(measured: &Measured, left_out: &[String], disk: &Reference, machine: &Machine) -> String {
    let mut text = String::new();
    let mut line = |words: String| {
        text.push_str(&words);
        text.push('\n');
    };
    line(format!(
        "{}; {} cores of {}, {} memory, Linux {}.",
        machine.date,
        machine.cores,
        machine.processor,
        describe_size(machine.memory_bytes),
        machine.kernel
    ));
    line(format!(
        "Disk: {} ext4 with {} used (system files, a toolchain, 1/16 random), page cache warm; then {} of random 4 KiB writes.",
        describe_size(disk.size),
        describe_size(disk.used_bytes),
        describe_size(disk.changed_bytes)
    ));
    let rows = &measured.rows;
    let mut promises = measured.promises.clone();
    promises.extend(promises_about(rows));
    if !promises.is_empty() {
        promises.sort_by_key(|promise| promise.promised);
        let mut cells = vec![["what", "target", "measured", ""].map(str::to_owned).to_vec()];
        cells.extend(promises.iter().map(Promise::cells));
        line(format!("\n### What was promised\n\n{}", aligned(&cells, &[]).trim_end()));
    }
    let mut questions: Vec<Question> = rows.iter().map(|row| row.question).collect();
    questions.sort_unstable();
    questions.dedup();
    for question in questions {
        let rows: Vec<&Row> = rows.iter().filter(|row| row.question == question).collect();
        line(format!("\n### {}\n", question.title()));
        line(table(question, &rows, disk).trim_end().to_owned());
    }
    if !measured.remarks.is_empty() {
        line("\n### Remarks\n".to_owned());
        measured.remarks.iter().for_each(|remark| line(format!("* {remark}")));
    }
    if !left_out.is_empty() {
        line(format!("\nLeft out: {}.", left_out.join("; ")));
    }
    text
}

fn table(question: Question, rows: &[&Row], disk: &Reference) -> String {
    let wall = |row: &Row| row.usage.wall.as_secs_f64();
    let time_base = rows.iter().find(|row| row.name == question.time_baseline()).map(|row| wall(row));
    let stored_base = rows.iter().find(|row| row.name == question.stored_baseline()).and_then(|row| row.stored_bytes);
    let time_title = format!("× {}", question.time_baseline());
    let stored_title = format!("× {}", question.stored_baseline());
    let titles = ["what", "wall", &time_title, "used bytes per s", "user", "system", "memory"];
    let mut titles = titles.map(str::to_owned).to_vec();
    let stores = rows.iter().any(|row| row.stored_bytes.is_some());
    if stores {
        titles.extend(["stored".to_owned(), stored_title]);
    }
    titles.push("note".to_owned());
    let mut cells = vec![titles];
    let shown = |ratio: Option<f64>| ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}"));
    for row in rows {
        let time_ratio = time_base.map(|base| wall(row) / base);
        let stored_ratio = row.stored_bytes.zip(stored_base).map(|(bytes, base)| bytes as f64 / base as f64);
        let mut cell = vec![
            row.name.clone(),
            seconds(row.usage.wall),
            shown(time_ratio),
            format!("{:.0} MiB", disk.used_bytes as f64 / MIB as f64 / wall(row).max(0.001)),
            seconds(row.usage.user),
            seconds(row.usage.system),
            format!("{} MiB", row.usage.resident_bytes_max / MIB),
        ];
        if stores {
            cell.push(row.stored_bytes.map_or_else(String::new, |bytes| format!("{} MiB", bytes / MIB)));
            cell.push(shown(stored_ratio));
        }
        let verdicts = [
            verdict("time", row.target.time_ratio_max.map(|(_, max)| max), time_ratio),
            verdict("stored", row.target.stored_ratio_max.map(|(_, max)| max), stored_ratio),
            row.note.clone(),
        ];
        cell.push(verdicts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; "));
        cells.push(cell);
    }
    let figures: Vec<usize> = (1..cells[0].len() - 1).collect();
    aligned(&cells, &figures)
}

/// The promises that are ratios between rows.
fn promises_about(rows: &[Row]) -> Vec<Promise> {
    let mut promises = Vec::new();
    for row in rows {
        let find = |name: &str| rows.iter().find(|other| other.question == row.question && other.name == name);
        let wall = |row: &Row| row.usage.wall.as_secs_f64();
        if let Some((promised, max)) = row.target.time_ratio_max
            && let Some(base) = find(row.question.time_baseline())
        {
            let ratio = wall(row) / wall(base);
            let rate = if max < 1.0 { format!("{:.1} × its rate", 1.0 / ratio) } else { format!("{ratio:.2} ×") };
            let measured = format!("{rate} ({} against {})", seconds(row.usage.wall), seconds(base.usage.wall));
            promises.push(Promise::new(promised, measured, ratio <= max));
        }
        if let Some((promised, max)) = row.target.stored_ratio_max
            && let Some(base) = find(row.question.stored_baseline()).and_then(|base| base.stored_bytes)
            && let Some(stored) = row.stored_bytes
        {
            let ratio = stored as f64 / base as f64;
            let measured = format!("{ratio:.3} × ({} MiB against {} MiB)", stored / MIB, base / MIB);
            promises.push(Promise::new(promised, measured, ratio <= max));
        }
    }
    promises
}

/// What became of a promise; empty without one.
fn verdict(what: &str, ratio_max: Option<f64>, ratio: Option<f64>) -> String {
    match (ratio_max, ratio) {
        (None, _) => String::new(),
        (Some(max), None) => format!("{what} target ≤ {max:.2}: nothing to compare with"),
        (Some(max), Some(ratio)) if ratio <= max => format!("{what} target ≤ {max:.2} met"),
        (Some(max), Some(_)) => format!("{what} target ≤ {max:.2} MISSED"),
    }
}

fn seconds(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds < 10.0 { format!("{seconds:.2} s") } else { format!("{seconds:.1} s") }
}

/// A Markdown table with columns of equal width; the first row is the header. The columns `figures` stand right.
fn aligned(rows: &[Vec<String>], figures: &[usize]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0).max(3);
    let is_text = |column: usize| !figures.contains(&column);
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        text.push('|');
        for (column, cell) in row.iter().enumerate() {
            let width = width(column);
            let written =
                if is_text(column) { write!(text, " {cell:<width$} |") } else { write!(text, " {cell:>width$} |") };
            written.expect("writing to a string cannot fail");
        }
        text.push('\n');
        if index == 0 {
            text.push('|');
            for column in 0..columns {
                let dashes = "-".repeat(width(column));
                text.push_str(&if is_text(column) { format!(" {dashes} |") } else { format!(" {dashes}:|") });
            }
            text.push('\n');
        }
    }
    text
}

/// Puts the measured part into the page, keeping the text around it.
pub(super) fn write(root: &Path, measured: &str) -> Result<()> {
    let path = root.join(PAGE);
    let page = fs::read_to_string(&path).with_context(|| format!("cannot read {PAGE}"))?;
    let page =
        replace_measured(&page, measured).with_context(|| format!("{PAGE} lacks the lines {BEGIN} and {END}"))?;
    fs::write(&path, page).with_context(|| format!("cannot write {PAGE}"))?;
    println!("written to {PAGE}");
    Ok(())
}

fn replace_measured(page: &str, measured: &str) -> Option<String> {
    let (before, rest) = page.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n{}\n{END}{after}", measured.trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn promises_are_judged_and_never_dropped() {
        assert_eq!(verdict("time", None, Some(3.0)), "");
        assert!(verdict("time", Some(1.5), Some(1.5)).ends_with("met"));
        assert!(verdict("time", Some(1.5), Some(1.51)).ends_with("MISSED"));
        assert!(verdict("stored", Some(1.0), None).contains("nothing to compare"));
    }

    #[test]
    fn columns_are_aligned_and_figures_stand_right() {
        let rows = [["what", "wall", "note"], ["a", "1.0 s", "—"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(aligned(&rows, &[1]), "| what |  wall | note |\n| ---- | -----:| ---- |\n| a    | 1.0 s | —    |\n");
    }

    #[test]
    fn only_the_measured_part_of_the_page_is_replaced() {
        let page = format!("# Title\n\n{BEGIN}\nold\n{END}\n\nNotes.\n");
        let new = replace_measured(&page, "new\n").unwrap();
        assert_eq!(new, format!("# Title\n\n{BEGIN}\nnew\n{END}\n\nNotes.\n"));
        assert_eq!(replace_measured(&new, "new").unwrap(), new);
        assert!(replace_measured("# Title", "new").is_none());
    }
}
