//! The end of every capture: hard links, net effects, nodes, the root.

use std::collections::BTreeSet;
use std::sync::Arc;

use tidepool_proto::recipe::BlobRef;
use tidepool_proto::tree::{Kind, MAX_NODE_LEN, Meta, Node};
use tidepool_proto::{ChunkName, MAX_CHUNK_LEN, TreeId};
use tidepool_scheduler_core::cut::store_blob;

use super::{CaptureError, Ctx, cut_error, shown};
use crate::index::{Child, Dir, DirId, Leaf, TreeIndex, join};

pub(super) fn finish(
    ctx: &mut Ctx<'_>,
    index: &mut TreeIndex,
    previous: Option<&TreeIndex>,
) -> Result<(), CaptureError> {
    link_groups(index);
    encode(ctx, index, previous)?;
    index.count();
    root(ctx, index, previous)
}

/// Gives all names of one file one number, and takes the number from files that have one name left.
fn link_groups(index: &mut TreeIndex) {
    let many = std::mem::take(&mut index.grouped);
    let mut grouped = BTreeSet::new();
    for ino in many {
        let Some(places) = index.places.get(ino).cloned() else {
            continue;
        };
        let paths = places
            .iter()
            .filter_map(|(dir, name)| Some(join(&index.path(*dir)?, name)));
        let group = match (places.len() > 1, paths.min()) {
            (true, Some(first)) => {
                grouped.insert(ino);
                let mut number = [0; 8];
                number.copy_from_slice(&blake3::hash(&first).as_bytes()[..8]);
                Some(u64::from_le_bytes(number))
            }
            _ => None,
        };
        for (dir, name) in places {
            let child = index.dirs.get(&dir).and_then(|d| d.children.get(&name));
            let Some(Child::Leaf(leaf)) = child else {
                continue;
            };
            let Kind::File {
                content,
                link_group,
            } = &leaf.kind
            else {
                continue;
            };
            if *link_group != group {
                let new = Arc::new(Leaf {
                    ino,
                    meta: leaf.meta.clone(),
                    kind: Kind::File {
                        content: content.clone(),
                        link_group: group,
                    },
                });
                if let Some(dir) = index.change(dir) {
                    dir.children.insert(name, Child::Leaf(new));
                }
            }
        }
    }
    index.grouped = grouped;
}

/// Encodes the nodes of all stale directories, children first.
fn encode(
    ctx: &mut Ctx<'_>,
    index: &mut TreeIndex,
    previous: Option<&TreeIndex>,
) -> Result<(), CaptureError> {
    let mut stack = vec![(index.root, false)];
    while let Some((id, children_done)) = stack.pop() {
        let Some(dir) = index.dirs.get(&id) else {
            continue;
        };
        if !dir.stale {
            continue;
        }
        if !children_done {
            stack.push((id, true));
            stack.extend(dir.children.values().filter_map(|child| match child {
                Child::Dir(sub) => Some((*sub, false)),
                Child::Leaf(_) => None,
            }));
            continue;
        }
        let old = previous.and_then(|p| same_directory(p, dir));
        let node = node(ctx, index, dir, old, id)?;
        let real = Meta {
            mtime_s: dir.mtime.0,
            mtime_ns: dir.mtime.1,
            ..dir.meta.clone()
        };
        let kept = old
            .zip(previous)
            .filter(|(old, previous)| same_entries(index, dir, previous, old))
            .and_then(|(old, _)| but_for_mtime(&real, &old.meta));
        if let Some(dir) = index.dirs.get_mut(&id).map(Arc::make_mut) {
            dir.node = node;
            dir.stale = false;
            dir.count();
            dir.meta = kept.unwrap_or(real);
        }
    }
    Ok(())
}

/// The same directory in the previous capture: by inode and generation, wherever it was. By its path would not do: what is known of a moved
/// directory moves with it.
fn same_directory<'p>(previous: &'p TreeIndex, dir: &Dir) -> Option<&'p Dir> {
    let old = previous.dirs.get(previous.by_ino.get(dir.ino)?)?;
    (dir.generation.is_some() && dir.generation == old.generation).then_some(old)
}

/// Whether two directories hold the same, but for what is inside their subdirectories.
fn same_entries(index: &TreeIndex, dir: &Dir, previous: &TreeIndex, old: &Dir) -> bool {
    let meta = |index: &TreeIndex, id| index.dirs.get(&id).map(|d| d.meta.clone());
    dir.children.len() == old.children.len()
        && dir.children.iter().zip(&old.children).all(|(new, old)| {
            new.0 == old.0
                && match (new.1, old.1) {
                    (Child::Leaf(a), Child::Leaf(b)) => {
                        Arc::ptr_eq(a, b) || (&a.meta, &a.kind) == (&b.meta, &b.kind)
                    }
                    (Child::Dir(a), Child::Dir(b)) => meta(index, *a) == meta(previous, *b),
                    _ => false,
                }
        })
}

/// The old metadata, where the new one differs in nothing but its mtime.
fn but_for_mtime(new: &Meta, old: &Meta) -> Option<Meta> {
    let as_new = Meta {
        mtime_s: new.mtime_s,
        mtime_ns: new.mtime_ns,
        ..old.clone()
    };
    (as_new == *new).then(|| old.clone())
}

fn node(
    ctx: &mut Ctx<'_>,
    index: &TreeIndex,
    dir: &Dir,
    old: Option<&Dir>,
    id: DirId,
) -> Result<Option<BlobRef>, CaptureError> {
    if dir.children.is_empty() {
        return Ok(None);
    }
    let value = index.node_of(dir).encode_linked();
    let path = || index.path(id).unwrap_or_default();
    if value.bytes.len() > MAX_NODE_LEN {
        return Err(CaptureError::Unsupported {
            path: shown(&path()),
            why: format!("its entries take {} bytes", value.bytes.len()),
        });
    }
    let known: BTreeSet<&ChunkName> = old
        .and_then(|o| o.node.as_ref())
        .map(|n| n.chunks.iter().collect())
        .unwrap_or_default();
    let sink = &mut *ctx.sink;
    store_blob(
        ctx.key,
        &value,
        &mut |name, plain: &[u8], links: &[ChunkName]| match known.contains(&name) {
            true => Ok(()),
            false => sink.chunk(name, plain, links),
        },
    )
    .map(Some)
    .map_err(|e| cut_error(&path(), e))
}

fn root(
    ctx: &mut Ctx<'_>,
    index: &mut TreeIndex,
    previous: Option<&TreeIndex>,
) -> Result<(), CaptureError> {
    let unsupported = |why: String| CaptureError::Unsupported {
        path: ".".into(),
        why,
    };
    let Some(dir) = index.dirs.get(&index.root) else {
        return Err(unsupported("its index is empty".into()));
    };
    let value = Node::root(dir.meta.clone(), dir.node.clone()).encode_linked();
    if value.bytes.len() > MAX_CHUNK_LEN {
        return Err(unsupported("its root does not fit one chunk".into()));
    }
    let links = value.within(0..value.bytes.len());
    let name = ctx.key.name_linked(&value.bytes, &links);
    index.tree = TreeId(name.0);
    if previous.is_none_or(|p| p.tree != index.tree) {
        ctx.sink.chunk(name, &value.bytes, &links)?;
    }
    Ok(())
}
