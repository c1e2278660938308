//! What commands print: lines and tables for people, one object per line with `--json`.

use std::io::{self, IsTerminal, Write};

use serde_json::Value;

use crate::failure::{Done, io_failure};

/// Columns assumed when the output is no terminal.
const COLUMNS_DEFAULT: usize = 100;
/// Below this, tables overflow rather than become unreadable.
const COLUMNS_MIN: usize = 40;

/// How a command talks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    /// One JSON object per line instead of text.
    pub(crate) json: bool,
    /// Only what was asked for; no remarks.
    pub(crate) quiet: bool,
    /// Answer yes to every question.
    pub(crate) yes: bool,
}

impl Output {
    /// A line of the answer, for people.
    pub(crate) fn line(&self, text: impl AsRef<str>) -> Done {
        if self.json { Ok(()) } else { write_line(text.as_ref()) }
    }

    /// A remark that `--quiet` leaves out, for people.
    pub(crate) fn remark(&self, text: impl AsRef<str>) -> Done {
        if self.quiet { Ok(()) } else { self.line(text) }
    }

    /// A sentence that would only be in the way of what standard output is redirected for.
    pub(crate) fn aside(&self, text: impl AsRef<str>) {
        if !self.quiet && !self.json {
            eprintln!("{}", text.as_ref());
        }
    }

    /// An object of the answer, for programs.
    pub(crate) fn object(&self, value: &Value) -> Done {
        if self.json { write_line(&value.to_string()) } else { Ok(()) }
    }

    /// A table, for people.
    pub(crate) fn table(&self, table: &Table) -> Done {
        if self.json { Ok(()) } else { write_text(&table.render(columns())) }
    }

    /// Whether progress is drawn: a terminal is watching and nothing else is written to it.
    pub(crate) fn draws_progress(&self) -> bool {
        !self.json && !self.quiet && io::stderr().is_terminal()
    }
}

fn write_line(text: &str) -> Done {
    write_text(&format!("{text}\n"))
}

fn write_text(text: &str) -> Done {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // Whoever reads has seen enough, as with `| head`.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => Err(io_failure("the answer cannot be written to standard output", &error)),
        Ok(()) => Ok(()),
    }
}

/// Width of the terminal in columns.
pub(crate) fn columns() -> usize {
    let width = rustix::termios::tcgetwinsize(io::stdout()).map_or(0, |size| usize::from(size.ws_col));
    if width == 0 { COLUMNS_DEFAULT } else { width.max(COLUMNS_MIN) }
}

/// Rows under headings. The last column takes what is left of the width and is cut there; lines across all columns are
/// wrapped.
pub(crate) struct Table {
    headings: Vec<&'static str>,
    right: Vec<bool>,
    rows: Vec<Row>,
}

enum Row {
    Cells(Vec<String>),
    /// A line across all columns.
    Across(String),
}

impl Table {
    /// A table with these headings; those that begin with `>` are of right-aligned columns.
    pub(crate) fn new(headings: &[&'static str]) -> Table {
        let right = headings.iter().map(|heading| heading.starts_with('>')).collect();
        Table {
            headings: headings.iter().map(|heading| heading.trim_start_matches('>')).collect(),
            right,
            rows: vec![],
        }
    }

    pub(crate) fn row(&mut self, cells: Vec<String>) {
        assert_eq!(cells.len(), self.headings.len(), "a row has a cell per heading");
        self.rows.push(Row::Cells(cells));
    }

    pub(crate) fn across(&mut self, text: impl Into<String>) {
        self.rows.push(Row::Across(text.into()));
    }

    pub(crate) fn render(&self, columns: usize) -> String {
        let mut widths: Vec<usize> = self.headings.iter().map(|heading| heading.chars().count()).collect();
        for row in &self.rows {
            if let Row::Cells(cells) = row {
                for (width, cell) in widths.iter_mut().zip(cells) {
                    *width = (*width).max(cell.chars().count());
                }
            }
        }
        let mut text = String::new();
        let headings: Vec<String> = self.headings.iter().map(|heading| (*heading).to_owned()).collect();
        self.render_row(&headings, &widths, columns, &mut text);
        for row in &self.rows {
            match row {
                Row::Cells(cells) => self.render_row(cells, &widths, columns, &mut text),
                // Nothing of it is told elsewhere, so nothing is cut.
                Row::Across(line) => {
                    for line in wrap(line, columns) {
                        text.push_str(&line);
                        text.push('\n');
                    }
                }
            }
        }
        text
    }

    fn render_row(&self, cells: &[String], widths: &[usize], columns: usize, text: &mut String) {
        let mut line = String::new();
        for (column, cell) in cells.iter().enumerate() {
            let width = widths[column];
            match (self.right[column], column + 1 == cells.len()) {
                (true, _) => line.push_str(&format!("{cell:>width$}")),
                (false, true) => line.push_str(cell),
                (false, false) => line.push_str(&format!("{cell:<width$}")),
            }
            if column + 1 < cells.len() {
                line.push_str("  ");
            }
        }
        text.push_str(cut(line.trim_end(), columns).trim_end());
        text.push('\n');
    }
}

/// `line`, with an ellipsis if it is longer than `columns`.
fn cut(line: &str, columns: usize) -> String {
    if line.chars().count() <= columns {
        return line.to_owned();
    }
    let kept: String = line.chars().take(columns.saturating_sub(1)).collect();
    format!("{kept}…")
}

/// `line` in lines of at most `columns`; all but the first are indented further. A word that is longer than a line is split.
fn wrap(line: &str, columns: usize) -> Vec<String> {
    const HANG: usize = 5;
    let indent = line.chars().take_while(|character| *character == ' ').count();
    let hang = (indent + HANG).min(columns / 2);
    let mut lines = Vec::new();
    let mut current = " ".repeat(indent.min(columns / 2));
    let mut width = current.len();
    let mut empty = true;
    for word in line.split(' ').filter(|word| !word.is_empty()) {
        let mut rest: Vec<char> = word.chars().collect();
        if !empty && width + 1 + rest.len() > columns {
            lines.push(std::mem::replace(&mut current, " ".repeat(hang)));
            (width, empty) = (hang, true);
        }
        if !empty {
            current.push(' ');
            width += 1;
        }
        while width + rest.len() > columns {
            let after = rest.split_off(columns - width);
            current.extend(rest);
            lines.push(std::mem::replace(&mut current, " ".repeat(hang)));
            (rest, width) = (after, hang);
        }
        width += rest.len();
        current.extend(rest);
        empty = false;
    }
    lines.push(current);
    lines
}

/// A number of bytes as people read it: `1.50 GiB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if value < 10.0 {
        2
    } else if value < 100.0 {
        1
    } else {
        0
    };
    format!("{value:.digits$} {}", UNITS[unit])
}

/// A length of time as people read it: `4.20 s`, `3 min 05 s`, `2 d 04 h`.
pub(crate) fn duration_ns(nanoseconds: u64) -> String {
    let seconds = nanoseconds / 1_000_000_000;
    match seconds {
        0..60 => format!("{:.2} s", nanoseconds as f64 / 1e9),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {:02} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align_and_fit() {
        let mut table = Table::new(&["NAME", ">SIZE", "NOTE"]);
        table.row(vec!["web-1".into(), "2 GiB".into(), "fine".into()]);
        table.across("── gap ──");
        table.row(vec!["db".into(), "100 GiB".into(), "a very long remark about it".into()]);
        let text = table.render(30);
        let expected = "NAME      SIZE  NOTE\nweb-1    2 GiB  fine\n── gap ──\ndb     100 GiB  a very long r…\n";
        assert_eq!(text, expected);
        assert!(text.lines().all(|line| line.chars().count() <= 30));
    }

    #[test]
    fn a_line_across_is_wrapped_and_never_cut() {
        let mut table = Table::new(&["TIME"]);
        table.across("  ── gap: after @1.5, the process server's journal was lost with /a/very/long/path/of/something");
        let text = table.render(40);
        let expected = "TIME\n  ── gap: after @1.5, the process\n       server's journal was lost with\n       \
                        /a/very/long/path/of/something\n";
        assert_eq!(text, expected);
        assert_eq!(wrap("abcdefghijkl", 5), ["abcde", "  fgh", "  ijk", "  l"]);
        assert_eq!(wrap("", 10), [""]);
        for columns in 4..60 {
            let lines = wrap("  one two three four five a-word-that-is-rather-long six", columns);
            assert!(lines.iter().all(|line| line.chars().count() <= columns), "{columns}: {lines:?}");
            let words: String = lines.concat().chars().filter(|character| *character != ' ').collect();
            assert_eq!(words, "onetwothreefourfivea-word-that-is-rather-longsix");
        }
    }

    #[test]
    fn figures_have_three_digits() {
        for (count, text) in
            [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (20 << 30, "20.0 GiB"), (300 << 20, "300 MiB")]
        {
            assert_eq!(bytes(count), text);
        }
        for (ns, text) in
            [(4_200_000_000, "4.20 s"), (185_000_000_000, "3 min 05 s"), (187_200_000_000_000, "2 d 04 h")]
        {
            assert_eq!(duration_ns(ns), text);
        }
    }
}
