//! What the last capture of a directory found, by inode: the basis for reading only what is dirty.
//!
//! Directories have ids of their own, so that one that is moved keeps what is known of it. All parts are shared between an index and its
//! successor: a capture never changes the index it starts from, and one that fails leaves it whole.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use tidepool_proto::TreeId;
use tidepool_proto::recipe::BlobRef;
use tidepool_proto::tree::{Entry, Kind, Meta, Node};
use tidepool_scheduler_core::diff::{TreeDiff, diff};

use crate::shards::ByInode;

/// A name in a directory.
pub(crate) type Name = Arc<[u8]>;

/// A directory's identity within an index and its successors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct DirId(u64);

/// What is known of a directory.
#[derive(Debug, Clone)]
pub(crate) struct Dir {
    /// None for the root, and for one that was taken out of its place.
    pub(crate) parent: Option<DirId>,
    pub(crate) name: Name,
    pub(crate) ino: u64,
    pub(crate) generation: Option<u32>,
    pub(crate) meta: Meta,
    /// The mtime as it was last read, where `meta` has an earlier one because nothing lasting changed since.
    pub(crate) mtime: (i64, u32),
    pub(crate) children: BTreeMap<Name, Child>,
    /// The node of its children; none where it is empty. Meaningless while `stale`.
    pub(crate) node: Option<BlobRef>,
    /// Entries that are no directories, and bytes of files with one name among them. Meaningless while `stale`.
    pub(crate) files: u64,
    pub(crate) bytes: u64,
    pub(crate) stale: bool,
}

/// One entry of a directory.
#[derive(Debug, Clone)]
pub(crate) enum Child {
    Dir(DirId),
    Leaf(Arc<Leaf>),
}

/// What is known of a file, link or device.
#[derive(Debug, Clone)]
pub(crate) struct Leaf {
    pub(crate) ino: u64,
    pub(crate) meta: Meta,
    pub(crate) kind: Kind,
}

impl Leaf {
    pub(crate) fn is_whiteout(&self) -> bool {
        matches!(self.kind, Kind::CharDevice { major: 0, minor: 0 })
    }

    fn len(&self) -> u64 {
        match &self.kind {
            Kind::File { content, .. } => content.len(),
            _ => 0,
        }
    }
}

/// A directory as it was captured: its tree, and by inode what became of each file in it.
#[derive(Clone)]
pub struct TreeIndex {
    pub(crate) dev: u64,
    pub(crate) root: DirId,
    pub(crate) dirs: HashMap<DirId, Arc<Dir>>,
    next: u64,
    pub(crate) by_ino: ByInode<DirId>,
    /// Every place of every inode that is no directory. Whiteouts share one inode and are left out.
    pub(crate) places: ByInode<Vec<(DirId, Name)>>,
    /// Inodes that have or had more than one place: whose leaves carry a link group, or are to carry one.
    pub(crate) grouped: BTreeSet<u64>,
    pub(crate) tree: TreeId,
    pub(crate) bytes: u64,
    pub(crate) files: u64,
}

impl std::fmt::Debug for TreeIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TreeIndex")
            .field("tree", &self.tree)
            .field("bytes", &self.bytes)
            .field("files", &self.files)
            .field("directories", &self.dirs.len())
            .finish_non_exhaustive()
    }
}

impl TreeIndex {
    /// An index of nothing on device `dev`; its root is the first directory added.
    pub(crate) fn new(dev: u64) -> Self {
        Self {
            dev,
            root: DirId(0),
            dirs: HashMap::new(),
            next: 0,
            by_ino: ByInode::new(),
            places: ByInode::new(),
            grouped: BTreeSet::new(),
            tree: TreeId([0; 32]),
            bytes: 0,
            files: 0,
        }
    }

    /// The tree it describes.
    pub fn tree(&self) -> TreeId {
        self.tree
    }

    /// Logical bytes of all files, each inode once.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many names that are no directories.
    pub fn files(&self) -> u64 {
        self.files
    }

    /// How many directories, the root included.
    pub fn directories(&self) -> u64 {
        self.dirs.len() as u64
    }

    /// The device (`st_dev`) of the directory.
    pub fn dev(&self) -> u64 {
        self.dev
    }

    /// The paths of an inode, relative to the root; empty where it is unknown (or the root itself: `.`).
    pub fn paths_of(&self, ino: u64) -> Vec<Vec<u8>> {
        if let Some(id) = self.by_ino.get(ino) {
            let path = self.path(*id).unwrap_or_default();
            return vec![if path.is_empty() { b".".to_vec() } else { path }];
        }
        self.places
            .get(ino)
            .into_iter()
            .flatten()
            .filter_map(|(dir, name)| Some(join(&self.path(*dir)?, name)))
            .collect()
    }

    /// What changed from `before` to this index, both of the same directory. At most `limit` changes.
    pub fn changes_since(&self, before: &TreeIndex, limit: usize) -> TreeDiff {
        let mut nodes: HashMap<(u64, Vec<tidepool_proto::ChunkName>), &Arc<Dir>> = HashMap::new();
        let root = |index: &TreeIndex| match index.dirs.get(&index.root) {
            Some(dir) => Node::root(dir.meta.clone(), dir.node.clone()),
            None => Node::default(),
        };
        let (a, b) = (root(before), root(self));
        if a == b {
            return TreeDiff::default();
        }
        for index in [before, self] {
            for dir in index.dirs.values() {
                if let Some(node) = &dir.node {
                    nodes.insert((node.len, node.chunks.clone()), dir);
                }
            }
        }
        let by_node = |blob: &BlobRef| nodes.get(&(blob.len, blob.chunks.clone())).copied();
        let load = |blob: &BlobRef| -> Result<Node, std::convert::Infallible> {
            // Either index gives the entries of an equal node; which one resolves its directories does not matter.
            Ok(by_node(blob)
                .map(|dir| {
                    let here = self
                        .dirs
                        .get(&self.by_ino.get(dir.ino).copied().unwrap_or(self.root));
                    match here.is_some_and(|d| Arc::ptr_eq(d, dir)) {
                        true => self.node_of(dir),
                        false => before.node_of(dir),
                    }
                })
                .unwrap_or_default())
        };
        match diff(&a, &b, limit, load) {
            Ok(changes) => changes,
            Err(never) => match never {},
        }
    }

    /// A directory's children as a tree node.
    pub(crate) fn node_of(&self, dir: &Dir) -> Node {
        let entries = dir
            .children
            .iter()
            .filter_map(|(name, child)| {
                let (meta, kind) = match child {
                    Child::Leaf(leaf) => (leaf.meta.clone(), leaf.kind.clone()),
                    Child::Dir(id) => {
                        let sub = self.dirs.get(id)?;
                        let children = sub.node.clone();
                        (sub.meta.clone(), Kind::Dir { children })
                    }
                };
                let name = name.to_vec();
                Some(Entry { name, meta, kind })
            })
            .collect();
        Node { entries }
    }

    /// The path of a directory, relative to the root; none where it is not in the tree any more.
    pub(crate) fn path(&self, id: DirId) -> Option<Vec<u8>> {
        let mut names = Vec::new();
        let mut at = id;
        while at != self.root {
            let dir = self.dirs.get(&at)?;
            names.push(&dir.name);
            at = dir.parent?;
        }
        let mut path = Vec::new();
        for name in names.into_iter().rev() {
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name);
        }
        Some(path)
    }

    /// How deep a directory is, and whether it is in the tree.
    pub(crate) fn depth(&self, id: DirId) -> Option<usize> {
        let mut depth = 0;
        let mut at = id;
        while at != self.root {
            at = self.dirs.get(&at)?.parent?;
            depth += 1;
        }
        Some(depth)
    }

    /// Adds an empty directory at a place.
    pub(crate) fn add_dir(&mut self, dir: Dir) -> DirId {
        let id = DirId(self.next);
        self.next += 1;
        self.by_ino.insert(dir.ino, id);
        let (parent, name) = (dir.parent, dir.name.clone());
        self.dirs.insert(id, Arc::new(dir));
        match parent.and_then(|p| self.change(p)) {
            Some(parent) => {
                parent.children.insert(name, Child::Dir(id));
            }
            None => self.root = id,
        }
        id
    }

    /// A directory to be changed; it and all above it are encoded anew at the end.
    pub(crate) fn change(&mut self, id: DirId) -> Option<&mut Dir> {
        let mut at = Some(id);
        while let Some(up) = at {
            let dir = self.dirs.get_mut(&up)?;
            if dir.stale && up != id {
                break;
            }
            let dir = Arc::make_mut(dir);
            dir.stale = true;
            at = dir.parent;
        }
        self.dirs.get_mut(&id).map(Arc::make_mut)
    }

    /// Puts a leaf at a place, instead of what was there.
    pub(crate) fn put_leaf(&mut self, dir: DirId, name: Name, leaf: Arc<Leaf>) {
        self.take_child(dir, &name);
        if !leaf.is_whiteout() {
            let many = self.places.change(leaf.ino, |places| {
                places.push((dir, name.clone()));
                (places.len() > 1, false)
            });
            if many {
                self.grouped.insert(leaf.ino);
            }
        }
        if let Some(dir) = self.change(dir) {
            dir.children.insert(name, Child::Leaf(leaf));
        }
    }

    /// Takes an entry out. A directory stays known, without a place, until [`Self::drop_orphans`]: it may have been moved.
    pub(crate) fn take_child(&mut self, dir: DirId, name: &[u8]) {
        let Some(child) = self.change(dir).and_then(|d| d.children.remove(name)) else {
            return;
        };
        match child {
            Child::Leaf(leaf) => self.forget_place(&leaf, dir, name),
            Child::Dir(id) => {
                if let Some(gone) = self.dirs.get_mut(&id).map(Arc::make_mut) {
                    gone.parent = None;
                }
            }
        }
    }

    /// Puts a known directory at another place.
    pub(crate) fn move_dir(&mut self, id: DirId, parent: DirId, name: Name) {
        let old = self.dirs.get(&id).map(|d| (d.parent, d.name.clone()));
        if let Some((Some(old_parent), old_name)) = old {
            self.take_child(old_parent, &old_name);
        }
        if let Some(dir) = self.dirs.get_mut(&id).map(Arc::make_mut) {
            dir.parent = Some(parent);
            dir.name = name.clone();
        }
        if let Some(parent) = self.change(parent) {
            parent.children.insert(name, Child::Dir(id));
        }
        // What is stale inside makes its new ancestors stale, which the line above did.
    }

    /// Forgets directories that have no place any more, with all that is in them.
    pub(crate) fn drop_orphans(&mut self) {
        let mut gone: Vec<DirId> = self
            .dirs
            .iter()
            .filter(|(id, dir)| dir.parent.is_none() && **id != self.root)
            .map(|(id, _)| *id)
            .collect();
        while let Some(id) = gone.pop() {
            let Some(dir) = self.dirs.remove(&id) else {
                continue;
            };
            if self.by_ino.get(dir.ino) == Some(&id) {
                self.by_ino.remove(dir.ino);
            }
            for (name, child) in &dir.children {
                match child {
                    Child::Dir(sub) => gone.push(*sub),
                    Child::Leaf(leaf) => self.forget_place(leaf, id, name),
                }
            }
        }
    }

    fn forget_place(&mut self, leaf: &Leaf, dir: DirId, name: &[u8]) {
        if !leaf.is_whiteout() {
            self.places.change(leaf.ino, |places| {
                places.retain(|(d, n)| (*d, n.as_ref()) != (dir, name));
                ((), places.is_empty())
            });
        }
    }

    /// Counts bytes and files again.
    pub(crate) fn count(&mut self) {
        self.files = self.dirs.values().map(|d| d.files).sum();
        self.bytes = self.dirs.values().map(|d| d.bytes).sum();
        for ino in &self.grouped {
            let first = self.places.get(*ino).and_then(|p| p.first());
            let child = first.and_then(|(dir, name)| self.dirs.get(dir)?.children.get(name));
            if let Some(Child::Leaf(leaf)) = child {
                self.bytes += leaf.len();
            }
        }
    }
}

impl Dir {
    /// Counts what is in it.
    pub(crate) fn count(&mut self) {
        (self.files, self.bytes) = (0, 0);
        for child in self.children.values() {
            if let Child::Leaf(leaf) = child {
                self.files += 1;
                if let Kind::File {
                    link_group: None, ..
                } = leaf.kind
                {
                    self.bytes += leaf.len();
                }
            }
        }
    }
}

/// A path and a name in it.
pub(crate) fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(path.len() + name.len() + 1);
    out.extend_from_slice(path);
    if !path.is_empty() {
        out.push(b'/');
    }
    out.extend_from_slice(name);
    out
}
