//! Images: a directory, a tar or an OCI layout becomes a directory on this host (the lower layer of sandboxes) and a tree.
//!
//! What is unpacked is not trusted: a path that is absolute or has `..`, that goes through a symbolic link, a hard link to what is not in the archive, a device,
//! more entries or bytes than allowed: each is a clear error, and what was unpacked so far is removed. Layers are applied with their whiteouts, so
//! that the result has none.

mod copy;
mod oci;
mod reader;
mod tarball;
mod unpack;

use std::path::Path;

use tidepool_proto::api::ImageKind;
use tidepool_proto::{DomainKey, TreeId};

use crate::capture::{self, CaptureError, CaptureOptions, TreeKind};
use crate::chunks::ChunkSink;
use crate::index::TreeIndex;
use crate::restore::{RestoreError, remove_tree};

/// What an import may at most unpack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImportLimits {
    pub entries: u64,
    /// Bytes of files, unpacked.
    pub bytes: u64,
}

impl Default for ImportLimits {
    /// Four million entries, 256 GiB.
    fn default() -> Self {
        Self {
            entries: 4_000_000,
            bytes: 256 << 30,
        }
    }
}

/// An imported image.
#[derive(Debug)]
pub struct Imported {
    pub tree: TreeId,
    /// Of the unpacked directory.
    pub index: TreeIndex,
    pub kind: ImageKind,
    /// Logical bytes of its files.
    pub bytes: u64,
    pub files: u64,
    /// `KEY=VALUE`, from an OCI configuration.
    pub env: Vec<String>,
    /// From an OCI configuration; empty where it says nothing.
    pub cwd: String,
    /// From an OCI configuration; empty where it says nothing.
    pub user: String,
    /// What was left out, one sentence each; a bounded sample.
    pub notes: Vec<String>,
}

/// Why an image could not be imported.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        what: String,
        #[source]
        source: std::io::Error,
    },
    /// The source is none of the kinds, or not the kind it was said to be.
    #[error("{source_path} is not an image: {why}")]
    NotAnImage { source_path: String, why: String },
    /// An entry must not be unpacked.
    #[error("refused entry {entry}: {why}")]
    Unsafe { entry: String, why: String },
    /// The archive is damaged or cut short.
    #[error("damaged archive: {why}")]
    Damaged { why: String },
    /// Over a limit.
    #[error("the image is larger than allowed: {why}")]
    TooLarge { why: String },
    /// The unpacked directory could not be captured.
    #[error("capturing the unpacked image: {0}")]
    Capture(#[from] CaptureError),
    /// The destination can't be used.
    #[error(transparent)]
    Dest(#[from] RestoreError),
}

impl ImageError {
    /// Whether the image is at fault, so that trying again will not help.
    pub fn is_invalid(&self) -> bool {
        !matches!(
            self,
            ImageError::Io { .. } | ImageError::Capture(_) | ImageError::Dest(_)
        )
    }
}

pub(crate) fn io_error(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> ImageError {
    let what = what.into();
    move |source| ImageError::Io { what, source }
}

/// Told of progress: the stage (`unpacking`, `reading files`), bytes done, bytes in all where known.
pub type OnProgress<'a> = dyn FnMut(&str, u64, Option<u64>) + 'a;

/// Tells what kind of image `source` is by looking at it.
pub fn detect(source: &Path) -> Result<ImageKind, ImageError> {
    let meta =
        std::fs::metadata(source).map_err(io_error(format!("looking at {}", source.display())))?;
    if meta.is_dir() {
        let oci = source.join("oci-layout").is_file() && source.join("index.json").is_file();
        return Ok(match oci {
            true => ImageKind::OciLayout,
            false => ImageKind::Directory,
        });
    }
    if !meta.is_file() {
        return Err(ImageError::NotAnImage {
            source_path: source.display().to_string(),
            why: "neither a directory nor a file".into(),
        });
    }
    tarball::detect(source)
}

/// Unpacks `source` into `dest` (made where it does not exist, else empty) and captures it. Where this fails, `dest` is removed.
pub fn import(
    source: &Path,
    kind: Option<ImageKind>,
    dest: &Path,
    key: &DomainKey,
    limits: ImportLimits,
    sink: &mut dyn ChunkSink,
    progress: &mut OnProgress<'_>,
) -> Result<Imported, ImageError> {
    let kind = match kind {
        Some(kind) => kind,
        None => detect(source)?,
    };
    match unpack::prepare(dest).and_then(|root| {
        let mut unpacker = unpack::Unpacker::new(root, limits, progress);
        let config = match kind {
            ImageKind::Directory => copy::copy(source, &mut unpacker).map(|()| Default::default()),
            ImageKind::Tar => tarball::unpack(source, &mut unpacker).map(|()| Default::default()),
            ImageKind::OciLayout => oci::unpack(source, &mut unpacker, dest),
        }?;
        let notes = unpacker.finish()?;
        progress("reading files", 0, None);
        let opts = CaptureOptions {
            kind: TreeKind::Image,
        };
        let captured = capture::full(dest, key, opts, None, sink)?;
        Ok((config, notes, captured))
    }) {
        Ok((config, mut notes, captured)) => {
            notes.extend(captured.notes);
            Ok(Imported {
                tree: captured.tree,
                index: captured.index,
                kind,
                bytes: captured.bytes,
                files: captured.files,
                env: config.env,
                cwd: config.cwd,
                user: config.user,
                notes,
            })
        }
        // Not ours to remove: it was there before.
        Err(e @ ImageError::Dest(RestoreError::NotEmpty { .. })) => Err(e),
        Err(e) => {
            if let Err(left) = remove_tree(dest) {
                tracing::warn!(dest = %dest.display(), error = %left, "a failed import could not be removed");
            }
            Err(e)
        }
    }
}

/// What an OCI configuration says about running the image.
#[derive(Debug, Default)]
pub(crate) struct Config {
    env: Vec<String>,
    cwd: String,
    user: String,
}
