//! The table: every operation that changes a file tree, and which paths of the upper have to show as dirty.
//!
//! Each case works in a directory of its own name, which is the working directory of both halves. From the lower layer it holds `low`
//! (8192 bytes), `low2` and `lowdir/a`; from the preparation `still`, which must never show. For
//! removed names it is the parent that has to show.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt, chown, lchown, symlink};
use std::os::unix::net::UnixListener;

use anyhow::Result;
use rustix::fs::AtFlags;

pub(crate) use crate::ops::Cx;
use crate::ops::{
    append, copy_file_range, direct_write, exchange, fallocate, in_child, link_open_file, mknod,
    rw, sendfile, set_acl, set_flags, set_xattr, sparse_write, splice, times, tmpfile,
    vectored_write, write_received_descriptor,
};

type Half = fn(&mut Cx) -> Result<()>;

pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) prepare: Half,
    pub(crate) act: Half,
    /// Relative to the case's directory; "." is that directory.
    pub(crate) dirty: &'static [&'static str],
}

const fn case(
    name: &'static str,
    prepare: Half,
    act: Half,
    dirty: &'static [&'static str],
) -> Case {
    Case {
        name,
        prepare,
        act,
        dirty,
    }
}

const NOTHING: Half = |_| Ok(());
/// A file `f` of two pages in the upper.
const FILE: Half = |_| Ok(fs::write("f", [b'f'; 8192])?);
/// `f`, and `dir` with a file in it.
const FILE_AND_DIR: Half = |_| {
    fs::write("f", [b'f'; 8192])?;
    fs::create_dir("dir")?;
    Ok(fs::write("dir/inner", b"inner")?)
};
/// `f`, with one attribute.
const FILE_WITH_XATTR: Half = |_| {
    fs::write("f", b"f")?;
    set_xattr("f", "user.a", b"old")
};

pub(crate) const CASES: &[Case] = &[
    // Contents.
    case(
        "append",
        FILE,
        |_| Ok(append("f")?.write_all(b"more")?),
        &["f"],
    ),
    case(
        "overwrite",
        FILE,
        |_| Ok(rw("f")?.write_all_at(b"over", 10)?),
        &["f"],
    ),
    case(
        "overwrite_same_bytes",
        FILE,
        |_| Ok(rw("f")?.write_all_at(b"ff", 10)?),
        &["f"],
    ),
    case("vectored_write", FILE, |_| vectored_write("f"), &["f"]),
    case("sparse_write", FILE, |_| sparse_write("f"), &["f"]),
    case("shrink", FILE, |_| Ok(rw("f")?.set_len(100)?), &["f"]),
    case("grow", FILE, |_| Ok(rw("f")?.set_len(1 << 20)?), &["f"]),
    case(
        "open_truncating",
        FILE,
        |_| Ok(fs::write("f", b"")?),
        &["f"],
    ),
    case("sendfile", FILE, |_| sendfile("low", "f"), &["f"]),
    case(
        "copy_file_range",
        FILE,
        |_| copy_file_range("low", "f"),
        &["f"],
    ),
    case("splice", FILE, |_| splice("f"), &["f"]),
    case("fallocate", FILE, |_| fallocate("f", 0, 0, 1 << 20), &["f"]),
    case(
        "fallocate_keep_size",
        FILE,
        |_| fallocate("f", libc::FALLOC_FL_KEEP_SIZE, 0, 1 << 20),
        &["f"],
    ),
    case(
        "punch_hole",
        FILE,
        |_| {
            fallocate(
                "f",
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                0,
                4096,
            )
        },
        &["f"],
    ),
    case(
        "zero_range",
        FILE,
        |_| fallocate("f", libc::FALLOC_FL_ZERO_RANGE, 0, 4096),
        &["f"],
    ),
    case(
        "collapse_range",
        FILE,
        |_| fallocate("f", libc::FALLOC_FL_COLLAPSE_RANGE, 0, 4096),
        &["f"],
    ),
    case(
        "insert_range",
        FILE,
        |_| fallocate("f", libc::FALLOC_FL_INSERT_RANGE, 0, 4096),
        &["f"],
    ),
    case("direct_write", FILE, |_| direct_write("f"), &["f"]),
    // By a worker of io_uring, which is a thread of the process in the kernel's eyes.
    case(
        "io_uring_write",
        FILE,
        |_| crate::uring::write_by_a_worker(&rw("f")?, b"by io_uring"),
        &["f"],
    ),
    case(
        "first_store_to_a_mapping",
        |cx| cx.map_new("f"),
        Cx::store,
        &["f"],
    ),
    case(
        "store_again_after_rearm",
        |cx| {
            cx.map_new("f")?;
            cx.store()
        },
        Cx::store,
        &["f"],
    ),
    // Attributes.
    case(
        "chmod",
        FILE,
        |_| Ok(fs::set_permissions("f", fs::Permissions::from_mode(0o600))?),
        &["f"],
    ),
    case(
        "chown",
        FILE,
        |_| Ok(chown("f", Some(12), Some(34))?),
        &["f"],
    ),
    case(
        "lchown_of_a_symlink",
        |_| Ok(symlink("f", "l")?),
        |_| Ok(lchown("l", Some(12), Some(34))?),
        &["l"],
    ),
    case("utimens", FILE, |_| times("f", AtFlags::empty()), &["f"]),
    case(
        "utimens_of_a_directory",
        FILE_AND_DIR,
        |_| times("dir", AtFlags::empty()),
        &["dir"],
    ),
    case(
        "utimens_of_a_symlink",
        |_| Ok(symlink("f", "l")?),
        |_| times("l", AtFlags::SYMLINK_NOFOLLOW),
        &["l"],
    ),
    case("setxattr", FILE, |_| set_xattr("f", "user.a", b"b"), &["f"]),
    case(
        "setxattr_large",
        FILE,
        |_| set_xattr("f", "user.a", &[b'b'; 3000]),
        &["f"],
    ),
    case(
        "setxattr_replace",
        FILE_WITH_XATTR,
        |_| set_xattr("f", "user.a", b"new"),
        &["f"],
    ),
    case(
        "setxattr_of_a_directory",
        FILE_AND_DIR,
        |_| set_xattr("dir", "user.a", b"b"),
        &["dir"],
    ),
    case(
        "removexattr",
        FILE_WITH_XATTR,
        |_| Ok(rustix::fs::lremovexattr("f", "user.a")?),
        &["f"],
    ),
    case("acl", FILE, |_| set_acl("f"), &["f"]),
    case("chattr", FILE, |_| set_flags("f"), &["f"]),
    // Names.
    case(
        "create_empty",
        NOTHING,
        |_| Ok(fs::File::create("new").map(drop)?),
        &["new", "."],
    ),
    case(
        "create_with_contents",
        NOTHING,
        |_| Ok(fs::write("new", b"contents")?),
        &["new", "."],
    ),
    case(
        "mkdir",
        NOTHING,
        |_| Ok(fs::create_dir("new")?),
        &["new", "."],
    ),
    case(
        "symlink",
        NOTHING,
        |_| Ok(symlink("target", "new")?),
        &["new", "."],
    ),
    case(
        "long_symlink",
        NOTHING,
        |_| Ok(symlink("t".repeat(200), "new")?),
        &["new", "."],
    ),
    case(
        "mkfifo",
        NOTHING,
        |_| mknod("new", libc::S_IFIFO),
        &["new", "."],
    ),
    case(
        "mknod_of_a_file",
        NOTHING,
        |_| mknod("new", libc::S_IFREG),
        &["new", "."],
    ),
    case(
        "bind_a_socket",
        NOTHING,
        |_| Ok(UnixListener::bind("new").map(drop)?),
        &["new", "."],
    ),
    case(
        "hard_link",
        FILE,
        |_| Ok(fs::hard_link("f", "new")?),
        &["new", "."],
    ),
    case(
        "hard_link_elsewhere",
        FILE_AND_DIR,
        |_| Ok(fs::hard_link("f", "dir/new")?),
        &["dir/new", "dir"],
    ),
    case(
        "rename",
        FILE,
        |_| Ok(fs::rename("f", "new")?),
        &["new", "."],
    ),
    case(
        "rename_elsewhere",
        FILE_AND_DIR,
        |_| Ok(fs::rename("f", "dir/f")?),
        &["dir/f", "dir", "."],
    ),
    case(
        "rename_over_another",
        |_| {
            fs::write("f", b"f")?;
            Ok(fs::write("g", b"g")?)
        },
        |_| Ok(fs::rename("f", "g")?),
        &["g", "."],
    ),
    case(
        "rename_a_directory",
        FILE_AND_DIR,
        |_| Ok(fs::rename("dir", "moved")?),
        &["moved", "."],
    ),
    case(
        "rename_a_directory_elsewhere",
        |_| {
            fs::create_dir_all("dir/sub")?;
            fs::create_dir("other")?;
            Ok(fs::write("dir/sub/inner", b"inner")?)
        },
        |_| Ok(fs::rename("dir/sub", "other/sub")?),
        &["other/sub", "other", "dir"],
    ),
    case(
        "exchange",
        FILE_AND_DIR,
        |_| exchange("f", "dir/inner"),
        &["f", "dir/inner", "dir", "."],
    ),
    case("unlink", FILE, |_| Ok(fs::remove_file("f")?), &["."]),
    case(
        "unlink_one_of_two_links",
        |_| {
            fs::write("f", b"f")?;
            Ok(fs::hard_link("f", "g")?)
        },
        |_| Ok(fs::remove_file("f")?),
        &["g", "."],
    ),
    case(
        "rmdir",
        |_| Ok(fs::create_dir("dir")?),
        |_| Ok(fs::remove_dir("dir")?),
        &["."],
    ),
    case(
        "remove_tree",
        FILE_AND_DIR,
        |_| Ok(fs::remove_dir_all("dir")?),
        &["."],
    ),
    case(
        "tmpfile_linked",
        NOTHING,
        |_| link_open_file(&tmpfile()?, "new"),
        &["new", "."],
    ),
    case(
        "tmpfile_linked_later",
        |cx| {
            cx.file = Some(tmpfile()?);
            Ok(())
        },
        |cx| link_open_file(cx.held()?, "new"),
        &["new", "."],
    ),
    case(
        "made_and_removed",
        NOTHING,
        |_| {
            fs::write("new", b"short lived")?;
            Ok(fs::remove_file("new")?)
        },
        &["."],
    ),
    // The overlay's own.
    case(
        "copy_up_by_write",
        NOTHING,
        |_| Ok(append("low")?.write_all(b"more")?),
        &["low", "."],
    ),
    case(
        "copy_up_by_chmod",
        NOTHING,
        |_| {
            Ok(fs::set_permissions(
                "low",
                fs::Permissions::from_mode(0o600),
            )?)
        },
        &["low", "."],
    ),
    case(
        "copy_up_by_setxattr",
        NOTHING,
        |_| set_xattr("low", "user.a", b"b"),
        &["low", "."],
    ),
    case(
        "copy_up_by_hard_link",
        NOTHING,
        |_| Ok(fs::hard_link("low", "new")?),
        &["new", "."],
    ),
    case(
        "copy_up_by_rename",
        NOTHING,
        |_| Ok(fs::rename("low", "new")?),
        &["new", "."],
    ),
    case(
        "copy_up_of_parents",
        NOTHING,
        |_| Ok(fs::write("lowdir/new", b"n")?),
        &["lowdir/new", "lowdir", "."],
    ),
    case("whiteout", NOTHING, |_| Ok(fs::remove_file("low")?), &["."]),
    case(
        "second_whiteout",
        |_| Ok(fs::remove_file("low")?),
        |_| Ok(fs::remove_file("low2")?),
        &["."],
    ),
    case(
        "whiteout_of_a_directory",
        NOTHING,
        |_| Ok(fs::remove_dir_all("lowdir")?),
        &["."],
    ),
    case(
        "file_over_a_whiteout",
        |_| Ok(fs::remove_file("low")?),
        |_| Ok(fs::write("low", b"back again")?),
        &["low", "."],
    ),
    case(
        "opaque_directory",
        NOTHING,
        |_| {
            fs::remove_dir_all("lowdir")?;
            Ok(fs::create_dir("lowdir")?)
        },
        &["lowdir", "."],
    ),
    // By other ways to a file, and by others than the first process.
    case(
        "write_after_rename_of_an_open_file",
        |cx| {
            fs::write("f", b"f")?;
            cx.file = Some(append("f")?);
            Ok(fs::rename("f", "g")?)
        },
        |cx| Ok(cx.held()?.write_all(b"more")?),
        &["g"],
    ),
    case(
        "write_by_a_copied_descriptor",
        FILE,
        |_| write_received_descriptor("f"),
        &["f"],
    ),
    case(
        "write_by_a_thread",
        FILE,
        |_| {
            std::thread::spawn(|| append("f").and_then(|mut f| Ok(f.write_all(b"more")?)))
                .join()
                .map_err(|_| anyhow::anyhow!("the thread panicked"))?
        },
        &["f"],
    ),
    case(
        "write_by_a_child",
        FILE,
        |_| in_child(false, || Ok(append("f")?.write_all(b"more")?)),
        &["f"],
    ),
    case(
        "write_in_a_nested_pid_namespace",
        FILE,
        |_| in_child(true, || Ok(append("f")?.write_all(b"more")?)),
        &["f"],
    ),
];
