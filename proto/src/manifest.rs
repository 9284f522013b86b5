//! The manifest: the record of one checkpoint, whole by itself.
//!
//! It names a file tree (the sandbox's own upper over an image), the process images where there are any, and what a host must have to restore them.
//! Nothing refers to an earlier checkpoint but `parent`, which is history only: no chain has to be replayed.

use crate::codec::{FormatError, Reader, Writer};
use crate::ids::{CheckpointId, ChunkName, DomainId, Epoch, SandboxId, TreeId, TurnNo};
use crate::turn::Verdict;

const FORMAT: &str = "manifest";
const VERSION: u8 = 1;
/// The most bytes an encoded manifest may have.
pub const MAX_MANIFEST_LEN: usize = 1 << 18;
const MAX_TEXT: usize = 4096;
const MAX_SPEC: usize = 1 << 17;

/// One checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    pub sandbox: SandboxId,
    pub epoch: Epoch,
    /// The turn at whose end it was taken.
    pub turn: TurnNo,
    pub parent: Option<CheckpointId>,
    /// When, in milliseconds since the Unix epoch, by the capturing host's clock. For people; nothing is decided by it.
    pub created_ms: u64,
    /// What was captured anew for it.
    pub verdict: Verdict,
    pub domain: DomainId,
    /// The image's name, for people.
    pub image_name: String,
    /// The image's tree: the lower layer.
    pub image: TreeId,
    /// The upper layer, whiteouts and opaque marks included.
    pub upper: TreeId,
    /// The processes; none where nothing but the sandbox's init ran, which then starts anew.
    pub processes: Option<ProcessImage>,
    /// How the sandbox is set up, as JSON of the scheduler's sandbox specification.
    pub spec: Vec<u8>,
    /// Not secret: the key that speaks to the init inside is derived from the domain's key and this.
    pub init_nonce: [u8; 32],
    /// Logical bytes of the upper.
    pub upper_bytes: u64,
}

/// Dumped processes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessImage {
    /// The dump's directory of image files.
    pub tree: TreeId,
    /// Logical bytes of the dump.
    pub bytes: u64,
    /// How many processes are in it.
    pub count: u32,
    pub compat: Compat,
}

/// What a host must offer to restore dumped processes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compat {
    /// As `uname -m`.
    pub arch: String,
    /// As `uname -r`.
    pub kernel: String,
    /// CRIU's version.
    pub criu: String,
    /// CPU feature flags of the dumping host, sorted, separated by spaces.
    pub cpu_flags: String,
}

impl Manifest {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::versioned(VERSION);
        w.raw(&self.sandbox.0);
        w.varint(self.epoch.0);
        w.varint(self.turn.0);
        w.option(self.parent, |w, p| w.raw(&p.0));
        w.varint(self.created_ms);
        w.u8(self.verdict.to_byte());
        w.bytes(self.domain.as_str().as_bytes());
        w.bytes(self.image_name.as_bytes());
        w.raw(&self.image.0);
        w.raw(&self.upper.0);
        w.option(self.processes.as_ref(), |w, p| {
            w.raw(&p.tree.0);
            w.varint(p.bytes);
            w.varint(u64::from(p.count));
            for text in [
                &p.compat.arch,
                &p.compat.kernel,
                &p.compat.criu,
                &p.compat.cpu_flags,
            ] {
                w.bytes(text.as_bytes());
            }
        });
        w.bytes(&self.spec);
        w.raw(&self.init_nonce);
        w.varint(self.upper_bytes);
        w.into_bytes()
    }

    /// Reads what [`Manifest::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        if bytes.len() > MAX_MANIFEST_LEN {
            return Err(FormatError::Invalid {
                format: FORMAT,
                what: format!("{} bytes are over the bound", bytes.len()),
            });
        }
        let mut r = Reader::versioned(FORMAT, bytes, VERSION)?;
        let manifest = Self {
            sandbox: SandboxId(r.array()?),
            epoch: Epoch(r.varint()?),
            turn: TurnNo(r.varint()?),
            parent: r.option(|r| Ok(CheckpointId(r.array()?)))?,
            created_ms: r.varint()?,
            verdict: Verdict::read(&mut r)?,
            domain: {
                let text = r.text(64)?;
                text.parse().map_err(|_| r.invalid("not a domain"))?
            },
            image_name: r.text(MAX_TEXT)?,
            image: TreeId(r.array()?),
            upper: TreeId(r.array()?),
            processes: r.option(|r| {
                Ok(ProcessImage {
                    tree: TreeId(r.array()?),
                    bytes: r.varint()?,
                    count: r.varint_u32()?,
                    compat: Compat {
                        arch: r.text(MAX_TEXT)?,
                        kernel: r.text(MAX_TEXT)?,
                        criu: r.text(MAX_TEXT)?,
                        cpu_flags: r.text(MAX_TEXT)?,
                    },
                })
            })?,
            spec: r.bytes(MAX_SPEC)?.to_vec(),
            init_nonce: r.array()?,
            upper_bytes: r.varint()?,
        };
        r.finish()?;
        Ok(manifest)
    }

    /// The chunks from which, by their links, everything it needs is reached.
    pub fn links(&self) -> impl Iterator<Item = ChunkName> {
        let processes = self.processes.as_ref().map(|p| p.tree);
        [Some(self.image), Some(self.upper), processes]
            .into_iter()
            .flatten()
            .map(|tree| ChunkName(tree.0))
    }

    /// The id of the checkpoint that commits these encoded bytes.
    pub fn id_of(encoded: &[u8]) -> CheckpointId {
        CheckpointId(*blake3::hash(encoded).as_bytes())
    }
}
