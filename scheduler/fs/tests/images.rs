//! Images: what is imported, and what is refused.

mod common;

use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use common::{Chunks, Scratch, key, noise};
use tar::{EntryType, Header};
use tidepool_fs::images::{ImageError, ImportLimits, Imported, detect, import};
use tidepool_fs::restore::{RestoreOptions, materialise, verify};
use tidepool_fs::{CaptureOptions, TreeKind, capture};
use tidepool_proto::api::ImageKind;

fn run(source: &Path, dest: &Path, chunks: &mut Chunks) -> Result<Imported, ImageError> {
    let limits = ImportLimits::default();
    import(
        source,
        None,
        dest,
        &key(),
        limits,
        chunks,
        &mut |_, _, _| {},
    )
}

struct Tar(tar::Builder<Vec<u8>>);

impl Tar {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    /// An entry with its path written as it is, whatever it is.
    fn raw(mut self, path: &str, kind: EntryType, link: &str, content: &[u8]) -> Self {
        let mut h = Header::new_gnu();
        h.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        h.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        h.set_entry_type(kind);
        h.set_mode(if kind.is_dir() { 0o755 } else { 0o644 });
        h.set_uid(5);
        h.set_gid(6);
        h.set_mtime(1_600_000_000);
        h.set_size(content.len() as u64);
        if kind.is_character_special() {
            h.set_device_major(1).unwrap();
            h.set_device_minor(3).unwrap();
        }
        h.set_cksum();
        self.0.append(&h, content).unwrap();
        self
    }

    fn file(self, path: &str, content: &[u8]) -> Self {
        self.raw(path, EntryType::Regular, "", content)
    }

    fn dir(self, path: &str) -> Self {
        self.raw(path, EntryType::Directory, "", b"")
    }

    fn pax(mut self, pairs: &[(&str, &[u8])]) -> Self {
        self.0.append_pax_extensions(pairs.iter().copied()).unwrap();
        self
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn root_tar() -> Vec<u8> {
    Tar::new()
        .dir("./")
        .dir("./etc/")
        .file("./etc/passwd", b"root:x:0:0::/root:/bin/sh\n")
        .dir("usr")
        .dir("usr/bin")
        .file("usr/bin/tool", &noise(1, 50_000))
        .raw("usr/bin/same", EntryType::Link, "./usr/bin/tool", b"")
        .raw("bin", EntryType::Symlink, "usr/bin", b"")
        .raw("pipe", EntryType::Fifo, "", b"")
        .pax(&[
            ("mtime", b"1500000000.123456789"),
            ("SCHILY.xattr.user.note", b"with\nnew line"),
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        ])
        .file("with-pax", b"pax")
        .file("implied/deep/dir/file", b"x")
        .file("zeros", &vec![0; 1 << 20])
        .bytes()
}

#[test]
fn a_tar_becomes_a_directory_and_a_tree() {
    let scratch = Scratch::new("tar");
    let mut chunks = Chunks::default();
    let plain = root_tar();
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(&plain).unwrap();
    let gz = gz.finish().unwrap();
    let zst = zstd::stream::encode_all(&plain[..], 1).unwrap();
    let mut trees = Vec::new();
    for (name, bytes) in [("a.tar", &plain), ("a.tar.gz", &gz), ("a.tar.zst", &zst)] {
        let source = scratch.join(name);
        std::fs::write(&source, bytes).unwrap();
        assert_eq!(detect(&source).unwrap(), ImageKind::Tar);
        let dest = scratch.join(&format!("{name}.d"));
        let done = run(&source, &dest, &mut chunks).unwrap();
        let meta = |p: &str| dest.join(p).symlink_metadata().unwrap();
        assert_eq!(meta("usr/bin/tool").ino(), meta("usr/bin/same").ino());
        assert_eq!((meta("etc").uid(), meta("etc").gid()), (5, 6));
        assert_eq!(meta("etc").mtime(), 1_600_000_000);
        assert_eq!(meta("with-pax").mtime_nsec(), 123_456_789);
        assert_eq!(meta("implied/deep").mtime(), 0);
        assert!(meta("bin").is_symlink());
        assert!(meta("pipe").file_type().is_fifo());
        assert!(meta("zeros").blocks() < 16);
        assert_eq!(done.notes.len(), 1, "{:?}", done.notes);
        let mut note = [0u8; 64];
        let n = rustix::fs::lgetxattr(dest.join("with-pax"), "user.note", &mut note[..]).unwrap();
        assert_eq!(&note[..n], b"with\nnew line");
        trees.push(done.tree);
        // The directory is the tree.
        verify(&dest, &key(), TreeKind::Image, done.tree).unwrap();
    }
    assert!(trees.iter().all(|t| *t == trees[0]));
    let dest = scratch.join("again");
    let opts = RestoreOptions {
        kind: TreeKind::Image,
        ..RestoreOptions::default()
    };
    materialise(trees[0], &dest, &mut chunks, opts).unwrap();
    verify(&dest, &key(), TreeKind::Image, trees[0]).unwrap();
}

#[test]
fn bad_tars_are_refused_and_leave_nothing() {
    let scratch = Scratch::new("badtar");
    let outside = scratch.dir("outside");
    std::fs::write(outside.join("secret"), b"secret").unwrap();
    let out = outside.to_str().unwrap().to_owned();
    let link = |path: &str, to: &str| Tar::new().raw(path, EntryType::Symlink, to, b"");
    let device = |kind| Tar::new().dir("dev").raw("dev/null", kind, "", b"");
    let hard = |to: &str| {
        Tar::new()
            .file("a", b"x")
            .raw("b", EntryType::Link, to, b"")
    };
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("dotdot", Tar::new().file("a/../../x", b"x").bytes(), ".."),
        ("dotdot-end", Tar::new().dir("a/..").bytes(), ".."),
        (
            "absolute",
            Tar::new().file("/tmp/tp-x", b"x").bytes(),
            "absolute",
        ),
        ("char device", device(EntryType::Char).bytes(), "device"),
        ("block device", device(EntryType::Block).bytes(), "device"),
        (
            "hard link up",
            hard("../outside/secret").bytes(),
            "out of the archive",
        ),
        (
            "hard link absolute",
            hard("/etc/passwd").bytes(),
            "out of the archive",
        ),
        (
            "hard link to nothing",
            hard("missing").bytes(),
            "not in the archive",
        ),
        (
            "hard link through a link",
            link("l", &out)
                .raw("b", EntryType::Link, "l/secret", b"")
                .bytes(),
            "no directory",
        ),
        (
            "file through a link",
            link("l", &out).file("l/x", b"x").bytes(),
            "no directory",
        ),
        (
            "dir through a link",
            link("l", "..").dir("l/x").bytes(),
            "no directory",
        ),
        (
            "deep through a link",
            link("l", &out).file("l/new/deep/x", b"x").bytes(),
            "no directory",
        ),
        (
            "through a file",
            Tar::new().file("f", b"x").file("f/x", b"x").bytes(),
            "no directory",
        ),
        (
            "unknown type",
            Tar::new().raw("x", EntryType::new(b'Q'), "", b"").bytes(),
            "type",
        ),
    ];
    for (what, bytes, why) in cases {
        let source = scratch.join("bad.tar");
        std::fs::write(&source, bytes).unwrap();
        let dest = scratch.join("dest");
        let e = run(&source, &dest, &mut Chunks::default()).unwrap_err();
        assert!(matches!(e, ImageError::Unsafe { .. }), "{what}: {e}");
        assert!(e.is_invalid());
        assert!(e.to_string().contains(why), "{what}: {e}");
        assert!(!dest.exists(), "{what}: removed");
        let left: Vec<_> = std::fs::read_dir(&outside).unwrap().collect();
        assert_eq!(left.len(), 1, "{what}");
        assert_eq!(
            outside.join("secret").metadata().unwrap().nlink(),
            1,
            "{what}"
        );
    }
    // A link that a file replaces is replaced, not followed.
    let bytes = link("l", &format!("{out}/secret"))
        .file("l", b"mine")
        .bytes();
    let source = scratch.join("replace.tar");
    std::fs::write(&source, bytes).unwrap();
    let dest = scratch.join("replace");
    run(&source, &dest, &mut Chunks::default()).unwrap();
    assert_eq!(std::fs::read(dest.join("l")).unwrap(), b"mine");
    assert_eq!(std::fs::read(outside.join("secret")).unwrap(), b"secret");
}

#[test]
fn damaged_and_oversized_archives_are_refused() {
    let scratch = Scratch::new("damagedtar");
    let source = scratch.join("t.tar");
    let dest = scratch.join("dest");
    let plain = root_tar();
    let gz = {
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(&plain).unwrap();
        gz.finish().unwrap()
    };
    let refuse = |bytes: &[u8]| {
        std::fs::write(&source, bytes).unwrap();
        let e = run(&source, &dest, &mut Chunks::default()).unwrap_err();
        assert!(!dest.exists());
        assert!(e.is_invalid(), "{e}");
        e
    };
    refuse(b"");
    refuse(b"this is no archive at all, only some text that goes on a little");
    refuse(&plain[..20_000]);
    refuse(&gz[..gz.len() / 2]);
    let mut flipped = gz.clone();
    let at = flipped.len() - 6;
    flipped[at] ^= 1;
    refuse(&flipped);

    std::fs::write(&source, &plain).unwrap();
    for (entries, bytes) in [(5, 1 << 30), (1000, 1000)] {
        let limits = ImportLimits { entries, bytes };
        let mut chunks = Chunks::default();
        let e = import(
            &source,
            None,
            &dest,
            &key(),
            limits,
            &mut chunks,
            &mut |_, _, _| {},
        );
        assert!(matches!(e, Err(ImageError::TooLarge { .. })), "{e:?}");
        assert!(!dest.exists());
    }
    // What was there before is neither used nor removed.
    std::fs::create_dir(&dest).unwrap();
    std::fs::write(dest.join("mine"), b"x").unwrap();
    run(&source, &dest, &mut Chunks::default()).unwrap_err();
    assert!(dest.join("mine").exists());
    let e = run(&scratch.join("missing.tar"), &dest, &mut Chunks::default()).unwrap_err();
    assert!(e.to_string().contains("missing.tar"), "{e}");
}

#[test]
fn a_directory_is_copied() {
    let scratch = Scratch::new("dirimage");
    let from = scratch.dir("from");
    std::fs::create_dir_all(from.join("a/b")).unwrap();
    std::fs::write(from.join("a/b/f"), noise(1, 100_000)).unwrap();
    std::fs::hard_link(from.join("a/b/f"), from.join("g")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", from.join("l")).unwrap();
    let sparse = std::fs::File::create(from.join("sparse")).unwrap();
    sparse.set_len(1 << 30).unwrap();
    let socket = std::os::unix::net::UnixListener::bind(from.join("sock")).unwrap();
    drop(socket);
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    let kind = rustix::fs::FileType::CharacterDevice;
    let dev = rustix::fs::makedev(1, 3);
    rustix::fs::mknodat(rustix::fs::CWD, from.join("null"), kind, mode, dev).unwrap();
    assert_eq!(detect(&from).unwrap(), ImageKind::Directory);

    let dest = scratch.join("dest");
    let mut chunks = Chunks::default();
    let done = run(&from, &dest, &mut chunks).unwrap();
    assert_eq!(done.notes.len(), 2, "{:?}", done.notes);
    assert!(!dest.join("sock").exists() && !dest.join("null").exists());
    let meta = |p: &str| dest.join(p).symlink_metadata().unwrap();
    assert_eq!(meta("a/b/f").ino(), meta("g").ino());
    assert!(meta("sparse").blocks() < 16);
    // But for what was left out, the copy is the tree of the original.
    std::fs::remove_file(from.join("sock")).unwrap();
    std::fs::remove_file(from.join("null")).unwrap();
    let again = scratch.join("again");
    let second = run(&from, &again, &mut chunks).unwrap();
    let opts = CaptureOptions {
        kind: TreeKind::Image,
    };
    let original = capture::full(&from, &key(), opts, None, &mut chunks).unwrap();
    assert_eq!(original.tree, second.tree);
    assert!(second.notes.is_empty());
}

/// Writes an OCI layout; gives its directory.
fn layout(dir: &Path, layers: &[Vec<u8>], config: &str) -> PathBuf {
    let blobs = dir.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| {
        let hash = ring::digest::digest(&ring::digest::SHA256, bytes);
        let hex: String = hash.as_ref().iter().map(|b| format!("{b:02x}")).collect();
        std::fs::write(blobs.join(&hex), bytes).unwrap();
        format!("sha256:{hex}")
    };
    let layers: Vec<String> = layers
        .iter()
        .map(|l| format!(r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"{}","size":{}}}"#, put(l), l.len()))
        .collect();
    let config = put(config.as_bytes());
    let manifest = format!(
        r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config}","size":1}},"layers":[{}]}}"#,
        layers.join(",")
    );
    let manifest = put(manifest.as_bytes());
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let nested = format!(
        r#"{{"schemaVersion":2,"manifests":[
            {{"digest":"sha256:{}","size":1,"platform":{{"os":"linux","architecture":"other"}}}},
            {{"digest":"{manifest}","size":1,"platform":{{"os":"linux","architecture":"{arch}"}}}}]}}"#,
        "0".repeat(64)
    );
    let nested = put(nested.as_bytes());
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.index.v1+json","digest":"{nested}","size":1}}]}}"#
    );
    std::fs::write(dir.join("index.json"), index).unwrap();
    std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    dir.to_owned()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(bytes).unwrap();
    gz.finish().unwrap()
}

const CONFIG: &str = r#"{"architecture":"x","config":{"Env":["PATH=/bin","A=b"],"WorkingDir":"/srv/app","User":"app"}}"#;

#[test]
fn oci_layers_are_applied_with_their_whiteouts() {
    let scratch = Scratch::new("oci");
    let base = Tar::new()
        .dir("etc")
        .file("etc/keep", b"keep")
        .file("etc/gone", b"gone")
        .dir("opaque")
        .dir("opaque/sub")
        .file("opaque/sub/old", b"old")
        .file("opaque/old", b"old")
        .dir("replaced")
        .file("replaced/inside", b"x")
        .dir("whole")
        .file("whole/x", b"x")
        .bytes();
    let top = Tar::new()
        .file("etc/.wh.gone", b"")
        .file("opaque/new", b"new")
        // After what is new: it hides what is below all the same.
        .file("opaque/.wh..wh..opq", b"")
        .file("replaced", b"a file now")
        .file(".wh.whole", b"")
        .file("etc/keep", b"changed")
        .bytes();
    let dir = layout(
        &scratch.dir("layout"),
        &[gzip(&base), zstd::stream::encode_all(&top[..], 1).unwrap()],
        CONFIG,
    );
    assert_eq!(detect(&dir).unwrap(), ImageKind::OciLayout);
    // The layout as a tar, and that compressed.
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_dir_all("blobs", dir.join("blobs")).unwrap();
    tar.append_path_with_name(dir.join("index.json"), "index.json")
        .unwrap();
    tar.append_path_with_name(dir.join("oci-layout"), "oci-layout")
        .unwrap();
    let tar = tar.into_inner().unwrap();
    std::fs::write(scratch.join("l.tar"), &tar).unwrap();
    std::fs::write(scratch.join("l.tar.gz"), gzip(&tar)).unwrap();
    let mut trees = Vec::new();
    for (n, source) in [dir, scratch.join("l.tar"), scratch.join("l.tar.gz")]
        .iter()
        .enumerate()
    {
        assert_eq!(detect(source).unwrap(), ImageKind::OciLayout);
        let dest = scratch.join(&format!("dest{n}"));
        let done = run(source, &dest, &mut Chunks::default()).unwrap();
        assert_eq!(done.env, ["PATH=/bin", "A=b"]);
        assert_eq!((done.cwd.as_str(), done.user.as_str()), ("/srv/app", "app"));
        let mut found = Vec::new();
        let mut dirs = vec![dest.clone()];
        while let Some(dir) = dirs.pop() {
            for e in std::fs::read_dir(dir).unwrap() {
                let path = e.unwrap().path();
                found.push(
                    path.strip_prefix(&dest)
                        .unwrap()
                        .to_str()
                        .unwrap()
                        .to_owned(),
                );
                if path.is_dir() {
                    dirs.push(path);
                }
            }
        }
        found.sort();
        assert_eq!(
            found,
            ["etc", "etc/keep", "opaque", "opaque/new", "replaced"]
        );
        assert_eq!(std::fs::read(dest.join("etc/keep")).unwrap(), b"changed");
        trees.push(done.tree);
    }
    assert!(trees.iter().all(|t| *t == trees[0]));
}

#[test]
fn bad_layouts_are_refused() {
    let scratch = Scratch::new("badoci");
    let dest = scratch.join("dest");
    let layer = gzip(&Tar::new().file("a", &noise(1, 9000)).bytes());
    let refuse = |dir: &Path, why: &str| {
        let kind = Some(ImageKind::OciLayout);
        let limits = ImportLimits::default();
        let mut chunks = Chunks::default();
        let e = import(
            dir,
            kind,
            &dest,
            &key(),
            limits,
            &mut chunks,
            &mut |_, _, _| {},
        );
        let e = e.unwrap_err();
        assert!(e.to_string().contains(why), "{e}");
        assert!(e.is_invalid(), "{e}");
        assert!(!dest.exists());
    };
    // Every single blob, damaged and missing.
    let good = layout(&scratch.dir("good"), std::slice::from_ref(&layer), CONFIG);
    for e in std::fs::read_dir(good.join("blobs/sha256")).unwrap() {
        let path = e.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        let mut bad = bytes.clone();
        bad[bytes.len() / 2] ^= 1;
        std::fs::write(&path, bad).unwrap();
        refuse(&good, "digest");
        std::fs::remove_file(&path).unwrap();
        refuse(&good, "missing");
        std::fs::write(&path, bytes).unwrap();
    }
    run(&good, &dest, &mut Chunks::default()).unwrap();
    std::fs::remove_dir_all(&dest).unwrap();
    std::fs::write(good.join("index.json"), "{").unwrap();
    refuse(&good, "index.json");
    std::fs::write(
        good.join("index.json"),
        r#"{"manifests":[{"digest":"sha256:../../../../etc/passwd","size":1}]}"#,
    )
    .unwrap();
    refuse(&good, "digest");
    std::fs::write(good.join("index.json"), r#"{"manifests":[]}"#).unwrap();
    refuse(&good, "no image");
    let bad = gzip(&Tar::new().file("x/../../y", b"").bytes());
    let dir = layout(&scratch.dir("escape"), &[layer.clone(), bad], CONFIG);
    refuse(&dir, "..");
    for name in [".wh...", ".wh.", "d/.wh.."] {
        let bad = gzip(&Tar::new().file(name, b"").bytes());
        let dir = layout(&scratch.dir("whiteout"), &[layer.clone(), bad], CONFIG);
        refuse(&dir, "whiteout");
    }
}
