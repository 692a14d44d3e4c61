//! The bytes of a log of changes.
//!
//! ```text
//! header: magic 8 | version 4 | bytes of the watermarks 4 | lineage 8 | snapshot before the first
//!         record 8 | id 8 | watermarks | checksum 8
//! record: bytes of the payload 4 | zero 4 | snapshot 8 | checksum 8 | payload | checksum 8 | "END\n"
//! ```
//! Numbers are little-endian, checksums are XXH3 (64 bits): of the header; of the first 16 bytes of
//! a record; of a whole record up to there. The payload is a batch of changes in postcard's format,
//! with its watermark where it has one. One record is one batch and makes one snapshot. The header's
//! watermarks are those of the snapshot before the first record, and its id is another for each new
//! file, so that what is known about one file is not believed of another.
//!
//! A record is appended by one write. Where the process dies in it, the file ends early; where the
//! machine dies, the file may also have been lengthened by zeros. Such a tail is *unfinished*: it
//! was never acknowledged, and the log reads as if it had not begun. The checksum of the record's
//! head says how long the record should be, and the mark at its end is not zero, so a flipped bit
//! never looks unfinished: everything else is *damage*.
//!
//! Version 1 (no id, no watermarks; one checksum for head and payload) is still read.

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::logged::{from_payload, to_payload};
use crate::catalog::{Change, Watermark, Watermarks};
use crate::error::{Error, Result};

const MAGIC: [u8; 8] = *b"SIDCHNGE";
pub(super) const VERSION: u32 = 2;
/// The header without its watermarks and its checksum.
const HEADER_BYTES: usize = 40;
const CHECKSUM_BYTES: usize = 8;
/// What the checksum of a record's head covers.
const HEAD_BYTES: usize = 16;
const RECORD_HEADER_BYTES: usize = HEAD_BYTES + CHECKSUM_BYTES;
const END: [u8; 4] = *b"END\n";
const RECORD_END_BYTES: usize = CHECKSUM_BYTES + END.len();
/// The most bytes of one batch.
const MAX_PAYLOAD_BYTES: usize = 1 << 30;
const HEADER_BYTES_V1: usize = 40;
const RECORD_HEADER_BYTES_V1: usize = 20;

/// A batch of changes with the number of the snapshot that it made.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// The snapshot after the batch.
    pub snapshot: u64,
    /// The changes, in the order in which they were applied.
    pub changes: Vec<Change>,
    /// Where the batch ends in its feed.
    pub watermark: Option<Watermark>,
}

/// The contents of a log.
#[derive(Debug, Default, PartialEq)]
pub struct Contents {
    /// The format's version.
    pub version: u32,
    /// The catalog that the log belongs to.
    pub lineage: u64,
    /// The snapshot that the first batch was applied to; an older catalog lacks changes.
    pub after: u64,
    /// The file's own number; zero in version 1.
    pub id: u64,
    /// The watermarks before the first batch.
    pub watermarks: Watermarks,
    /// The batches, oldest first.
    pub batches: Vec<Batch>,
    /// Where each batch begins in the file.
    pub starts: Vec<u64>,
    /// Bytes up to the end of the last whole record. The rest is an unfinished record.
    pub whole_bytes: u64,
    /// What follows the last whole record, if anything does.
    pub defect: Option<Defect>,
}

impl Contents {
    /// The snapshot after the last batch.
    pub fn end(&self) -> u64 {
        self.batches.last().map_or(self.after, |batch| batch.snapshot)
    }
}

/// The first bytes of a log that are not a whole record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Defect {
    /// Where the record begins.
    pub at: u64,
    /// Whether the record was being written when its process or machine died, by its shape.
    pub is_unfinished: bool,
    /// What is wrong with the record.
    pub what: String,
}

/// Reads the bytes of a log.
///
/// # Errors
/// The defect, with the first byte that it affects. An unfinished record is none.
pub fn parse(bytes: &[u8]) -> std::result::Result<Contents, String> {
    let contents = read(bytes)?;
    match &contents.defect {
        Some(defect) if !defect.is_unfinished => {
            Err(format!("{} at byte {} of {}", defect.what, defect.at, bytes.len()))
        }
        _ => Ok(contents),
    }
}

/// Reads the bytes of a log up to the first defect.
///
/// # Errors
/// What is wrong with the header.
pub(super) fn read(bytes: &[u8]) -> std::result::Result<Contents, String> {
    let (mut contents, start) = read_header(bytes)?;
    let mut at = start;
    while at < bytes.len() {
        match read_record(contents.version, &bytes[at..], Some(contents.end())) {
            Ok((batch, record_bytes)) => {
                contents.batches.push(batch);
                contents.starts.push(at as u64);
                at += record_bytes;
            }
            Err((is_unfinished, what)) => {
                contents.defect = Some(Defect { at: at as u64, is_unfinished, what });
                break;
            }
        }
    }
    contents.whole_bytes = at as u64;
    Ok(contents)
}

/// The header, and where the first record begins.
fn read_header(bytes: &[u8]) -> std::result::Result<(Contents, usize), String> {
    let header = bytes.get(..HEADER_BYTES).ok_or("the file is shorter than its header")?;
    if !header.starts_with(&MAGIC) {
        return Err("this is not a log of changes".into());
    }
    let version = u32::from_le_bytes(field(header, 8));
    let watermark_bytes = match version {
        1 => 0,
        VERSION => u32::from_le_bytes(field(header, 12)) as usize,
        _ => return Err(format!("the log is of format {version}, this version reads {VERSION}")),
    };
    let end = match version {
        1 => HEADER_BYTES_V1 - CHECKSUM_BYTES,
        _ => HEADER_BYTES + watermark_bytes,
    };
    let damaged = "the header is damaged (checksum)";
    let checksum = bytes.get(end..end + CHECKSUM_BYTES).ok_or(damaged)?;
    if checksum != xxh3_64(&bytes[..end]).to_le_bytes() {
        return Err(damaged.into());
    }
    let (id, watermarks) = match version {
        1 => (0, Watermarks::default()),
        _ => {
            let watermarks = Watermarks::from_bytes(&bytes[HEADER_BYTES..end])?;
            (u64::from_le_bytes(field(header, 32)), watermarks)
        }
    };
    let contents = Contents {
        version,
        lineage: u64::from_le_bytes(field(header, 16)),
        after: u64::from_le_bytes(field(header, 24)),
        id,
        watermarks,
        ..Contents::default()
    };
    Ok((contents, end + CHECKSUM_BYTES))
}

/// The whole records behind a defect, wherever they begin. In a log of version 1 they cannot be told
/// from other bytes.
pub(super) fn records_behind(version: u32, bytes: &[u8], defect: &Defect) -> Vec<Batch> {
    let mut batches = Vec::new();
    let mut at = defect.at as usize + 1;
    while version == VERSION && at < bytes.len() {
        match read_record(version, &bytes[at..], None) {
            Ok((batch, record_bytes)) => {
                batches.push(batch);
                at += record_bytes;
            }
            Err(_) => at += 1,
        }
    }
    batches
}

/// The record at the beginning of `rest`, which follows snapshot `before`, with its length; or
/// whether the record is unfinished, and what is wrong with it.
fn read_record(
    version: u32,
    rest: &[u8],
    before: Option<u64>,
) -> std::result::Result<(Batch, usize), (bool, String)> {
    let damaged = |what: &str| (false, what.to_string());
    let (snapshot, payload, record_bytes) = match version {
        1 => read_frame_v1(rest)?,
        _ => read_frame(rest)?,
    };
    if before.is_some_and(|before| before.checked_add(1) != Some(snapshot)) {
        return Err(damaged("a record out of order"));
    }
    let (changes, watermark) = from_payload(payload)
        .map_err(|error| damaged(&format!("an unreadable record ({error})")))?;
    Ok((Batch { snapshot, changes, watermark }, record_bytes))
}

/// A record's snapshot, payload and length.
type Frame<'a> = (u64, &'a [u8], usize);

fn read_frame(rest: &[u8]) -> std::result::Result<Frame<'_>, (bool, String)> {
    // A machine that dies may have lengthened the file without having written its end.
    let written = || rest.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    let defect = |is_unfinished| match is_unfinished {
        true => (true, "an unfinished record".to_string()),
        false => (false, "a damaged record".to_string()),
    };
    let Some(header) = rest.get(..RECORD_HEADER_BYTES) else { return Err(defect(true)) };
    let (head, checksum) = header.split_at(HEAD_BYTES);
    if xxh3_64(head).to_le_bytes() != checksum {
        return Err(defect(written() < RECORD_HEADER_BYTES));
    }
    let payload_bytes = u32::from_le_bytes(field(head, 0)) as usize;
    let end = RECORD_HEADER_BYTES + payload_bytes;
    let record_bytes = end + RECORD_END_BYTES;
    let Some(tail) = rest.get(end..record_bytes) else { return Err(defect(true)) };
    let is_sound = xxh3_64(&rest[..end]).to_le_bytes() == tail[..CHECKSUM_BYTES]
        && tail[CHECKSUM_BYTES..] == END;
    if !is_sound {
        return Err(defect(written() < record_bytes));
    }
    let snapshot = u64::from_le_bytes(field(head, 8));
    Ok((snapshot, &rest[RECORD_HEADER_BYTES..end], record_bytes))
}

fn read_frame_v1(rest: &[u8]) -> std::result::Result<Frame<'_>, (bool, String)> {
    let unfinished = || (true, "an unfinished record".to_string());
    let Some(header) = rest.get(..RECORD_HEADER_BYTES_V1) else { return Err(unfinished()) };
    let end = RECORD_HEADER_BYTES_V1 + u32::from_le_bytes(field(header, 0)) as usize;
    let Some(payload) = rest.get(RECORD_HEADER_BYTES_V1..end) else { return Err(unfinished()) };
    let (head, checksum) = header.split_at(12);
    let mut hasher = Xxh3::new();
    hasher.update(head);
    hasher.update(payload);
    if hasher.digest().to_le_bytes() != checksum {
        let is_torn = rest[end..].iter().all(|&byte| byte == 0);
        let what = if is_torn { "an unfinished record" } else { "a damaged record" };
        return Err((is_torn, what.into()));
    }
    Ok((u64::from_le_bytes(field(head, 4)), payload, end))
}

fn field<const BYTES: usize>(bytes: &[u8], at: usize) -> [u8; BYTES] {
    bytes[at..at + BYTES].try_into().expect("inside the header")
}

/// The header of a new log.
pub(super) fn header(lineage: u64, after: u64, id: u64, watermarks: &Watermarks) -> Vec<u8> {
    let watermarks = watermarks.to_bytes();
    let mut header = MAGIC.to_vec();
    header.extend_from_slice(&VERSION.to_le_bytes());
    header.extend_from_slice(&(watermarks.len() as u32).to_le_bytes());
    header.extend_from_slice(&lineage.to_le_bytes());
    header.extend_from_slice(&after.to_le_bytes());
    header.extend_from_slice(&id.to_le_bytes());
    header.extend_from_slice(&watermarks);
    header.extend_from_slice(&xxh3_64(&header).to_le_bytes());
    header
}

/// The record of a batch.
///
/// # Errors
/// [`Error::LimitExceeded`] for a batch of more than a gigabyte.
pub(super) fn record(
    snapshot: u64,
    changes: &[Change],
    watermark: Option<&Watermark>,
) -> Result<Vec<u8>> {
    let mut record = to_payload(changes, watermark, vec![0; RECORD_HEADER_BYTES]);
    let payload_bytes = record.len() - RECORD_HEADER_BYTES;
    if payload_bytes > MAX_PAYLOAD_BYTES {
        return Err(Error::LimitExceeded {
            what: "bytes of changes in one batch",
            len: payload_bytes,
            max: MAX_PAYLOAD_BYTES,
        });
    }
    record[..4].copy_from_slice(&(payload_bytes as u32).to_le_bytes());
    record[8..HEAD_BYTES].copy_from_slice(&snapshot.to_le_bytes());
    let checksum = xxh3_64(&record[..HEAD_BYTES]).to_le_bytes();
    record[HEAD_BYTES..RECORD_HEADER_BYTES].copy_from_slice(&checksum);
    record.extend_from_slice(&xxh3_64(&record).to_le_bytes());
    record.extend_from_slice(&END);
    Ok(record)
}
