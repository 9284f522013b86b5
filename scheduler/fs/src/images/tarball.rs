//! Tars: plain, gzip or zstd, told by their first bytes.

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::Path;

use tidepool_proto::api::ImageKind;
use tidepool_proto::tree::{MAX_NAME, MAX_TARGET, Meta};

use super::reader::{Entry, TarReader};
use super::unpack::{Unpacker, clean, refused};
use super::{ImageError, io_error};
use crate::capture::{TreeKind, keeps};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Bytes that may follow a tar's end mark: padding to whatever block the writer used.
const MAX_TRAILER: u64 = 64 << 20;

/// How a tar is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Gzip,
    Zstd,
}

/// Tells the compression by the first bytes.
pub(super) fn compression(head: &[u8]) -> Compression {
    match head {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
        _ => Compression::None,
    }
}

/// The bytes of a tar, decompressed.
pub(super) fn decompressed<'r>(mut raw: impl Read + 'r) -> Result<Box<dyn Read + 'r>, ImageError> {
    let mut head = Vec::new();
    raw.by_ref()
        .take(4)
        .read_to_end(&mut head)
        .map_err(io_error("reading the archive"))?;
    let kind = compression(&head);
    let all = BufReader::with_capacity(1 << 18, std::io::Cursor::new(head).chain(raw));
    Ok(match kind {
        Compression::None => Box::new(all),
        Compression::Gzip => Box::new(BufReader::with_capacity(
            1 << 18,
            flate2::bufread::MultiGzDecoder::new(all),
        )),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(all)
                .map_err(io_error("reading the archive"))?;
            // 128 MiB: what `zstd --long` makes at most by default.
            decoder
                .window_log_max(27)
                .map_err(io_error("reading the archive"))?;
            Box::new(BufReader::with_capacity(1 << 18, decoder))
        }
    })
}

/// Whether a file is a tar at all, and one of an OCI layout.
pub(super) fn detect(source: &Path) -> Result<ImageKind, ImageError> {
    let not = |why: String| ImageError::NotAnImage {
        source_path: source.display().to_string(),
        why,
    };
    let mut tar = TarReader::new(decompressed(open(source)?)?);
    // A layout's archive opens with one of its fixed names.
    match tar.next() {
        Ok(Some(first)) => {
            let path = clean(&first.path).unwrap_or_default();
            let top = path.split(|b| *b == b'/').next().unwrap_or_default();
            let oci = [
                b"blobs".as_slice(),
                b"oci-layout",
                b"index.json",
                b"manifest.json",
            ];
            Ok(match oci.contains(&top) {
                true => ImageKind::OciLayout,
                false => ImageKind::Tar,
            })
        }
        Err(e) => Err(not(e.to_string())),
        Ok(None) => Err(not("an empty archive".into())),
    }
}

pub(super) fn open(source: &Path) -> Result<File, ImageError> {
    File::open(source).map_err(io_error(format!("opening {}", source.display())))
}

/// Unpacks a tar of a root file system.
pub(super) fn unpack(source: &Path, out: &mut Unpacker<'_, '_>) -> Result<(), ImageError> {
    let mut file = open(source)?;
    file.rewind().map_err(io_error("reading the archive"))?;
    entries(decompressed(file)?, out, false)
}

/// Applies the whiteouts of a layer to what is unpacked already.
pub(super) fn whiteouts(raw: impl Read, out: &mut Unpacker<'_, '_>) -> Result<(), ImageError> {
    let mut tar = TarReader::new(decompressed(raw)?);
    while let Some(entry) = tar.next()? {
        let path = clean(&entry.path)?;
        let (dir, name) = split(&path);
        if name == OPAQUE {
            out.clear(dir)?;
        } else if let Some(gone) = name.strip_prefix(WHITEOUT) {
            if gone.is_empty() || gone == b"." || gone == b".." {
                return Err(refused(&path, "a whiteout of no name"));
            }
            out.remove(&crate::index::join(dir, gone))?;
        }
    }
    Ok(())
}

/// Unpacks a layer over what is unpacked already; its whiteouts were applied before.
pub(super) fn layer(raw: impl Read, out: &mut Unpacker<'_, '_>) -> Result<(), ImageError> {
    entries(decompressed(raw)?, out, true)
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|b| *b == b'/') {
        Some(n) => (&path[..n], &path[n + 1..]),
        None => (b"", path),
    }
}

fn entries(
    raw: Box<dyn Read + '_>,
    out: &mut Unpacker<'_, '_>,
    is_layer: bool,
) -> Result<(), ImageError> {
    let mut tar = TarReader::new(raw);
    while let Some(entry) = tar.next()? {
        out.count_entry()?;
        let path = clean(&entry.path)?;
        if is_layer && split(&path).1.starts_with(WHITEOUT) {
            continue;
        }
        if path.is_empty() && entry.kind != b'5' {
            return Err(refused(&entry.path, "an entry without a name"));
        }
        let meta = meta(&entry, &path, out)?;
        match entry.kind {
            b'0' => {
                if entry.size > out.limits().bytes {
                    out.count_bytes(entry.size)?;
                }
                out.file(&path, &meta, entry.size, &mut tar.content())?;
            }
            b'1' => {
                let target = clean(&entry.link).map_err(|e| match e {
                    ImageError::Unsafe { why, .. } => {
                        refused(&path, format!("a hard link out of the archive: {why}"))
                    }
                    e => e,
                })?;
                if target.is_empty() {
                    return Err(refused(&path, "a hard link without a target"));
                }
                out.hard_link(&path, &target)?;
            }
            b'2' => {
                let target = &entry.link;
                if target.is_empty() || target.len() >= MAX_TARGET || target.contains(&0) {
                    return Err(refused(&path, "a symbolic link with no valid target"));
                }
                out.symlink(&path, target, &meta)?;
            }
            b'3' | b'4' => {
                let why = "a device: sandboxes get theirs from the runtime";
                return Err(refused(&path, why));
            }
            b'5' => out.dir(&path, meta)?,
            b'6' => out.fifo(&path, &meta)?,
            kind => {
                let why = format!("an entry of unknown type {:?}", kind as char);
                return Err(refused(&path, why));
            }
        }
    }
    tar.finish(MAX_TRAILER)
}

fn meta(entry: &Entry, path: &[u8], out: &mut Unpacker<'_, '_>) -> Result<Meta, ImageError> {
    let id = |n: u64, what: &str| {
        u32::try_from(n).map_err(|_| refused(path, format!("a {what} of {n}")))
    };
    let mut meta = Meta {
        mode: (entry.mode & 0o7777) as u32,
        uid: id(entry.uid, "user id")?,
        gid: id(entry.gid, "group id")?,
        mtime_s: entry.mtime.0,
        mtime_ns: entry.mtime.1,
        ..Meta::default()
    };
    for (name, value) in &entry.xattrs {
        let known = name == b"security.capability"
            || name.starts_with(b"user.")
            || name.starts_with(b"system.posix_acl_");
        let fits = name.len() <= MAX_NAME && value.len() <= 1 << 16 && !name.contains(&0);
        if known && fits && keeps(TreeKind::Image, name) {
            meta.xattrs.push((name.clone(), value.clone()));
        } else {
            let name = String::from_utf8_lossy(name);
            out.note(path, &format!("extended attribute {name} left out"));
        }
    }
    meta.xattrs.sort_unstable();
    meta.xattrs.dedup_by(|a, b| a.0 == b.0);
    Ok(meta)
}
