//! Values as people read them: sizes in base-2 units, times in UTC, text that cannot command a terminal.

use std::time::{Duration, UNIX_EPOCH};

use tidepool_proto::turn::{Evidence, ExitStatus, Verdict};

/// The last millisecond of the year 9999; later times have no RFC 3339 form.
const MAX_MS: u64 = 253_402_300_799_999;

/// `512 B`, `1.5 KiB`, `3.0 GiB`.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    // 1023.95 would print as `1024.0`.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// Reads `65536`, `512M`, `2GiB`, `1.5g`: base 2, whatever the spelling.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no size; write it like 512M or 2GiB");
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(wrong()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(1 << shift).ok_or_else(wrong);
    }
    let value: f64 = number.parse().map_err(|_| wrong())?;
    let bytes = value * (1u64 << shift) as f64;
    if !bytes.is_finite() || bytes >= u64::MAX as f64 {
        return Err(wrong());
    }
    Ok(bytes as u64)
}

/// Milliseconds since the Unix epoch as `2026-01-31T12:00:00Z`.
pub(crate) fn time(ms: u64) -> String {
    if ms > MAX_MS {
        return format!("{ms} ms");
    }
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_millis(ms)).to_string()
}

/// Microseconds as `850 us`, `12.3 ms`, `4.2 s`.
pub(crate) fn micros(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} us"),
        1_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        1_000_000..600_000_000 => format!("{:.1} s", us as f64 / 1e6),
        _ => duration(us / 1_000_000),
    }
}

/// Seconds as `2h 3m 4s`.
pub(crate) fn duration(seconds: u64) -> String {
    humantime::format_duration(Duration::from_secs(seconds)).to_string()
}

/// `1 path`, `2 paths`.
pub(crate) fn count(n: u64, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

/// Text from inside a sandbox made harmless for a terminal: control characters, and the marks that reorder what is
/// read, are written as escapes.
pub(crate) fn clean(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        let reorders = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if c.is_control() || reorders {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// A verdict's name.
pub(crate) fn verdict(v: Verdict) -> &'static str {
    match v {
        Verdict::Clean => "clean",
        Verdict::Files => "files",
        Verdict::Processes => "processes",
        Verdict::Full => "full",
    }
}

/// How a command ended, in a word.
pub(crate) fn exit(status: Option<ExitStatus>) -> String {
    match status {
        None => "-".to_owned(),
        Some(ExitStatus::Code(code)) => code.to_string(),
        Some(ExitStatus::Signal(signal)) => format!("signal {signal}"),
        Some(ExitStatus::TimedOut) => "timed out".to_owned(),
    }
}

/// Evidence on one line: the totals and an example.
pub(crate) fn evidence(e: &Evidence) -> String {
    let mut parts = Vec::new();
    if e.paths_total > 0 {
        let mut text = count(e.paths_total, "path", "paths");
        if let Some(first) = e.paths.first() {
            text += &format!(" ({}", clean(first));
            text += if e.paths_total > 1 { ", ...)" } else { ")" };
        }
        parts.push(text);
    }
    if e.processes_total > 0 {
        parts.push(count(e.processes_total, "process", "processes"));
    }
    if let Some(first) = e.reasons.first() {
        let more = e.reasons.len() - 1;
        parts.push(match more {
            0 => clean(first),
            _ => format!("{} (+{more})", clean(first)),
        });
    }
    if !e.not_covered.is_empty() {
        parts.push(format!("not covered: {}", e.not_covered.len()));
    }
    if parts.is_empty() {
        "-".to_owned()
    } else {
        parts.join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_round_and_parse() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (3 << 30, "3.0 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
        for (text, bytes) in [
            ("0", 0),
            ("65536", 65536),
            ("512M", 512 << 20),
            ("2GiB", 2 << 30),
            ("1.5g", 3 << 29),
            ("1 k", 1024),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for bad in [
            "",
            "M",
            "-1",
            "1X",
            "1..2",
            "99999999999999999999",
            "18446744073709551615k",
        ] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_are_utc_and_never_panic() {
        assert_eq!(time(0), "1970-01-01T00:00:00Z");
        assert_eq!(time(1_767_225_600_000), "2026-01-01T00:00:00Z");
        assert_eq!(time(MAX_MS), "9999-12-31T23:59:59Z");
        assert_eq!(time(u64::MAX), format!("{} ms", u64::MAX));
        assert_eq!(micros(999), "999 us");
        assert_eq!(micros(12_340), "12.3 ms");
        assert_eq!(micros(4_200_000), "4.2 s");
        assert_eq!(micros(3_600_000_000), "1h");
    }

    #[test]
    fn terminal_commands_are_escaped() {
        assert_eq!(clean("a\x1b[31mb\nc"), "a\\u{1b}[31mb\\nc");
        assert_eq!(clean("\u{202e}x"), "\\u{202e}x");
        assert_eq!(clean("grün/ß 文"), "grün/ß 文");
    }
}
