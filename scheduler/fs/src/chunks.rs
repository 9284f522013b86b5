//! Where chunks go and come from, and reading blobs through that.

use std::collections::BTreeSet;

use tidepool_proto::recipe::{BlobRef, MAX_RECIPE_LEN, Recipe};
use tidepool_proto::tree::{Content, Kind, MAX_NODE_LEN, Node};
use tidepool_proto::{ChunkName, FormatError, MAX_CHUNK_LEN, TreeId};

/// Takes chunks as they are cut. The same chunk may come more than once, and may be in the store already: deduplicating is the sink's.
pub trait ChunkSink {
    /// Takes one chunk: its name, its plaintext (at most 1 MiB) and the names it refers to.
    fn chunk(
        &mut self,
        name: ChunkName,
        plain: &[u8],
        links: &[ChunkName],
    ) -> Result<(), SinkError>;
}

/// Gives plaintexts of chunks.
pub trait ChunkSource {
    /// The plaintexts of `names`, in order, each verified against its name. Called with batches of some MiB, so that it may fetch in parallel.
    fn get(&mut self, names: &[ChunkName]) -> Result<Vec<Vec<u8>>, SourceError>;
}

/// A sink that failed.
#[derive(Debug, thiserror::Error)]
#[error("chunk {name} could not be taken: {reason}")]
pub struct SinkError {
    pub name: ChunkName,
    pub reason: String,
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl SinkError {
    /// With an error as the reason.
    pub fn new(
        name: ChunkName,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        let source = source.into();
        Self {
            name,
            reason: source.to_string(),
            source: Some(source),
        }
    }
}

/// A source that failed, or what it gave is wrong.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// No such chunk.
    #[error("chunk {name} is missing")]
    Missing { name: ChunkName },
    /// The chunk is not what its name says.
    #[error("chunk {name} is damaged: {reason}")]
    Damaged { name: ChunkName, reason: String },
    /// It could not be asked.
    #[error("chunk {name} could not be read: {reason}")]
    Failed {
        name: ChunkName,
        reason: String,
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// A blob of chunks is not the format it should be.
    #[error("the blob of {len} bytes that opens with chunk {first} is damaged: {source}")]
    Format {
        first: ChunkName,
        len: u64,
        #[source]
        source: FormatError,
    },
}

/// Drops every chunk: for captures that only want the tree's id.
#[derive(Debug, Default, Clone, Copy)]
pub struct NullSink;

impl ChunkSink for NullSink {
    fn chunk(&mut self, _: ChunkName, _: &[u8], _: &[ChunkName]) -> Result<(), SinkError> {
        Ok(())
    }
}

/// One chunk.
pub(crate) fn get_one(
    source: &mut dyn ChunkSource,
    name: ChunkName,
) -> Result<Vec<u8>, SourceError> {
    let mut got = source.get(&[name])?;
    match (got.pop(), got.is_empty()) {
        (Some(plain), true) => Ok(plain),
        _ => Err(wrong_count(name)),
    }
}

pub(crate) fn wrong_count(name: ChunkName) -> SourceError {
    SourceError::Failed {
        name,
        reason: "the source gave another number of chunks than it was asked for".into(),
        source: None,
    }
}

/// The bytes of a blob. `max` bounds its length.
pub fn load_blob(
    source: &mut dyn ChunkSource,
    blob: &BlobRef,
    max: usize,
) -> Result<Vec<u8>, SourceError> {
    let Some(first) = blob.chunks.first().copied() else {
        return Ok(Vec::new());
    };
    let wrong = |what: String| SourceError::Format {
        first,
        len: blob.len,
        source: FormatError::Invalid {
            format: "blob",
            what,
        },
    };
    if blob.len > max as u64 || blob.len > (blob.chunks.len() * MAX_CHUNK_LEN) as u64 {
        return Err(wrong(format!("{} bytes are over the bound", blob.len)));
    }
    let mut out = Vec::new();
    for names in blob.chunks.chunks(128) {
        let parts = source.get(names)?;
        if parts.len() != names.len() {
            return Err(wrong_count(names[0]));
        }
        for part in parts {
            if (out.len() + part.len()) as u64 > blob.len {
                return Err(wrong("its chunks are longer than it is".into()));
            }
            out.extend_from_slice(&part);
        }
    }
    if out.len() as u64 != blob.len {
        return Err(wrong(format!("its chunks make {} bytes", out.len())));
    }
    Ok(out)
}

fn format_error(blob: &BlobRef, source: FormatError) -> SourceError {
    SourceError::Format {
        first: blob.chunks.first().copied().unwrap_or(ChunkName([0; 32])),
        len: blob.len,
        source,
    }
}

/// The node of a directory's children. An empty name in it is refused: only a root has one.
pub fn load_node(source: &mut dyn ChunkSource, blob: &BlobRef) -> Result<Node, SourceError> {
    let bytes = load_blob(source, blob, MAX_NODE_LEN)?;
    let node = Node::decode(&bytes).map_err(|e| format_error(blob, e))?;
    if node.entries.iter().any(|e| e.name.is_empty()) {
        let what = "a root inside a tree".to_owned();
        let format = "tree node";
        return Err(format_error(blob, FormatError::Invalid { format, what }));
    }
    Ok(node)
}

/// The root node of a tree.
pub fn load_root(source: &mut dyn ChunkSource, tree: TreeId) -> Result<Node, SourceError> {
    let name = ChunkName(tree.0);
    let bytes = get_one(source, name)?;
    let blob = BlobRef {
        len: bytes.len() as u64,
        chunks: vec![name],
    };
    let node = Node::decode(&bytes).map_err(|e| format_error(&blob, e))?;
    node.as_root().map_err(|e| format_error(&blob, e))?;
    Ok(node)
}

/// The recipe of a stored content.
pub(crate) fn load_recipe(
    source: &mut dyn ChunkSource,
    blob: &BlobRef,
    len: u64,
) -> Result<Recipe, SourceError> {
    let bytes = load_blob(source, blob, MAX_RECIPE_LEN)?;
    let recipe = Recipe::decode(&bytes).map_err(|e| format_error(blob, e))?;
    if recipe.len() != len {
        let what = format!(
            "a recipe of {} bytes for a file of {len} bytes",
            recipe.len()
        );
        let format = "recipe";
        return Err(format_error(blob, FormatError::Invalid { format, what }));
    }
    Ok(recipe)
}

/// The names of all chunks a tree needs, its nodes and recipes included.
pub fn walk_chunks(
    source: &mut dyn ChunkSource,
    tree: TreeId,
) -> Result<BTreeSet<ChunkName>, SourceError> {
    let mut names = BTreeSet::from([ChunkName(tree.0)]);
    let mut nodes = vec![load_root(source, tree)?];
    while let Some(node) = nodes.pop() {
        for entry in node.entries {
            match entry.kind {
                Kind::Dir {
                    children: Some(blob),
                } => {
                    // Equal directories are walked once.
                    let fresh = blob.chunks.iter().filter(|c| !names.contains(*c)).count();
                    names.extend(&blob.chunks);
                    if fresh > 0 {
                        nodes.push(load_node(source, &blob)?);
                    }
                }
                Kind::File {
                    content: Content::Recipe(recipe),
                    ..
                } => names.extend(recipe.chunks()),
                Kind::File {
                    content: Content::Stored { len, recipe },
                    ..
                } => {
                    names.extend(&recipe.chunks);
                    names.extend(load_recipe(source, &recipe, len)?.chunks());
                }
                _ => {}
            }
        }
    }
    Ok(names)
}
