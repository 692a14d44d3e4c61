//! The catalog as one file: versioned, checksummed, used as it lies on the disk.
//!
//! ```text
//! header | section table | checksum of both | sections, each at a multiple of 64 bytes
//! ```
//! Numbers are little-endian. A checksum (XXH3, 64 bits) covers every byte of the file, padding
//! included, so a flipped bit is always found. A forged file is found too: its structure is checked
//! before anything is looked up in it.

use std::fs::File;
use std::io::{BufWriter, ErrorKind, Read, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::lock::CatalogLock;
use super::replace::replace;
use crate::catalog::base_segment::BaseSegment;
use crate::catalog::bitmap::RankBitmap;
use crate::catalog::column::Column;
use crate::catalog::order::Ties;
use crate::catalog::sid::MAX_LEVELS;
use crate::catalog::tags::Tags;
use crate::catalog::texts::{NameIndex, Texts};
use crate::catalog::trie::Trie;
use crate::catalog::watermark::Watermarks;
use crate::error::{Error, Result};
use crate::mapping::Mapping;

#[cfg(target_endian = "big")]
compile_error!("catalog files are little-endian and mapped as they are");

const MAGIC: [u8; 8] = *b"SIDEREAL";
const VERSION: u32 = 3;
/// The oldest version that is read. Version 2 has no weights, and its items that share a semantic
/// ID are in the order in which they were added.
const OLDEST_VERSION: u32 = 2;
const ALIGN: usize = 64;
/// Leaves room for the snapshots that follow any file.
const MAX_SNAPSHOT: u64 = 1 << 62;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: u32,
    num_levels: u32,
    file_bytes: u64,
    num_items: u64,
    /// Identifies the catalog through all its changes.
    lineage: u64,
    /// The number of the compiled snapshot.
    snapshot: u64,
    /// As in [`Trie`]; zeros after the last level.
    depth_start: [u32; MAX_LEVELS + 2],
    num_sections: u32,
    reserved: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Section {
    kind: u64,
    offset: u64,
    /// Without the padding, which the checksum covers too.
    bytes: u64,
    checksum: u64,
}

/// The sections in the order of the file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    FirstEdge,
    Code,
    FirstItem,
    /// Absent where no two items share a semantic ID.
    LeafItem,
    NameBytes,
    NameStart,
    NameIndex,
    /// Absent without titles, like `TitleStart`.
    TitleBytes,
    TitleStart,
    /// Absent without tags, like the other sections of tags.
    TagBytes,
    TagStart,
    TagSets,
    TagSetStart,
    /// Absent where every item is available.
    Available,
    /// Absent where no item has a weight of its own.
    Weights,
    /// Absent without watermarks. Not of items, so numbered apart from them.
    Watermarks = 64,
}

/// The sections of a catalog with their bytes.
fn contents(base: &BaseSegment) -> Vec<(Kind, &[u8])> {
    let trie = &base.trie;
    let mut contents: Vec<(Kind, &[u8])> = vec![
        (Kind::FirstEdge, bytemuck::cast_slice(&trie.first_edge)),
        (Kind::Code, bytemuck::cast_slice(&trie.code)),
        (Kind::FirstItem, bytemuck::cast_slice(&trie.first_item)),
    ];
    if let Some(leaf_item) = &trie.leaf_item {
        contents.push((Kind::LeafItem, bytemuck::cast_slice(leaf_item)));
    }
    contents.extend([
        (Kind::NameBytes, &*base.names.bytes),
        (Kind::NameStart, bytemuck::cast_slice(&base.names.start)),
        (Kind::NameIndex, bytemuck::cast_slice(&base.index.buckets)),
    ]);
    if let Some(titles) = &base.titles {
        contents.push((Kind::TitleBytes, &titles.bytes));
        contents.push((Kind::TitleStart, bytemuck::cast_slice(&titles.start)));
    }
    if let Some(tags) = &base.tags {
        contents.push((Kind::TagBytes, &tags.names.bytes));
        contents.push((Kind::TagStart, bytemuck::cast_slice(&tags.names.start)));
        contents.push((Kind::TagSets, &tags.sets));
        contents.push((Kind::TagSetStart, bytemuck::cast_slice(&tags.start)));
    }
    if let Some(available) = &base.available {
        contents.push((Kind::Available, bytemuck::cast_slice(available.words())));
    }
    if let Some(weights) = &base.weights {
        contents.push((Kind::Weights, bytemuck::cast_slice(weights)));
    }
    contents
}

/// A hash of all arrays: equal catalogs have the same, others almost surely another.
pub(crate) fn fingerprint(base: &BaseSegment) -> u64 {
    let mut hasher = Xxh3::new();
    for (kind, bytes) in contents(base) {
        hasher.update(&[kind as u8]);
        hasher.update(bytes);
    }
    hasher.digest()
}

/// Writes a compiled catalog with its watermarks as one file; an existing file is replaced as a whole
/// or not at all.
/// `path` is a resolved name, and `lock` its lock.
///
/// # Errors
/// The operating system's.
pub(crate) fn save(
    base: &BaseSegment,
    watermarks: &Watermarks,
    path: &Path,
    lock: &CatalogLock,
) -> Result<()> {
    let trie = &base.trie;
    let watermarks = watermarks.to_bytes();
    let mut contents = contents(base);
    if !watermarks.is_empty() {
        contents.push((Kind::Watermarks, &watermarks));
    }
    let mut offset = sections_start(contents.len());
    let mut table = Vec::new();
    for (kind, bytes) in &contents {
        let checksum = checksum_padded(bytes);
        let (kind, bytes) = (*kind as u64, bytes.len());
        table.push(Section { kind, offset: offset as u64, bytes: bytes as u64, checksum });
        offset += bytes.next_multiple_of(ALIGN);
    }
    let mut depth_start = [0; MAX_LEVELS + 2];
    depth_start[..trie.depth_start.len()].copy_from_slice(&trie.depth_start);
    let header = Header {
        magic: MAGIC,
        version: VERSION,
        num_levels: trie.num_levels() as u32,
        file_bytes: offset as u64,
        num_items: base.num_items().into(),
        lineage: base.lineage,
        snapshot: base.snapshot,
        depth_start,
        num_sections: contents.len() as u32,
        reserved: 0,
    };
    let mut head = bytemuck::bytes_of(&header).to_vec();
    head.extend_from_slice(bytemuck::cast_slice(&table));
    head.resize(sections_start(contents.len()) - size_of::<u64>(), 0);
    head.extend_from_slice(&xxh3_64(&head).to_le_bytes());

    let write = |file: &File| -> std::io::Result<()> {
        let mut file = BufWriter::new(file);
        file.write_all(&head)?;
        for (_, bytes) in &contents {
            file.write_all(bytes)?;
            file.write_all(&[0; ALIGN][..padding(bytes.len())])?;
        }
        file.flush()
    };
    match replace(path, lock.folder(), path, write) {
        Ok(_) => Ok(()),
        Err(failed) => Err(Error::io(path, failed.error)),
    }
}

/// The number of the snapshot in a compiled file, from its header alone; `None` where there is no
/// file, or none of a catalog.
///
/// # Errors
/// The operating system's.
pub(super) fn read_snapshot_number(path: &Path) -> Result<Option<u64>> {
    let mut header = [0; size_of::<Header>()];
    match File::open(path).and_then(|mut file| file.read_exact(&mut header)) {
        Ok(()) => {}
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::UnexpectedEof) => {
            return Ok(None);
        }
        Err(error) => return Err(Error::io(path, error)),
    }
    let header: Header = bytemuck::pod_read_unaligned(&header);
    Ok((header.magic == MAGIC).then_some(header.snapshot))
}

/// Opens a compiled catalog, mapped where it has more than `map_above` bytes, and checks all of it.
///
/// # Errors
/// The operating system's; [`Error::FileChanged`]; [`Error::CatalogFile`] where the file is foreign, damaged or of another
/// version.
pub(crate) fn open(path: &Path, map_above: u64) -> Result<BaseSegment> {
    let mapping = Arc::new(Mapping::open(path, map_above)?);
    parse(&mapping).map_err(|reason| Error::CatalogFile { path: path.to_path_buf(), reason })
}

/// What a damaged file loses where one of its sections cannot be believed.
const DISPENSABLE: [(&[Kind], &str); 6] = [
    (&[Kind::NameIndex], ""), // made again from the names
    (&[Kind::TitleBytes, Kind::TitleStart], "all titles"),
    (&[Kind::TagBytes, Kind::TagStart, Kind::TagSets, Kind::TagSetStart], "all tags"),
    (&[Kind::Available], "which items are unavailable: all are available now"),
    (&[Kind::Weights], "the weights of all items"),
    (&[Kind::Watermarks], "the watermarks of its feeds"),
];

/// Opens what can be believed of a damaged catalog, and says what is lost.
///
/// # Errors
/// The operating system's; [`Error::CatalogFile`] where the trie or the names are damaged.
pub(super) fn salvage(path: &Path) -> Result<(BaseSegment, Vec<&'static str>)> {
    let mapping = Arc::new(Mapping::open(path, u64::MAX)?);
    let head = parse_head(mapping.bytes(), Length::Any);
    let salvaged = head.and_then(|(header, mut table, mut damaged)| {
        let mut lost = Vec::new();
        for (kinds, what) in DISPENSABLE {
            let is_one = |kind: &u64| kinds.iter().any(|&one| one as u64 == *kind);
            if damaged.iter().any(is_one) {
                damaged.retain(|kind| !is_one(kind));
                table.retain(|section| !is_one(&section.kind));
                lost.push(what);
            }
        }
        match damaged.is_empty() {
            true => Ok((parse_sections(&mapping, &header, &table)?, lost)),
            false => Err("the trie or the names are damaged or cut off".to_string()),
        }
    });
    let failed = |reason| Error::CatalogFile { path: path.to_path_buf(), reason };
    let (base, mut lost) = salvaged.map_err(failed)?;
    lost.retain(|what| !what.is_empty());
    Ok((base, lost))
}

/// The header, the section table, and the kinds of those sections whose checksum is wrong or that
/// the file does not have to their end.
type Head = (Header, Vec<Section>, Vec<u64>);

/// How long a file must be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Length {
    /// As its header says.
    Whole,
    /// Of any length: sections that are cut off count as damaged.
    Any,
}

fn parse_head(bytes: &[u8], length: Length) -> std::result::Result<Head, String> {
    if !bytes.starts_with(&MAGIC) {
        return Err("this is not a compiled Sidereal catalog".into());
    }
    let cut = || "the file is cut short".to_string();
    let header = bytes.get(..size_of::<Header>()).ok_or_else(cut)?;
    let header: Header = bytemuck::pod_read_unaligned(header);
    if !(OLDEST_VERSION..=VERSION).contains(&header.version) {
        let found = header.version;
        let reads = format!("{OLDEST_VERSION} to {VERSION}");
        return Err(format!("the file is of format {found}, this version reads {reads}"));
    }
    if length == Length::Whole && header.file_bytes != bytes.len() as u64 {
        let (found, expected) = (bytes.len(), header.file_bytes);
        return Err(format!("the file has {found} bytes and should have {expected}"));
    }
    let damaged = || "the file is damaged (checksum)".to_string();
    if header.num_sections > 64 {
        return Err(damaged());
    }
    let num_sections = header.num_sections as usize;
    let head = bytes.get(..sections_start(num_sections)).ok_or_else(cut)?;
    let (head, checksum) = head.split_at(head.len() - size_of::<u64>());
    if checksum != xxh3_64(head).to_le_bytes() {
        return Err(damaged());
    }
    let table = &head[size_of::<Header>()..][..num_sections * size_of::<Section>()];
    let section = |bytes| bytemuck::pod_read_unaligned(bytes);
    let table: Vec<Section> = table.chunks(size_of::<Section>()).map(section).collect();
    let mut end = sections_start(num_sections) as u64;
    let mut wrong = Vec::new();
    for section in &table {
        let extent = section.bytes.checked_next_multiple_of(ALIGN as u64);
        let next = extent.and_then(|extent| end.checked_add(extent));
        let next = next.filter(|&next| section.offset == end && next <= header.file_bytes);
        let next = next.ok_or("the sections do not follow one another")?;
        let section_bytes = bytes.get(end as usize..next as usize);
        if section_bytes.is_none_or(|bytes| xxh3_64(bytes) != section.checksum) {
            wrong.push(section.kind);
        }
        end = next;
    }
    if end != header.file_bytes {
        return Err("the sections do not fill the file".into());
    }
    Ok((header, table, wrong))
}

fn parse(mapping: &Arc<Mapping>) -> std::result::Result<BaseSegment, String> {
    let (header, table, wrong) = parse_head(mapping.bytes(), Length::Whole)?;
    match wrong.is_empty() {
        true => parse_sections(mapping, &header, &table),
        false => Err("the file is damaged (checksum)".into()),
    }
}

fn parse_sections(
    mapping: &Arc<Mapping>,
    header: &Header,
    table: &[Section],
) -> std::result::Result<BaseSegment, String> {
    let num_levels = header.num_levels as usize;
    if num_levels == 0 || num_levels > MAX_LEVELS {
        return Err(format!("the catalog has {num_levels} levels, 1 to {MAX_LEVELS} are possible"));
    }
    let depth_start = header.depth_start[..num_levels + 2].to_vec();
    if depth_start[..2] != [0, 1] || !depth_start.is_sorted() {
        return Err("the trie's node counts are out of order".into());
    }
    let sections = Sections { mapping, table };
    let trie = Trie {
        depth_start,
        first_edge: sections.column(Kind::FirstEdge)?,
        code: sections.column(Kind::Code)?,
        first_item: sections.column(Kind::FirstItem)?,
        leaf_item: sections.optional(Kind::LeafItem, |s| s.column(Kind::LeafItem))?,
    };
    if let Some(defect) = trie.defect() {
        return Err(defect.into());
    }
    let num_items = trie.num_items();
    if header.num_items != num_items as u64 {
        return Err("the number of items does not fit the trie".into());
    }
    if header.snapshot > MAX_SNAPSHOT {
        return Err("the number of its snapshot is not one that counting reaches".into());
    }
    let names = sections.texts(Kind::NameBytes, Kind::NameStart)?;
    let has_index = table.iter().any(|section| section.kind == Kind::NameIndex as u64);
    let index = match has_index {
        true => NameIndex { buckets: sections.column(Kind::NameIndex)? },
        false => names_index(&names, num_items)?,
    };
    let titles =
        sections.optional(Kind::TitleStart, |s| s.texts(Kind::TitleBytes, Kind::TitleStart))?;
    let tags = sections.optional(Kind::TagSets, |s| {
        let names = s.texts(Kind::TagBytes, Kind::TagStart)?;
        Ok(Tags::new(names, s.column(Kind::TagSets)?, s.column(Kind::TagSetStart)?))
    })?;
    let defect = (names.defect(num_items))
        .or_else(|| index.defect(num_items))
        .or_else(|| titles.as_ref()?.defect(num_items))
        .or_else(|| tags.as_ref()?.defect());
    if let Some(defect) = defect {
        return Err(defect.into());
    }
    let watermarks = sections.optional(Kind::Watermarks, |s| {
        Watermarks::from_bytes(&s.column::<u8>(Kind::Watermarks)?)
    })?;
    Ok(BaseSegment {
        tags,
        available: sections.available(num_items)?,
        watermarks: Arc::new(watermarks.unwrap_or_default()),
        weights: sections.weights(num_items)?,
        ties: if header.version < 3 { Ties::ByAge } else { Ties::ByName },
        lineage: header.lineage,
        snapshot: header.snapshot,
        file: Some(Arc::clone(mapping)),
        ..BaseSegment::new(trie, names, index, titles)
    })
}

/// The index of a file whose own is damaged.
fn names_index(names: &Texts, num_items: usize) -> std::result::Result<NameIndex, String> {
    match names.defect(num_items) {
        Some(defect) => Err(defect.into()),
        None => NameIndex::build(names).map_err(|_| "a name stands in it twice".to_string()),
    }
}

struct Sections<'a> {
    mapping: &'a Arc<Mapping>,
    table: &'a [Section],
}

impl Sections<'_> {
    fn available(&self, num_items: usize) -> std::result::Result<Option<Arc<RankBitmap>>, String> {
        let words: Option<Column<u64>> =
            self.optional(Kind::Available, |s| s.column(Kind::Available))?;
        let Some(words) = words else { return Ok(None) };
        let has_room = words.len() == num_items.div_ceil(64);
        let beyond = words.last().map_or(0, |last| last >> ((num_items - 1) % 64) >> 1);
        match has_room && beyond == 0 {
            true => Ok(Some(Arc::new(RankBitmap::new(words.to_vec(), num_items as u32)))),
            false => Err("the set of available items does not fit the items".into()),
        }
    }

    fn weights(&self, num_items: usize) -> std::result::Result<Option<Column<f32>>, String> {
        let weights: Option<Column<f32>> =
            self.optional(Kind::Weights, |s| s.column(Kind::Weights))?;
        let are_sound = |weights: &Column<f32>| {
            weights.len() == num_items && weights.iter().all(|weight| weight.is_finite())
        };
        match weights.as_ref().is_none_or(are_sound) {
            true => Ok(weights),
            false => Err("the weights do not fit the items, or one is not finite".into()),
        }
    }

    fn column<T: Pod>(&self, kind: Kind) -> std::result::Result<Column<T>, String> {
        let section = self.table.iter().find(|section| section.kind == kind as u64);
        let range = |section: &Section| -> Range<usize> {
            section.offset as usize..(section.offset + section.bytes) as usize
        };
        let column = section.and_then(|section| Column::mapped(self.mapping, range(section)));
        column.ok_or_else(|| format!("section {} is missing or ragged", kind as u64))
    }

    /// The result of `read`, or `None` where the section `kind` is absent.
    fn optional<T>(
        &self,
        kind: Kind,
        read: impl FnOnce(&Self) -> std::result::Result<T, String>,
    ) -> std::result::Result<Option<T>, String> {
        let has = self.table.iter().any(|section| section.kind == kind as u64);
        has.then(|| read(self)).transpose()
    }

    fn texts(&self, bytes: Kind, start: Kind) -> std::result::Result<Texts, String> {
        Ok(Texts { bytes: self.column(bytes)?, start: self.column(start)? })
    }
}

fn sections_start(num_sections: usize) -> usize {
    let table = size_of::<Header>() + num_sections * size_of::<Section>();
    (table + size_of::<u64>()).next_multiple_of(ALIGN)
}

fn padding(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGN) - bytes
}

fn checksum_padded(bytes: &[u8]) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(bytes);
    hasher.update(&[0; ALIGN][..padding(bytes.len())]);
    hasher.digest()
}
