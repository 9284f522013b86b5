//! OCI layouts: a directory or a tar of one. Every blob is checked against its digest before anything of it is used.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use ring::digest::{Context, SHA256};
use serde::Deserialize;

use super::reader::TarReader;
use super::tarball::{self, Compression};
use super::unpack::{Unpacker, clean};
use super::{Config, ImageError, io_error};

/// The longest JSON document taken, in bytes.
const MAX_JSON: u64 = 4 << 20;
/// How deep indexes may nest.
const MAX_NESTING: usize = 4;
const MAX_LAYERS: usize = 512;
const MAX_ENV: usize = 1024;

#[derive(Debug, Clone, Deserialize)]
struct Descriptor {
    digest: String,
    #[serde(default, rename = "mediaType")]
    media_type: String,
    #[serde(default)]
    platform: Option<Platform>,
}

#[derive(Debug, Clone, Deserialize)]
struct Platform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
}

#[derive(Debug, Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Debug, Deserialize)]
struct ImageManifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Debug, Default, Deserialize)]
struct ImageConfig {
    #[serde(default)]
    config: Option<RunConfig>,
}

#[derive(Debug, Default, Deserialize)]
struct RunConfig {
    #[serde(default, rename = "Env")]
    env: Option<Vec<String>>,
    #[serde(default, rename = "WorkingDir")]
    working_dir: Option<String>,
    #[serde(default, rename = "User")]
    user: Option<String>,
}

/// Unpacks the image of a layout, layer by layer. `dest` is where it goes: a compressed archive is decompressed beside it first.
pub(super) fn unpack(
    source: &Path,
    out: &mut Unpacker<'_, '_>,
    dest: &Path,
) -> Result<Config, ImageError> {
    let layout = Layout::open(source, dest, out.limits().bytes)?;
    let index: Index = json(&layout.small("index.json")?, "index.json")?;
    let manifest = find_manifest(&layout, index)?;
    if manifest.layers.len() > MAX_LAYERS {
        return Err(damaged(format!("{} layers", manifest.layers.len())));
    }
    // Checked once each before any is unpacked: a layer may be named twice.
    let mut checked = BTreeSet::new();
    for layer in &manifest.layers {
        if layer.media_type.contains("encrypted") {
            return Err(damaged("a layer is encrypted".into()));
        }
        if checked.insert(layer.digest.as_str()) {
            layout.check(&layer.digest)?;
        }
    }
    for layer in &manifest.layers {
        tarball::whiteouts(layout.blob(&layer.digest)?, out)?;
        tarball::layer(layout.blob(&layer.digest)?, out)?;
    }
    let config: ImageConfig = json(&layout.verified(&manifest.config.digest)?, "configuration")?;
    let run = config.config.unwrap_or_default();
    let env = run.env.unwrap_or_default();
    Ok(Config {
        env: env.into_iter().take(MAX_ENV).collect(),
        cwd: run.working_dir.unwrap_or_default(),
        user: run.user.unwrap_or_default(),
    })
}

/// The manifest for this machine.
fn find_manifest(layout: &Layout, mut index: Index) -> Result<ImageManifest, ImageError> {
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    for _ in 0..MAX_NESTING {
        let fits = |d: &&Descriptor| {
            d.platform
                .as_ref()
                .is_none_or(|p| p.os == "linux" && p.architecture == arch)
        };
        let Some(found) = index.manifests.iter().find(fits) else {
            return Err(ImageError::NotAnImage {
                source_path: layout.source.display().to_string(),
                why: format!("it has no image for linux/{arch}"),
            });
        };
        let bytes = layout.verified(&found.digest)?;
        let value: serde_json::Value = json(&bytes, "manifest")?;
        if value.get("manifests").is_some() {
            index = json(&bytes, "index")?;
        } else {
            return json(&bytes, "manifest");
        }
    }
    Err(damaged("indexes nest too deep".into()))
}

fn json<T: serde::de::DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T, ImageError> {
    serde_json::from_slice(bytes).map_err(|e| damaged(format!("{what}: {e}")))
}

fn damaged(why: String) -> ImageError {
    ImageError::Damaged { why }
}

/// Where the files of a layout are.
struct Layout {
    source: PathBuf,
    files: Files,
}

enum Files {
    Dir,
    /// Offset and length of each file in an uncompressed tar.
    Tar {
        file: File,
        at: BTreeMap<Vec<u8>, (u64, u64)>,
    },
}

impl Layout {
    fn open(source: &Path, dest: &Path, max: u64) -> Result<Self, ImageError> {
        let source = source.to_owned();
        if source.is_dir() {
            let files = Files::Dir;
            return Ok(Self { source, files });
        }
        let mut file = tarball::open(&source)?;
        let mut head = [0; 4];
        let n = file
            .read(&mut head)
            .map_err(io_error("reading the archive"))?;
        rewind(&mut file)?;
        if tarball::compression(&head[..n]) != Compression::None {
            file = inflate(file, dest, max)?;
        }
        let mut at = BTreeMap::new();
        let mut tar = TarReader::new(std::io::BufReader::with_capacity(1 << 18, &file));
        while let Some(entry) = tar.next()? {
            if entry.kind == b'0' {
                at.insert(clean(&entry.path)?, (tar.position(), entry.size));
            }
            if at.len() > 100_000 {
                return Err(ImageError::TooLarge {
                    why: "more than 100000 files in a layout".into(),
                });
            }
        }
        let files = Files::Tar { file, at };
        Ok(Self { source, files })
    }

    fn file(&self, path: &str) -> Result<Box<dyn Read + '_>, ImageError> {
        match &self.files {
            Files::Dir => {
                let at = self.source.join(path);
                let meta = std::fs::symlink_metadata(&at);
                if meta.as_ref().is_ok_and(|m| !m.is_file()) {
                    return Err(damaged(format!("{path} is not a regular file")));
                }
                let file = File::open(&at).map_err(|e| match e.kind() {
                    std::io::ErrorKind::NotFound => damaged(format!("{path} is missing")),
                    _ => io_error(format!("opening {path}"))(e),
                })?;
                Ok(Box::new(file))
            }
            Files::Tar { file, at } => {
                let Some(&(at, len)) = at.get(path.as_bytes()) else {
                    return Err(damaged(format!("{path} is missing")));
                };
                Ok(Box::new(At { file, at }.take(len)))
            }
        }
    }

    fn small(&self, path: &str) -> Result<Vec<u8>, ImageError> {
        let mut bytes = Vec::new();
        self.file(path)?
            .take(MAX_JSON + 1)
            .read_to_end(&mut bytes)
            .map_err(io_error(format!("reading {path}")))?;
        match bytes.len() as u64 > MAX_JSON {
            true => Err(ImageError::TooLarge {
                why: format!("{path} has more than {MAX_JSON} bytes"),
            }),
            false => Ok(bytes),
        }
    }

    fn blob(&self, digest: &str) -> Result<Box<dyn Read + '_>, ImageError> {
        self.file(&blob_path(digest)?)
    }

    /// A small blob, checked.
    fn verified(&self, digest: &str) -> Result<Vec<u8>, ImageError> {
        let bytes = self.small(&blob_path(digest)?)?;
        let found = ring::digest::digest(&SHA256, &bytes);
        matches(digest, found.as_ref())?;
        Ok(bytes)
    }

    /// Reads a blob and checks its digest.
    fn check(&self, digest: &str) -> Result<(), ImageError> {
        let mut blob = self.blob(digest)?;
        let mut context = Context::new(&SHA256);
        let mut buf = vec![0; 1 << 18];
        loop {
            match blob.read(&mut buf) {
                Ok(0) => return matches(digest, context.finish().as_ref()),
                Ok(n) => context.update(&buf[..n]),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(io_error(format!("reading blob {digest}"))(e)),
            }
        }
    }
}

fn rewind(file: &mut File) -> Result<(), ImageError> {
    file.seek(SeekFrom::Start(0))
        .map(drop)
        .map_err(io_error("reading the archive"))
}

fn blob_path(digest: &str) -> Result<String, ImageError> {
    let hex = digest.strip_prefix("sha256:").unwrap_or_default();
    let valid = hex.len() == 64
        && hex
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    match valid {
        true => Ok(format!("blobs/sha256/{hex}")),
        false => Err(damaged(format!(
            "{:?} is not a SHA-256 digest",
            digest.chars().take(80).collect::<String>()
        ))),
    }
}

fn matches(digest: &str, found: &[u8]) -> Result<(), ImageError> {
    match format!("sha256:{}", hex_of(found)) == digest {
        true => Ok(()),
        false => Err(damaged(format!("blob {digest} does not match its digest"))),
    }
}

fn hex_of(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Decompresses into a file beside `dest` that has no name any more.
fn inflate(file: File, dest: &Path, max: u64) -> Result<File, ImageError> {
    let dir = dest.parent().unwrap_or(Path::new("."));
    let flags =
        rustix::fs::OFlags::TMPFILE | rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC;
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    let what = || format!("making a temporary file in {}", dir.display());
    let fd = rustix::fs::open(dir, flags, mode).map_err(|e| io_error(what())(e.into()))?;
    let mut out = File::from(fd);
    let mut plain = tarball::decompressed(file)?;
    let mut buf = vec![0; 1 << 18];
    let mut total = 0;
    loop {
        match plain.read(&mut buf) {
            Ok(0) => break,
            Ok(n) => {
                total += n as u64;
                if total > max {
                    return Err(ImageError::TooLarge {
                        why: format!("the archive has more than {max} bytes"),
                    });
                }
                out.write_all(&buf[..n]).map_err(io_error(what()))?;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(damaged(e.to_string())),
        }
    }
    rewind(&mut out)?;
    Ok(out)
}

/// Reads a file from a position without moving it, so that several readers share it.
struct At<'f> {
    file: &'f File,
    at: u64,
}

impl Read for At<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let n = std::os::unix::fs::FileExt::read_at(self.file, buf, self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}
