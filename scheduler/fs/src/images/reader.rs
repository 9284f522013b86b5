//! Reading a tar entry by entry: ustar, GNU long names and PAX records, with every length bounded before it is read.
//!
//! Its own reader because PAX values are binary (a file capability may hold a newline) and headers of an archive that is not trusted must not decide
//! how much memory is taken. Sparse entries are refused: they would have to be made by `tar --sparse`, which image tools do not use.

use std::io::Read;

use super::ImageError;

const BLOCK: usize = 512;
/// The most bytes one extended header may have: an attribute's value is at most 64 KiB.
const MAX_PAX: u64 = 1 << 20;
const MAX_LONG_NAME: u64 = 1 << 16;

/// Keys and values of an extended header.
type Records = Vec<(Vec<u8>, Vec<u8>)>;

/// One entry. Its content is read from [`TarReader::content`].
#[derive(Debug, Default)]
pub(super) struct Entry {
    pub(super) path: Vec<u8>,
    pub(super) link: Vec<u8>,
    /// The type flag: `0` file, `1` hard link, `2` symbolic link, `3` `4` devices, `5` directory, `6` fifo.
    pub(super) kind: u8,
    pub(super) mode: u64,
    pub(super) uid: u64,
    pub(super) gid: u64,
    pub(super) mtime: (i64, u32),
    pub(super) size: u64,
    /// Extended attributes as they are recorded.
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

pub(super) struct TarReader<R> {
    inner: R,
    /// Content and padding of the current entry that were not read yet.
    content: u64,
    padding: u64,
    ended: bool,
    /// Bytes read so far.
    position: u64,
}

impl<R: Read> TarReader<R> {
    pub(super) fn new(inner: R) -> Self {
        Self {
            inner,
            content: 0,
            padding: 0,
            ended: false,
            position: 0,
        }
    }

    /// Where in the archive the content of the entry that [`Self::next`] gave begins, in bytes, as long as none of it was read.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// The content of the entry that [`Self::next`] gave.
    pub(super) fn content(&mut self) -> Content<'_, R> {
        Content(self)
    }

    /// The next entry; none at the end mark.
    pub(super) fn next(&mut self) -> Result<Option<Entry>, ImageError> {
        let mut long: Entry = Entry::default();
        let mut pax = Records::new();
        loop {
            self.skip()?;
            if self.ended {
                return Ok(None);
            }
            let mut header = [0; BLOCK];
            self.exact(&mut header)?;
            if header == [0; BLOCK] {
                self.ended = true;
                return Ok(None);
            }
            let entry = parse(&header)?;
            self.content = entry.size;
            self.padding = padding(entry.size);
            match entry.kind {
                b'L' => long.path = until_nul(&self.small(entry.size, MAX_LONG_NAME)?).to_vec(),
                b'K' => long.link = until_nul(&self.small(entry.size, MAX_LONG_NAME)?).to_vec(),
                b'x' => pax = records(&self.small(entry.size, MAX_PAX)?)?,
                b'g' => drop(self.small(entry.size, MAX_PAX)?),
                _ => return self.complete(entry, long, pax).map(Some),
            }
        }
    }

    /// Reads on behind the end mark, so that a compressed archive's own checksum is checked. At most `max` bytes may follow.
    pub(super) fn finish(mut self, max: u64) -> Result<(), ImageError> {
        let mut rest = self.inner.by_ref().take(max);
        let n = std::io::copy(&mut rest, &mut std::io::sink()).map_err(damaged)?;
        match n < max {
            true => Ok(()),
            false => Err(damaged("too much follows its end")),
        }
    }

    fn complete(
        &mut self,
        mut entry: Entry,
        long: Entry,
        pax: Records,
    ) -> Result<Entry, ImageError> {
        if !long.path.is_empty() {
            entry.path = long.path;
        }
        if !long.link.is_empty() {
            entry.link = long.link;
        }
        for (key, value) in pax {
            let number = || -> Result<u64, ImageError> {
                let text = std::str::from_utf8(&value).ok();
                text.and_then(|t| t.parse().ok())
                    .ok_or_else(|| damaged("a number in an extended header is none"))
            };
            match key.as_slice() {
                b"path" => entry.path = value,
                b"linkpath" => entry.link = value,
                b"size" => {
                    entry.size = number()?;
                    self.content = entry.size;
                    self.padding = padding(entry.size);
                }
                b"uid" => entry.uid = number()?,
                b"gid" => entry.gid = number()?,
                b"mtime" => {
                    entry.mtime = time(&value)
                        .ok_or_else(|| damaged("a time in an extended header is none"))?;
                }
                key if key.starts_with(b"GNU.sparse.") => return Err(sparse()),
                key => {
                    if let Some(name) = key.strip_prefix(b"SCHILY.xattr.".as_slice()) {
                        entry.xattrs.push((name.to_vec(), value));
                    }
                }
            }
        }
        match entry.kind {
            b'S' => return Err(sparse()),
            // Before ustar a directory was a file with a slash at its end.
            0 | b'0' | b'7' if entry.path.ends_with(b"/") => entry.kind = b'5',
            0 | b'7' => entry.kind = b'0',
            _ => {}
        }
        Ok(entry)
    }

    fn small(&mut self, size: u64, max: u64) -> Result<Vec<u8>, ImageError> {
        if size > max {
            return Err(damaged("an extended header is longer than allowed"));
        }
        let mut bytes = vec![0; size as usize];
        self.exact(&mut bytes)?;
        self.content = 0;
        Ok(bytes)
    }

    fn exact(&mut self, buf: &mut [u8]) -> Result<(), ImageError> {
        self.inner.read_exact(buf).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => damaged("it ends too early"),
            _ => damaged(e),
        })?;
        self.position += buf.len() as u64;
        Ok(())
    }

    fn skip(&mut self) -> Result<(), ImageError> {
        let left = self.content + self.padding;
        let skipped = std::io::copy(&mut self.inner.by_ref().take(left), &mut std::io::sink());
        match skipped {
            Ok(n) if n == left => {
                (self.content, self.padding) = (0, 0);
                self.position += n;
                Ok(())
            }
            Ok(_) => Err(damaged("it ends too early")),
            Err(e) => Err(damaged(e)),
        }
    }
}

/// The content of the current entry.
pub(super) struct Content<'r, R>(&'r mut TarReader<R>);

impl<R: Read> Read for Content<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let n = (buf.len() as u64).min(self.0.content) as usize;
        let n = self.0.inner.read(&mut buf[..n])?;
        self.0.content -= n as u64;
        self.0.position += n as u64;
        Ok(n)
    }
}

fn damaged(why: impl ToString) -> ImageError {
    ImageError::Damaged {
        why: why.to_string(),
    }
}

fn sparse() -> ImageError {
    damaged("it has sparse entries, which are not supported: make it without --sparse")
}

fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

fn until_nul(field: &[u8]) -> &[u8] {
    field.split(|b| *b == 0).next().unwrap_or_default()
}

fn parse(h: &[u8; BLOCK]) -> Result<Entry, ImageError> {
    let sum = |signed: bool| -> i64 {
        let each = h.iter().enumerate().map(|(i, b)| match i {
            148..156 => 32,
            _ if signed => i64::from(*b as i8),
            _ => i64::from(*b),
        });
        each.sum()
    };
    let want = number(&h[148..156])? as i64;
    // Old tars summed signed bytes.
    if want != sum(false) && want != sum(true) {
        return Err(damaged(
            "a header does not match its checksum, or it is not a tar",
        ));
    }
    let mut path = until_nul(&h[..100]).to_vec();
    let prefix = until_nul(&h[345..500]);
    if &h[257..263] == b"ustar\0" && !prefix.is_empty() {
        path = [prefix, b"/", &path].concat();
    }
    let size = number(&h[124..136])?;
    if size > i64::MAX as u64 {
        return Err(damaged("an entry is larger than a file can be"));
    }
    Ok(Entry {
        path,
        link: until_nul(&h[157..257]).to_vec(),
        kind: h[156],
        mode: number(&h[100..108])?,
        uid: number(&h[108..116])?,
        gid: number(&h[116..124])?,
        mtime: (number(&h[136..148])? as i64, 0),
        size,
        xattrs: Vec::new(),
    })
}

/// An octal number, or a binary one with the top bit set (two's complement).
fn number(field: &[u8]) -> Result<u64, ImageError> {
    if let [first @ 0x80..=0xff, rest @ ..] = field {
        let negative = first & 0x40 != 0;
        let start = match negative {
            true => u64::MAX,
            false => u64::from(first & 0x3f),
        };
        return Ok(rest.iter().fold(start, |n, b| (n << 8) | u64::from(*b)));
    }
    let text = until_nul(field).trim_ascii();
    text.iter().try_fold(0u64, |n, b| match b {
        b'0'..=b'7' => Ok((n << 3) | u64::from(b - b'0')),
        _ => Err(damaged("a number in a header is none")),
    })
}

/// The records of an extended header: `LENGTH KEY=VALUE\n`, where the length counts all of it and the value may be any bytes.
fn records(mut bytes: &[u8]) -> Result<Records, ImageError> {
    let bad = || damaged("an extended header is malformed");
    let mut out = Vec::new();
    while !bytes.is_empty() && bytes[0] != 0 {
        let space = bytes
            .iter()
            .take(20)
            .position(|b| *b == b' ')
            .ok_or_else(bad)?;
        let len = std::str::from_utf8(&bytes[..space]).ok();
        let len: usize = len.and_then(|t| t.parse().ok()).ok_or_else(bad)?;
        if len <= space + 1 || len > bytes.len() || bytes[len - 1] != b'\n' {
            return Err(bad());
        }
        let record = &bytes[space + 1..len - 1];
        let equals = record.iter().position(|b| *b == b'=').ok_or_else(bad)?;
        out.push((record[..equals].to_vec(), record[equals + 1..].to_vec()));
        bytes = &bytes[len..];
    }
    Ok(out)
}

/// Seconds with a fraction.
fn time(value: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(value).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    let digits: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    let nanos: u32 = digits.parse().ok()?;
    match (text.starts_with('-'), nanos) {
        // -1.5 is half a second before -1.
        (true, n) if n > 0 => Some((seconds.checked_sub(1)?, 1_000_000_000 - n)),
        (_, n) => Some((seconds, n)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_times() {
        assert_eq!(number(b"0000644\0").unwrap(), 0o644);
        assert_eq!(number(b"  12345 ").unwrap(), 0o12345);
        assert_eq!(
            number(b"\x80\0\0\0\x02\0\0\0\0\0\0\x01").unwrap(),
            (2 << 56) + 1
        );
        assert_eq!(number(&[0xff; 12]).unwrap() as i64, -1);
        assert!(number(b"12x").is_err());
        assert_eq!(time(b"1.5"), Some((1, 500_000_000)));
        assert_eq!(time(b"-1.5"), Some((-2, 500_000_000)));
        assert_eq!(time(b"7"), Some((7, 0)));
        assert_eq!(time(b"x"), None);
    }

    #[test]
    fn records_hold_any_bytes() {
        let all = b"9 a=b\nc=\n13 long=v\n\n\n\n";
        assert!(records(all).is_ok_and(|r| r[0] == (b"a".to_vec(), b"b\nc=".to_vec())));
        for bad in [
            &b"5 a=b\n"[..],
            b"99 a=b\n",
            b"x a=b\n",
            b"6 ab\n\n",
            b"0 a=b\n",
        ] {
            assert!(records(bad).is_err(), "{bad:?}");
        }
    }
}
