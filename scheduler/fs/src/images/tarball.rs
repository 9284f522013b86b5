//! Tars: plain, gzip or zstd, told by their first bytes.

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::Path;

use tidepool_proto::api::ImageKind;
use tidepool_proto::tree::{MAX_NAME, MAX_TARGET, Meta};

use super::unpack::{Unpacker, clean, refused};
use super::{ImageError, io_error};
use crate::capture::{TreeKind, keeps};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

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
    let mut tar = tar::Archive::new(decompressed(open(source)?)?);
    let mut entries = tar.entries().map_err(|e| not(e.to_string()))?;
    // A layout's archive opens with one of its fixed names.
    match entries.next() {
        Some(Ok(first)) => {
            let path = clean(&first.path_bytes()).unwrap_or_default();
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
        Some(Err(e)) => Err(not(format!("not a tar: {e}"))),
        None => Err(not("an empty archive".into())),
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
    let mut tar = tar::Archive::new(decompressed(raw)?);
    for entry in tar.entries().map_err(damaged)? {
        let entry = entry.map_err(damaged)?;
        let path = clean(&entry.path_bytes())?;
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

fn damaged(e: std::io::Error) -> ImageError {
    ImageError::Damaged { why: e.to_string() }
}

fn entries(
    raw: Box<dyn Read + '_>,
    out: &mut Unpacker<'_, '_>,
    is_layer: bool,
) -> Result<(), ImageError> {
    let mut tar = tar::Archive::new(raw);
    let mut any = false;
    for entry in tar.entries().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        any = true;
        out.count_entry()?;
        let raw_path = entry.path_bytes().into_owned();
        let path = clean(&raw_path)?;
        if is_layer && split(&path).1.starts_with(WHITEOUT) {
            continue;
        }
        let meta = meta(&mut entry, &path, out)?;
        let kind = entry.header().entry_type();
        if path.is_empty() && !kind.is_dir() {
            return Err(refused(&raw_path, "an entry without a name"));
        }
        match kind {
            k if k.is_dir() => out.dir(&path, meta)?,
            k if k.is_file() || k.is_contiguous() || k.is_gnu_sparse() => {
                let len = entry.size();
                if len > out.limits().bytes {
                    out.count_bytes(len)?;
                }
                out.file(&path, &meta, len, &mut entry)?;
            }
            k if k.is_symlink() => {
                let target = link_target(&entry, &path)?;
                if target.len() >= MAX_TARGET || target.contains(&0) {
                    return Err(refused(&path, "a symbolic link with no valid target"));
                }
                out.symlink(&path, &target, &meta)?;
            }
            k if k.is_hard_link() => {
                let target = link_target(&entry, &path)?;
                let target = clean(&target).map_err(|e| match e {
                    ImageError::Unsafe { why, .. } => {
                        refused(&path, format!("a hard link out of the archive: {why}"))
                    }
                    e => e,
                })?;
                out.hard_link(&path, &target)?;
            }
            k if k.is_fifo() => out.fifo(&path, &meta)?,
            k if k.is_character_special() || k.is_block_special() => {
                return Err(refused(
                    &path,
                    "a device: sandboxes get theirs from the runtime",
                ));
            }
            k if k.is_pax_global_extensions() => {}
            k => {
                let why = format!("an entry of unknown type {:?}", k.as_byte() as char);
                return Err(refused(&path, why));
            }
        }
    }
    match any {
        true => Ok(()),
        false => Err(ImageError::Damaged {
            why: "an archive without entries".into(),
        }),
    }
}

fn link_target<R: Read>(entry: &tar::Entry<'_, R>, path: &[u8]) -> Result<Vec<u8>, ImageError> {
    match entry.link_name_bytes() {
        Some(target) if !target.is_empty() => Ok(target.into_owned()),
        _ => Err(refused(path, "a link without a target")),
    }
}

fn meta<R: Read>(
    entry: &mut tar::Entry<'_, R>,
    path: &[u8],
    out: &mut Unpacker<'_, '_>,
) -> Result<Meta, ImageError> {
    let header = entry.header();
    let number = |n: u64, what: &str| {
        u32::try_from(n).map_err(|_| refused(path, format!("a {what} of {n}")))
    };
    let mut meta = Meta {
        mode: header.mode().map_err(damaged)? & 0o7777,
        uid: number(header.uid().map_err(damaged)?, "user id")?,
        gid: number(header.gid().map_err(damaged)?, "group id")?,
        mtime_s: header.mtime().map_err(damaged)? as i64,
        ..Meta::default()
    };
    let Some(pax) = entry.pax_extensions().map_err(damaged)? else {
        return Ok(meta);
    };
    for pair in pax {
        let pair = pair.map_err(damaged)?;
        let value = pair.value_bytes();
        let text = || std::str::from_utf8(value).unwrap_or_default();
        match pair.key_bytes() {
            b"mtime" => (meta.mtime_s, meta.mtime_ns) = pax_time(text()).unwrap_or_default(),
            b"uid" => meta.uid = text().parse().map_err(|_| refused(path, "a bad user id"))?,
            b"gid" => {
                meta.gid = text()
                    .parse()
                    .map_err(|_| refused(path, "a bad group id"))?
            }
            key => {
                let Some(name) = key.strip_prefix(b"SCHILY.xattr.".as_slice()) else {
                    continue;
                };
                let known = name == b"security.capability"
                    || name.starts_with(b"user.")
                    || name.starts_with(b"system.posix_acl_");
                let fits = name.len() <= MAX_NAME && value.len() <= 1 << 16;
                if known && fits && keeps(TreeKind::Image, name) {
                    meta.xattrs.push((name.to_vec(), value.to_vec()));
                } else {
                    let name = String::from_utf8_lossy(name);
                    out.note(path, &format!("extended attribute {name} left out"));
                }
            }
        }
    }
    meta.xattrs.sort_unstable();
    meta.xattrs.dedup_by(|a, b| a.0 == b.0);
    Ok(meta)
}

/// Seconds with a fraction, as PAX has them.
fn pax_time(text: &str) -> Option<(i64, u32)> {
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
        (true, n) if n > 0 => Some((seconds - 1, 1_000_000_000 - n)),
        (_, n) => Some((seconds, n)),
    }
}
