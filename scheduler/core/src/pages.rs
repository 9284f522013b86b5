//! Memory images: 4 KiB pages by name, gathered in packs, zero pages as holes.
//!
//! A CRIU pages file is a concatenation of present pages, so that one new page shifts all that follow: cutting it by content ships many times
//! what changed. Here each page is looked up by its name in an index of pages known to be in some pack; only pages never seen are put
//! into new packs (chunks of up to 1 MiB), and the recipe names slices of packs.
//!
//! Invariants: a segment only names a pack that was emitted by this packer or that the index knew. The index is a cache: forgetting costs dedup,
//! never correctness. It is told of new pages only when [`PagePacker::finish`] succeeds; packs that turn out to be missing
//! in the store are taken out by [`PageIndex::forget_packs`], and the image is then cut anew.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasherDefault, Hasher};

use tidepool_proto::recipe::{MAX_SEGMENTS, Recipe, Segment};
use tidepool_proto::{ChunkName, DomainKey, MAX_CHUNK_LEN};

use crate::cut::{CutError, Emit, is_zero};

/// The size of a page, in bytes.
pub const PAGE: usize = 4096;
/// The most pages in one pack.
pub const PACK_PAGES: usize = MAX_CHUNK_LEN / PAGE;

/// Names are keyed hashes already: their first bytes are the hash.
#[derive(Default, Clone, Copy, Debug)]
struct NameHasher(u64);

impl Hasher for NameHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for part in bytes.chunks_exact(8).take(1) {
            let mut first = [0; 8];
            first.copy_from_slice(part);
            self.0 ^= u64::from_le_bytes(first);
        }
    }

    fn write_usize(&mut self, _: usize) {}
}

type NameMap<V> = HashMap<[u8; 32], V, BuildHasherDefault<NameHasher>>;

#[derive(Debug, Clone, Copy)]
struct Place {
    pack: u64,
    offset: u32,
}

/// Which pages are in which packs, for all images of one domain on one host. Bounded: when full, what was not used for longest goes.
#[derive(Debug)]
pub struct PageIndex {
    /// Two generations: a page that is found moves to `young`; when that is full it becomes `old`, and the former `old` is dropped.
    young: NameMap<Place>,
    old: NameMap<Place>,
    packs: BTreeMap<u64, ChunkName>,
    next_pack: u64,
    half: usize,
}

impl Default for PageIndex {
    /// Up to a million pages (4 GiB of distinct memory), about 100 MB.
    fn default() -> Self {
        Self::new(1 << 20)
    }
}

impl PageIndex {
    /// An index of at most `max_pages` pages.
    pub fn new(max_pages: usize) -> Self {
        Self {
            young: NameMap::default(),
            old: NameMap::default(),
            packs: BTreeMap::new(),
            next_pack: 0,
            half: (max_pages / 2).max(1),
        }
    }

    /// How many pages it knows.
    pub fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }

    /// Whether it knows none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes out packs the store does not have; their pages are packed anew when they come next. Returns how many packs it knew of.
    pub fn forget_packs(&mut self, missing: &[ChunkName]) -> usize {
        let missing: BTreeSet<&ChunkName> = missing.iter().collect();
        let before = self.packs.len();
        self.packs.retain(|_, name| !missing.contains(name));
        let packs = &self.packs;
        if packs.len() != before {
            self.young.retain(|_, at| packs.contains_key(&at.pack));
            self.old.retain(|_, at| packs.contains_key(&at.pack));
        }
        before - self.packs.len()
    }

    fn find(&mut self, page: &[u8; 32]) -> Option<(ChunkName, u32)> {
        let at = match self.young.get(page) {
            Some(at) => *at,
            None => {
                let at = self.old.remove(page)?;
                self.insert(*page, at);
                at
            }
        };
        let pack = self.packs.get(&at.pack)?;
        Some((*pack, at.offset))
    }

    fn insert(&mut self, page: [u8; 32], at: Place) {
        if self.young.len() >= self.half && !self.young.contains_key(&page) {
            self.old = std::mem::take(&mut self.young);
            let mut used: BTreeSet<u64> = self.old.values().map(|p| p.pack).collect();
            used.insert(at.pack);
            self.packs.retain(|id, _| used.contains(id));
        }
        self.young.insert(page, at);
    }
}

/// A segment whose pack may not be named yet.
#[derive(Debug, Clone, Copy)]
enum Piece {
    Known(Segment),
    /// A slice of the `pack`-th pack this packer makes.
    New {
        pack: usize,
        offset: u32,
        len: u32,
    },
}

/// Packs the images of one dump. Feed one image after another; recipes come at the end, when every pack has its name.
pub struct PagePacker<'a> {
    key: &'a DomainKey,
    index: &'a mut PageIndex,
    images: Vec<Vec<Piece>>,
    partial: Vec<u8>,
    open: Vec<u8>,
    packs: Vec<ChunkName>,
    /// Pages put into packs by this packer.
    fresh: NameMap<(usize, u32)>,
    stats: PackStats,
}

/// What was packed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PackStats {
    /// Bytes fed.
    pub bytes: u64,
    /// Bytes put into new packs.
    pub new_bytes: u64,
    /// Packs made.
    pub packs: u64,
    /// Bytes of zero pages.
    pub zero_bytes: u64,
}

impl<'a> PagePacker<'a> {
    /// A packer that looks pages up in `index` and names with `key`.
    pub fn new(key: &'a DomainKey, index: &'a mut PageIndex) -> Self {
        Self {
            key,
            index,
            images: Vec::new(),
            partial: Vec::new(),
            open: Vec::new(),
            packs: Vec::new(),
            fresh: NameMap::default(),
            stats: PackStats::default(),
        }
    }

    /// Begins the next image; its recipe will be at the returned position of what [`Self::finish`] gives.
    pub fn begin<E>(&mut self, emit: &mut Emit<'_, E>) -> Result<usize, CutError<E>> {
        self.end_image(emit)?;
        self.images.push(Vec::new());
        Ok(self.images.len() - 1)
    }

    /// Feeds the next bytes of the image begun last.
    pub fn push<E>(&mut self, mut data: &[u8], emit: &mut Emit<'_, E>) -> Result<(), CutError<E>> {
        if self.images.is_empty() {
            self.images.push(Vec::new());
        }
        self.stats.bytes += data.len() as u64;
        if !self.partial.is_empty() {
            let take = data.len().min(PAGE - self.partial.len());
            self.partial.extend_from_slice(&data[..take]);
            data = &data[take..];
            if self.partial.len() < PAGE {
                return Ok(());
            }
            let page = std::mem::take(&mut self.partial);
            self.page(&page, emit)?;
            self.partial = page;
            self.partial.clear();
        }
        let pages = data.chunks_exact(PAGE);
        self.partial.extend_from_slice(pages.remainder());
        for page in pages {
            self.page(page, emit)?;
        }
        Ok(())
    }

    /// Feeds `len` zeros that were not read, because the file system keeps a hole there.
    pub fn hole<E>(&mut self, mut len: u64, emit: &mut Emit<'_, E>) -> Result<(), CutError<E>> {
        while len > 0 {
            if self.partial.is_empty() && len >= PAGE as u64 && !self.images.is_empty() {
                let whole = len - len % PAGE as u64;
                self.stats.bytes += whole;
                self.stats.zero_bytes += whole;
                self.piece(Piece::Known(Segment::Hole { len: whole }))?;
                len -= whole;
            } else {
                let n = len.min((PAGE - self.partial.len()) as u64) as usize;
                self.push(&[0; PAGE][..n], emit)?;
                len -= n as u64;
            }
        }
        Ok(())
    }

    /// Ends the dump: the last pack is emitted, the index learns the new pages. One recipe for each image begun.
    pub fn finish<E>(
        mut self,
        emit: &mut Emit<'_, E>,
    ) -> Result<(Vec<Recipe>, PackStats), CutError<E>> {
        self.end_image(emit)?;
        self.seal(emit)?;
        let recipes = self
            .images
            .iter()
            .map(|pieces| {
                let mut recipe = Recipe::default();
                for piece in pieces {
                    recipe.push(match *piece {
                        Piece::Known(segment) => segment,
                        Piece::New { pack, offset, len } => Segment::Data {
                            chunk: self.packs[pack],
                            offset,
                            len,
                        },
                    });
                }
                recipe
            })
            .collect();
        let first = self.index.next_pack;
        self.index.next_pack += self.packs.len() as u64;
        // In the order of packs, so that what is dropped first does not depend on the map's order.
        let mut fresh: Vec<_> = self.fresh.into_iter().collect();
        fresh.sort_unstable_by_key(|(_, at)| *at);
        for (page, (nth, offset)) in fresh {
            let pack = first + nth as u64;
            // With its first page, not before: making room drops packs that no page names.
            self.index.packs.insert(pack, self.packs[nth]);
            self.index.insert(page, Place { pack, offset });
        }
        Ok((recipes, self.stats))
    }

    fn end_image<E>(&mut self, emit: &mut Emit<'_, E>) -> Result<(), CutError<E>> {
        let last = std::mem::take(&mut self.partial);
        match last.is_empty() {
            true => Ok(()),
            false => self.page(&last, emit),
        }
    }

    fn page<E>(&mut self, page: &[u8], emit: &mut Emit<'_, E>) -> Result<(), CutError<E>> {
        let len = page.len() as u32;
        if is_zero(page) {
            self.stats.zero_bytes += u64::from(len);
            return self.piece(Piece::Known(Segment::Hole {
                len: u64::from(len),
            }));
        }
        let name = self.key.name(page).0;
        if let Some(&(pack, offset)) = self.fresh.get(&name) {
            return self.piece(Piece::New { pack, offset, len });
        }
        if let Some((chunk, offset)) = self.index.find(&name) {
            return self.piece(Piece::Known(Segment::Data { chunk, offset, len }));
        }
        if self.open.len() + page.len() > PACK_PAGES * PAGE {
            self.seal(emit)?;
        }
        let (pack, offset) = (self.packs.len(), self.open.len() as u32);
        self.open.extend_from_slice(page);
        self.fresh.insert(name, (pack, offset));
        self.stats.new_bytes += u64::from(len);
        self.piece(Piece::New { pack, offset, len })
    }

    fn piece<E>(&mut self, next: Piece) -> Result<(), CutError<E>> {
        let Some(pieces) = self.images.last_mut() else {
            return Ok(());
        };
        match (pieces.last_mut(), next) {
            (
                Some(Piece::New { pack, offset, len }),
                Piece::New {
                    pack: p,
                    offset: o,
                    len: l,
                },
            ) if *pack == p && *offset + *len == o => *len += l,
            (Some(Piece::Known(Segment::Hole { len })), Piece::Known(Segment::Hole { len: l })) => {
                *len += l;
            }
            (
                Some(Piece::Known(Segment::Data { chunk, offset, len })),
                Piece::Known(Segment::Data {
                    chunk: c,
                    offset: o,
                    len: l,
                }),
            ) if *chunk == c && *offset + *len == o => *len += l,
            _ => pieces.push(next),
        }
        match pieces.len() {
            n if n > MAX_SEGMENTS => Err(CutError::TooManySegments(n)),
            _ => Ok(()),
        }
    }

    fn seal<E>(&mut self, emit: &mut Emit<'_, E>) -> Result<(), CutError<E>> {
        if self.open.is_empty() {
            return Ok(());
        }
        let name = self.key.name(&self.open);
        emit(name, &self.open, &[]).map_err(CutError::Sink)?;
        self.packs.push(name);
        self.open.clear();
        self.stats.packs += 1;
        Ok(())
    }
}
