//! What differs between two trees, by path.
//!
//! Equal subtrees are never loaded: two directories with the same node are the same. The walk keeps its own stack, so a tree may be as deep as it
//! likes. Nothing is read here: the caller loads nodes.
//!
//! Overlay whiteouts (character device 0:0) mean that a name is absent: one that appears is a removal, one that goes is an addition.

use std::cmp::Ordering;

use tidepool_proto::api::{ChangeKind, PathChange};
use tidepool_proto::recipe::BlobRef;
use tidepool_proto::tree::{Entry, Kind, Node};

/// What differs, in path order (a directory before what is in it).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TreeDiff {
    pub changes: Vec<PathChange>,
    /// More differ than the limit allowed to list.
    pub truncated: bool,
}

/// A pair of directories still to be compared, each with the next entry to look at.
struct Frame {
    path: Vec<u8>,
    before: Vec<Entry>,
    after: Vec<Entry>,
    i: usize,
    j: usize,
}

/// Compares two trees, given by their root nodes. `load` reads the node of a directory's children.
///
/// At most `limit` changes are listed.
pub fn diff<E>(
    before: &Node,
    after: &Node,
    limit: usize,
    mut load: impl FnMut(&BlobRef) -> Result<Node, E>,
) -> Result<TreeDiff, E> {
    let mut out = TreeDiff::default();
    let mut stack = vec![Frame {
        path: Vec::new(),
        before: before.entries.clone(),
        after: after.entries.clone(),
        i: 0,
        j: 0,
    }];
    while let Some(frame) = stack.last_mut() {
        let (a, b) = match (frame.before.get(frame.i), frame.after.get(frame.j)) {
            (None, None) => {
                stack.pop();
                continue;
            }
            (a @ Some(_), None) => (a, None),
            (None, b @ Some(_)) => (None, b),
            (Some(a), Some(b)) => match a.name.cmp(&b.name) {
                Ordering::Less => (Some(a), None),
                Ordering::Greater => (None, Some(b)),
                Ordering::Equal => (Some(a), Some(b)),
            },
        };
        let name = a.or(b).map(|e| e.name.as_slice()).unwrap_or_default();
        let mut path = frame.path.clone();
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        let change = change_of(a, b);
        let (down_a, down_b) = (a.and_then(children), b.and_then(children));
        let down = if down_a == down_b {
            None
        } else {
            Some((down_a.cloned(), down_b.cloned()))
        };
        let sizes = (a.map_or(0, size), b.map_or(0, size));
        frame.i += usize::from(a.is_some());
        frame.j += usize::from(b.is_some());
        if let Some(change) = change {
            if out.changes.len() >= limit {
                out.truncated = true;
                return Ok(out);
            }
            out.changes.push(PathChange {
                path: printable(if path.is_empty() { b"." } else { &path }),
                change,
                bytes_before: sizes.0,
                bytes_after: sizes.1,
            });
        }
        if let Some((a, b)) = down {
            let mut entries = |blob: Option<BlobRef>| match blob {
                Some(blob) => load(&blob).map(|n| n.entries),
                None => Ok(Vec::new()),
            };
            stack.push(Frame {
                path,
                before: entries(a)?,
                after: entries(b)?,
                i: 0,
                j: 0,
            });
        }
    }
    Ok(out)
}

fn children(e: &Entry) -> Option<&BlobRef> {
    match &e.kind {
        Kind::Dir { children } => children.as_ref(),
        _ => None,
    }
}

fn size(e: &Entry) -> u64 {
    match &e.kind {
        Kind::File { content, .. } => content.len(),
        Kind::Symlink { target } => target.len() as u64,
        _ => 0,
    }
}

/// Whether an entry is an overlay's mark that a name of the lower layer is gone.
pub fn is_whiteout(e: &Entry) -> bool {
    matches!(e.kind, Kind::CharDevice { major: 0, minor: 0 })
}

fn change_of(before: Option<&Entry>, after: Option<&Entry>) -> Option<ChangeKind> {
    let gone = |e: Option<&Entry>| e.is_some_and(is_whiteout);
    match (before, after) {
        (None, None) => None,
        (a, b) if gone(a) && gone(b) => None,
        (_, b) if gone(b) => Some(ChangeKind::Removed),
        (a, Some(_)) if gone(a) => Some(ChangeKind::Added),
        // A whiteout that goes with its directory: the name comes back only with the layer below, which is not compared here.
        (a, None) if gone(a) => Some(ChangeKind::Added),
        (None, Some(_)) => Some(ChangeKind::Added),
        (Some(_), None) => Some(ChangeKind::Removed),
        (Some(a), Some(b)) => {
            let same_kind = match (&a.kind, &b.kind) {
                (Kind::Dir { .. }, Kind::Dir { .. }) => true,
                (Kind::File { content: c, .. }, Kind::File { content: d, .. }) => c == d,
                (x, y) => x == y,
            };
            if !same_kind {
                Some(ChangeKind::Modified)
            } else if a.meta != b.meta || link_group(a) != link_group(b) {
                Some(ChangeKind::Metadata)
            } else {
                None
            }
        }
    }
}

fn link_group(e: &Entry) -> Option<u64> {
    match &e.kind {
        Kind::File { link_group, .. } => *link_group,
        _ => None,
    }
}

/// A path for people: what is not UTF-8 or not printable becomes `\xNN`, a backslash `\\`.
pub fn printable(path: &[u8]) -> String {
    let mut out = String::with_capacity(path.len());
    for chunk in path.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\\' => out.push_str("\\\\"),
                c if c.is_control() => {
                    let mut buf = [0; 4];
                    for b in c.encode_utf8(&mut buf).bytes() {
                        out.push_str(&format!("\\x{b:02x}"));
                    }
                }
                c => out.push(c),
            }
        }
        for b in chunk.invalid() {
            out.push_str(&format!("\\x{b:02x}"));
        }
    }
    out
}
