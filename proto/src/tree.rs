//! Trees: a directory as a Merkle node of names, metadata and content.
//!
//! A node is the sorted list of a directory's entries; each entry carries its own metadata, and a directory entry refers to the node of its children.
//! The root of a tree is a node with the single entry "" (the root directory itself, with its metadata); a [`crate::TreeId`] is the name of
//! the chunk that holds that node. Small files stand inside their node, so that a tree of many small files is few chunks.
//!
//! Invariants: entries are sorted by name, names are unique, none is empty, `.`, `..` or holds `/` or NUL (but for the root's ""): a tree cannot
//! name anything outside its root. Times are kept to the nanosecond; inode numbers, ctime and atime are not part of a tree.

use crate::codec::{FormatError, Linked, Reader, Writer};
use crate::recipe::{BlobRef, Recipe};

const FORMAT: &str = "tree node";
const VERSION: u8 = 1;
/// The most bytes an encoded node may have.
pub const MAX_NODE_LEN: usize = 1 << 28;
/// The most entries one directory may have.
pub const MAX_ENTRIES: usize = 1 << 22;
/// File content up to this length stands inside its node.
pub const MAX_INLINE: usize = 512;
/// Recipes up to this many segments stand inside their node.
pub const MAX_INLINE_SEGMENTS: usize = 16;
/// Linux's bound on a name, in bytes.
pub const MAX_NAME: usize = 255;
/// Linux's bound on a symbolic link's target, in bytes.
pub const MAX_TARGET: usize = 4096;
const MAX_XATTRS: usize = 1024;
const MAX_XATTR_VALUE: usize = 1 << 16;

/// A directory's entries, sorted by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    pub entries: Vec<Entry>,
}

/// One name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub name: Vec<u8>,
    pub meta: Meta,
    pub kind: Kind,
}

/// What every inode has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meta {
    /// Permission bits with set-id and sticky bits (`0o7777`), without the file type.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Modification time, seconds since the epoch.
    pub mtime_s: i64,
    /// Its nanoseconds, below 10^9.
    pub mtime_ns: u32,
    /// Extended attributes (ACLs and capabilities among them), sorted by name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// `FS_IOC_GETFLAGS` flags that a restore sets again (immutable, append-only, nodump, noatime, ...), 0 for most.
    pub flags: u32,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    File {
        content: Content,
        /// Names of one inode carry one number: the first 8 bytes of the hash of the first of their paths. None where there is one name.
        link_group: Option<u64>,
    },
    /// The node of its children; none where it is empty.
    Dir {
        children: Option<BlobRef>,
    },
    Symlink {
        target: Vec<u8>,
    },
    /// A character device (whiteouts of an overlay are 0:0).
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
    Socket,
}

/// A file's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// The bytes themselves, at most [`MAX_INLINE`].
    Inline(Vec<u8>),
    /// A recipe of at most [`MAX_INLINE_SEGMENTS`].
    Recipe(Recipe),
    /// A longer recipe, encoded and kept as chunks; `len` is the file's length in bytes.
    Stored { len: u64, recipe: BlobRef },
}

impl Content {
    /// The file's length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Content::Inline(bytes) => bytes.len() as u64,
            Content::Recipe(recipe) => recipe.len(),
            Content::Stored { len, .. } => *len,
        }
    }

    /// Whether the file has no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Node {
    /// The node that is a tree's root: the root directory's own metadata and children.
    pub fn root(meta: Meta, children: Option<BlobRef>) -> Self {
        Self {
            entries: vec![Entry {
                name: Vec::new(),
                meta,
                kind: Kind::Dir { children },
            }],
        }
    }

    /// The root directory's metadata and children, where this is a root node.
    pub fn as_root(&self) -> Result<(&Meta, Option<&BlobRef>), FormatError> {
        match self.entries.as_slice() {
            [
                Entry {
                    name,
                    meta,
                    kind: Kind::Dir { children },
                },
            ] if name.is_empty() => Ok((meta, children.as_ref())),
            _ => Err(FormatError::Invalid {
                format: FORMAT,
                what: "not the root of a tree".into(),
            }),
        }
    }

    /// Its bytes. The entries must be sorted and valid, as [`Node::decode`] demands.
    pub fn encode(&self) -> Vec<u8> {
        self.encode_linked().bytes
    }

    /// Its bytes, and where they name chunks.
    pub fn encode_linked(&self) -> Linked {
        let mut w = Writer::versioned(VERSION);
        w.varint(self.entries.len() as u64);
        for e in &self.entries {
            e.write(&mut w);
        }
        w.into_linked()
    }

    /// Reads what [`Node::encode`] wrote; refuses what is unsorted, repeated or could escape the root.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut r = Reader::versioned(FORMAT, bytes, VERSION)?;
        let n = r.count(MAX_ENTRIES, 10)?;
        let mut entries: Vec<Entry> = Vec::with_capacity(n);
        for _ in 0..n {
            let e = Entry::read(&mut r)?;
            if entries.last().is_some_and(|last| last.name >= e.name) {
                return Err(r.invalid("names are not in order"));
            }
            let is_root = e.name.is_empty() && n == 1;
            if !is_root && !valid_name(&e.name) {
                return Err(r.invalid(format!(
                    "{:?} is not a name",
                    String::from_utf8_lossy(&e.name)
                )));
            }
            entries.push(e);
        }
        r.finish()?;
        Ok(Self { entries })
    }
}

/// Whether `name` may name a file in a directory.
pub fn valid_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME
        && name != b"."
        && name != b".."
        && !name.iter().any(|b| *b == b'/' || *b == 0)
}

impl Entry {
    fn write(&self, w: &mut Writer) {
        w.bytes(&self.name);
        let m = &self.meta;
        w.varint(u64::from(m.mode));
        w.varint(u64::from(m.uid));
        w.varint(u64::from(m.gid));
        w.signed(m.mtime_s);
        w.varint(u64::from(m.mtime_ns));
        w.varint(u64::from(m.flags));
        w.varint(m.xattrs.len() as u64);
        for (k, v) in &m.xattrs {
            w.bytes(k);
            w.bytes(v);
        }
        match &self.kind {
            Kind::File {
                content,
                link_group,
            } => {
                w.u8(match content {
                    Content::Inline(_) => 0,
                    Content::Recipe(_) => 1,
                    Content::Stored { .. } => 2,
                });
                w.option(*link_group, |w, g| w.raw(&g.to_le_bytes()));
                match content {
                    Content::Inline(bytes) => w.bytes(bytes),
                    Content::Recipe(recipe) => recipe.write(w),
                    Content::Stored { len, recipe } => {
                        w.varint(*len);
                        recipe.write(w);
                    }
                }
            }
            Kind::Dir { children } => {
                w.u8(3);
                w.option(children.as_ref(), |w, c| c.write(w));
            }
            Kind::Symlink { target } => {
                w.u8(4);
                w.bytes(target);
            }
            Kind::CharDevice { major, minor } => {
                w.u8(5);
                w.varint(u64::from(*major));
                w.varint(u64::from(*minor));
            }
            Kind::BlockDevice { major, minor } => {
                w.u8(6);
                w.varint(u64::from(*major));
                w.varint(u64::from(*minor));
            }
            Kind::Fifo => w.u8(7),
            Kind::Socket => w.u8(8),
        }
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, FormatError> {
        let name = r.bytes(MAX_NAME)?.to_vec();
        let mut meta = Meta {
            mode: r.varint_u32()?,
            uid: r.varint_u32()?,
            gid: r.varint_u32()?,
            mtime_s: r.signed()?,
            mtime_ns: r.varint_u32()?,
            flags: r.varint_u32()?,
            xattrs: Vec::new(),
        };
        if meta.mode & !0o7777 != 0 || meta.mtime_ns >= 1_000_000_000 {
            return Err(r.invalid("mode or time is out of range"));
        }
        for _ in 0..r.count(MAX_XATTRS, 2)? {
            let key = r.bytes(MAX_NAME)?.to_vec();
            let value = r.bytes(MAX_XATTR_VALUE)?.to_vec();
            if key.is_empty()
                || key.contains(&0)
                || meta.xattrs.last().is_some_and(|(last, _)| *last >= key)
            {
                return Err(r.invalid("extended attributes are not in order"));
            }
            meta.xattrs.push((key, value));
        }
        let kind = match r.u8()? {
            tag @ 0..=2 => {
                let link_group = r.option(|r| Ok(u64::from_le_bytes(r.array()?)))?;
                let content = match tag {
                    0 => Content::Inline(r.bytes(MAX_INLINE)?.to_vec()),
                    1 => Content::Recipe(Recipe::read(r, MAX_INLINE_SEGMENTS)?),
                    _ => {
                        let len = r.varint()?;
                        if len > i64::MAX as u64 {
                            return Err(r.invalid("the length is larger than a file can be"));
                        }
                        let recipe = BlobRef::read(r)?;
                        Content::Stored { len, recipe }
                    }
                };
                Kind::File {
                    content,
                    link_group,
                }
            }
            3 => Kind::Dir {
                children: r.option(BlobRef::read)?,
            },
            4 => {
                let target = r.bytes(MAX_TARGET)?.to_vec();
                if target.is_empty() || target.contains(&0) {
                    return Err(r.invalid("not a symbolic link's target"));
                }
                Kind::Symlink { target }
            }
            5 => Kind::CharDevice {
                major: r.varint_u32()?,
                minor: r.varint_u32()?,
            },
            6 => Kind::BlockDevice {
                major: r.varint_u32()?,
                minor: r.varint_u32()?,
            },
            7 => Kind::Fifo,
            8 => Kind::Socket,
            tag => return Err(r.invalid(format!("unknown kind of entry {tag}"))),
        };
        Ok(Self { name, meta, kind })
    }
}
