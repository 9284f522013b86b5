//! Where text goes: data to stdout, everything else to stderr, and a reader that has gone ends the command quietly.
//!
//! Writes go straight to the file descriptors: Rust's `println!` panics when a pipe closes, and a descriptor that somebody
//! else made non-blocking would lose output.

use std::io::{self, IsTerminal};
use std::os::fd::BorrowedFd;

use comfy_table::{CellAlignment, ColumnConstraint, ContentArrangement, Table, Width, presets};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use serde::Serialize;

use crate::failure::Failure;

/// What the global options say about output.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ui {
    pub(crate) json: bool,
    pub(crate) quiet: bool,
    pub(crate) verbose: bool,
}

impl Ui {
    /// Prints a command's result: `value` as one line of JSON with `--json`, the text of `human` otherwise.
    pub(crate) fn result<T: Serialize>(
        self,
        value: &T,
        human: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        let mut text = if self.json {
            serde_json::to_string(value)
                .map_err(|e| Failure::failed(format!("cannot write the answer as JSON: {e}")))?
        } else {
            human()
        };
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        self.data(text.as_bytes())
    }

    /// Writes data to stdout.
    pub(crate) fn data(self, bytes: &[u8]) -> Result<(), Failure> {
        write_all(rustix::stdio::stdout(), bytes).map_err(|e| match e {
            // As other listing tools: who reads only the head of a list has what they wanted.
            Errno::PIPE => Failure::broken_pipe(0),
            e => Failure::failed(format!("cannot write to stdout: {}", io::Error::from(e))),
        })
    }

    /// Tells something on stderr that `--quiet` silences.
    pub(crate) fn note(self, text: &str) {
        if !self.quiet {
            stderr_line(&format!("tidepool: {text}"));
        }
    }

    /// Tells something on stderr that must not be missed: `--quiet` does not silence it.
    pub(crate) fn warn(self, text: &str) {
        stderr_line(&format!("tidepool: warning: {text}"));
    }

    /// Tells something on stderr only with `--verbose`.
    pub(crate) fn detail(self, text: &str) {
        if self.verbose {
            stderr_line(&format!("tidepool: {text}"));
        }
    }

    /// Prints why the command failed.
    pub(crate) fn failure(self, failure: &Failure) {
        if failure.is_quiet() {
            return;
        }
        stderr_line(&format!("tidepool: error: {}", failure.message));
        for hint in &failure.hints {
            stderr_line(&format!("tidepool: {hint}"));
        }
        if self.json && !failure.told {
            // Whether it can still be written changes nothing about the exit code.
            let _ = self.data((failure.to_json() + "\n").as_bytes());
        }
    }
}

/// Writes a line to stderr. There is nowhere to report that this failed.
fn stderr_line(text: &str) {
    let line = format!("{}\n", text.replace('\r', "\\r"));
    let _ = write_all(rustix::stdio::stderr(), line.as_bytes());
}

/// Writes everything, waiting where the descriptor is non-blocking.
pub(crate) fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let mut polled = [PollFd::from_borrowed_fd(fd, PollFlags::OUT)];
                match rustix::event::poll(&mut polled, None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(e) => return Err(e),
                }
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// A column of a table.
pub(crate) struct Column {
    name: &'static str,
    right: bool,
    flexible: bool,
}

/// A column of text.
pub(crate) const fn left(name: &'static str) -> Column {
    Column {
        name,
        right: false,
        flexible: false,
    }
}

/// A column of numbers.
pub(crate) const fn right(name: &'static str) -> Column {
    Column {
        name,
        right: true,
        flexible: false,
    }
}

/// A column of text that is cut on a narrow terminal; never cut elsewhere.
pub(crate) const fn flexible(name: &'static str) -> Column {
    Column {
        name,
        right: false,
        flexible: true,
    }
}

/// A plain table: a heading, one line for each row, two spaces between columns.
pub(crate) fn table(columns: &[Column], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(columns.iter().map(|c| c.name));
    for cells in rows {
        let mut row = comfy_table::Row::from(cells);
        row.max_height(1);
        table.add_row(row);
    }
    table.set_truncation_indicator("..");
    let width = stdout_width();
    match width {
        Some(width) => {
            table.set_content_arrangement(ContentArrangement::Dynamic);
            table.set_width(width);
        }
        None => {
            table.set_content_arrangement(ContentArrangement::Disabled);
        }
    }
    let last = columns.len().saturating_sub(1);
    for (i, spec) in columns.iter().enumerate() {
        let Some(column) = table.column_mut(i) else {
            continue;
        };
        column.set_padding((0, if i == last { 0 } else { 2 }));
        if spec.right {
            column.set_cell_alignment(CellAlignment::Right);
        }
        if width.is_some() {
            column.set_constraint(if spec.flexible {
                ColumnConstraint::LowerBoundary(Width::Fixed(8))
            } else {
                ColumnConstraint::ContentWidth
            });
        }
    }
    table.trim_fmt()
}

/// `name   value` lines, for one thing at a time. Values may have several lines.
pub(crate) fn fields(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 2;
    let mut out = String::new();
    for (name, value) in rows {
        for (i, line) in value.lines().enumerate() {
            let name = if i == 0 { name } else { "" };
            out += &format!("{name:<width$}{line}\n");
        }
    }
    out
}

/// The terminal's columns, if stdout is one.
fn stdout_width() -> Option<u16> {
    let out = io::stdout();
    if !out.is_terminal() {
        return None;
    }
    let size = rustix::termios::tcgetwinsize(&out).ok()?;
    (size.ws_col > 0).then_some(size.ws_col)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_plain_and_keep_long_cells() {
        let long = "x".repeat(300);
        let text = table(
            &[left("NAME"), right("SIZE"), flexible("COMMAND")],
            vec![
                vec!["a".into(), "1 B".into(), long.clone()],
                vec!["bcd".into(), "10 KiB".into(), "ls".into()],
            ],
        );
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert_eq!(lines[0], "NAME    SIZE  COMMAND");
        assert_eq!(lines[1], format!("a        1 B  {long}"));
        assert_eq!(lines[2], "bcd   10 KiB  ls");
    }

    #[test]
    fn fields_align_and_carry_several_lines() {
        let text = fields(&[
            ("name", "a".into()),
            ("warnings", "x\ny".into()),
            ("none", String::new()),
        ]);
        assert_eq!(text, "name      a\nwarnings  x\n          y\n");
    }
}
