//! Changes on disk: a log beside the catalog's file, `<catalog>.changes`.
//!
//! ```text
//! header: magic | version | reserved | lineage | snapshot before the first record | checksum
//! record: bytes of the payload | snapshot | checksum | payload
//! ```
//! Numbers are little-endian. A checksum is XXH3 (64 bits) of everything before it and, in a
//! record, of the payload too. The payload is a batch of changes in postcard's format. One record
//! is one batch and makes one snapshot. A file that ends inside its last record was being written
//! when its process died; it reads as if that record had not begun. Any other damage is an error,
//! because the changes behind it were acknowledged.
//!
//! A compiled catalog knows its snapshot number, and a reader skips the records up to it. So a new
//! compiled file and a new log need not appear in one instant.

use std::fs::{OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::lock::LockedFile;
use super::logged::{from_payload, to_payload};
use super::replace::{partial_path, put_in_place};
use crate::catalog::{Change, Snapshot};
use crate::error::{Error, Result};

const MAGIC: [u8; 8] = *b"SIDCHNGE";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 40;
const RECORD_HEADER_BYTES: usize = 20;
/// The most bytes of one batch.
const MAX_PAYLOAD_BYTES: usize = 1 << 30;

/// The log's path beside a compiled catalog.
pub fn path_of(catalog: &Path) -> PathBuf {
    let mut path = catalog.as_os_str().to_owned();
    path.push(".changes");
    path.into()
}

/// A batch of changes with the number of the snapshot that it made.
#[derive(Debug, PartialEq, Eq)]
pub struct Batch {
    /// The snapshot after the batch.
    pub snapshot: u64,
    /// The changes, in the order in which they were applied.
    pub changes: Vec<Change>,
}

/// The contents of a log.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// The catalog that the log belongs to.
    pub lineage: u64,
    /// The snapshot that the first batch was applied to; an older catalog lacks changes.
    pub after: u64,
    /// The batches, oldest first.
    pub batches: Vec<Batch>,
    /// Bytes up to the end of the last whole record. The rest is an unfinished record.
    pub whole_bytes: u64,
}

/// Reads the bytes of a log.
///
/// # Errors
/// The defect, with the first byte that it affects.
pub fn parse(bytes: &[u8]) -> std::result::Result<Contents, String> {
    let header = bytes.get(..HEADER_BYTES).ok_or("the file is shorter than its header")?;
    if !header.starts_with(&MAGIC) {
        return Err("this is not a log of changes".into());
    }
    let version = u32::from_le_bytes(field(header, 8));
    if version != VERSION {
        return Err(format!("the log is of format {version}, this version reads {VERSION}"));
    }
    if header[32..] != xxh3_64(&header[..32]).to_le_bytes() {
        return Err("the header is damaged (checksum)".into());
    }
    let mut contents = Contents {
        lineage: u64::from_le_bytes(field(header, 16)),
        after: u64::from_le_bytes(field(header, 24)),
        batches: Vec::new(),
        whole_bytes: HEADER_BYTES as u64,
    };
    let mut at = HEADER_BYTES;
    while at < bytes.len() {
        let damaged = |what: &str| {
            format!(
                "{what} at byte {at} of {}; cut the file there to go on without the later changes",
                bytes.len()
            )
        };
        let rest = &bytes[at..];
        let Some(header) = rest.get(..RECORD_HEADER_BYTES) else { break };
        let payload_bytes = u32::from_le_bytes(field(header, 0)) as usize;
        let end = RECORD_HEADER_BYTES + payload_bytes;
        let Some(payload) = rest.get(RECORD_HEADER_BYTES..end) else { break };
        let (head, checksum) = header.split_at(12);
        if record_checksum(head, payload).to_le_bytes() != checksum {
            // A machine that dies may have lengthened the file without having written its end.
            if rest[end..].iter().all(|&byte| byte == 0) {
                break;
            }
            return Err(damaged("a damaged record"));
        }
        let snapshot = u64::from_le_bytes(field(header, 4));
        let before = contents.batches.last().map_or(contents.after, |batch| batch.snapshot);
        if before.checked_add(1) != Some(snapshot) {
            return Err(damaged("a record out of order"));
        }
        let changes = from_payload(payload)
            .map_err(|error| damaged(&format!("an unreadable record ({error})")))?;
        contents.batches.push(Batch { snapshot, changes });
        at += end;
        contents.whole_bytes = at as u64;
    }
    Ok(contents)
}

fn field<const BYTES: usize>(bytes: &[u8], at: usize) -> [u8; BYTES] {
    bytes[at..at + BYTES].try_into().expect("inside the header")
}

fn record_checksum(head: &[u8], payload: &[u8]) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(head);
    hasher.update(payload);
    hasher.digest()
}

fn header(lineage: u64, after: u64) -> Vec<u8> {
    let mut header = MAGIC.to_vec();
    header.extend_from_slice(&VERSION.to_le_bytes());
    header.extend_from_slice(&[0; 4]);
    header.extend_from_slice(&lineage.to_le_bytes());
    header.extend_from_slice(&after.to_le_bytes());
    header.extend_from_slice(&xxh3_64(&header).to_le_bytes());
    header
}

fn record(snapshot: u64, changes: &[Change]) -> Result<Vec<u8>> {
    let mut record = vec![0; RECORD_HEADER_BYTES];
    record = to_payload(changes, record);
    let payload_bytes = record.len() - RECORD_HEADER_BYTES;
    if payload_bytes > MAX_PAYLOAD_BYTES {
        return Err(Error::LimitExceeded {
            what: "bytes of changes in one batch",
            len: payload_bytes,
            max: MAX_PAYLOAD_BYTES,
        });
    }
    let (head, payload) = record.split_at_mut(RECORD_HEADER_BYTES);
    head[..4].copy_from_slice(&(payload_bytes as u32).to_le_bytes());
    head[4..12].copy_from_slice(&snapshot.to_le_bytes());
    let checksum = record_checksum(&head[..12], payload);
    head[12..].copy_from_slice(&checksum.to_le_bytes());
    Ok(record)
}

/// The batches of a log that `snapshot` lacks.
fn later_batches(log: &Path, contents: Contents, snapshot: &Snapshot) -> Result<Vec<Batch>> {
    let error = |reason: String| Error::ChangeLog { path: log.to_path_buf(), reason };
    if contents.lineage != snapshot.base().lineage {
        let reason = "the log belongs to another catalog than the one beside it; move it away, or \
                      put its own catalog back";
        return Err(error(reason.into()));
    }
    if contents.after > snapshot.number() {
        return Err(error(format!(
            "the catalog beside it is of snapshot {}, the log goes on after {}; put the newer \
             catalog back",
            snapshot.number(),
            contents.after
        )));
    }
    let mut batches = contents.batches;
    batches.retain(|batch| batch.snapshot > snapshot.number());
    Ok(batches)
}

fn apply(log: &Path, batches: Vec<Batch>, snapshot: &Snapshot) -> Result<Option<Snapshot>> {
    let Some(number) = batches.last().map(|batch| batch.snapshot) else { return Ok(None) };
    let changes: Vec<Change> = batches.into_iter().flat_map(|batch| batch.changes).collect();
    let snapshot = snapshot.with_numbered(&changes, number).map_err(|error| Error::ChangeLog {
        path: log.to_path_buf(),
        reason: format!("a change does not fit the catalog: {error}"),
    })?;
    Ok(Some(snapshot))
}

/// The snapshot after the changes logged beside a compiled catalog, if there are any.
///
/// # Errors
/// [`Error::ChangeLog`]; the operating system's.
pub(crate) fn replay(catalog: &Path, snapshot: &Snapshot) -> Result<Option<Snapshot>> {
    let log = path_of(catalog);
    let bytes = match std::fs::read(&log) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(&log, error)),
    };
    let contents =
        parse(&bytes).map_err(|reason| Error::ChangeLog { path: log.clone(), reason })?;
    apply(&log, later_batches(&log, contents, snapshot)?, snapshot)
}

/// The log of one catalog, open for writing by this process alone.
pub(crate) struct ChangeLog {
    path: PathBuf,
    file: LockedFile,
    lineage: u64,
    len: u64,
    /// The failure after which nothing can be written any more.
    broken: Option<String>,
}

impl ChangeLog {
    /// Opens the log beside a compiled catalog or begins one. A record that a process left
    /// unfinished is cut off. Returns the catalog's snapshot after the log, where the log has
    /// changes that `snapshot` lacks.
    ///
    /// # Errors
    /// [`Error::ChangeLog`]: damaged, another catalog's, or in use by another process.
    pub fn open(catalog: &Path, snapshot: &Snapshot) -> Result<(ChangeLog, Option<Snapshot>)> {
        let path = path_of(catalog);
        let lineage = snapshot.base().lineage;
        let io = |error| Error::io(&path, error);
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let file = create(&path, &header(lineage, snapshot.number())).map_err(io)?;
                return Ok((
                    ChangeLog { path, file, lineage, len: HEADER_BYTES as u64, broken: None },
                    None,
                ));
            }
            file => file.map_err(io)?,
        };
        let file = LockedFile::new(file).map_err(|error| match error {
            TryLockError::WouldBlock => Error::ChangeLog {
                path: path.clone(),
                reason: "another writer has the catalog open; there can be one at a time".into(),
            },
            TryLockError::Error(error) => io(error),
        })?;
        let mut bytes = Vec::new();
        (&*file).read_to_end(&mut bytes).map_err(io)?;
        let contents =
            parse(&bytes).map_err(|reason| Error::ChangeLog { path: path.clone(), reason })?;
        let len = contents.whole_bytes;
        let batches = later_batches(&path, contents, snapshot)?;
        let after = apply(&path, batches, snapshot)?;
        file.set_len(len).map_err(io)?;
        (&*file).seek(SeekFrom::Start(len)).map_err(io)?;
        Ok((ChangeLog { path, file, lineage, len, broken: None }, after))
    }

    /// Appends a batch. Once this returns, the batch survives the end of the process.
    ///
    /// # Errors
    /// The operating system's; the batch is then not in the log.
    pub fn append(&mut self, snapshot: u64, changes: &[Change]) -> Result<()> {
        self.check()?;
        let record = record(snapshot, changes)?;
        let mut file = &*self.file;
        if let Err(error) = file.write_all(&record) {
            // A half-written record must go, or the next one would follow it.
            let undone =
                file.set_len(self.len).is_ok() && file.seek(SeekFrom::Start(self.len)).is_ok();
            if !undone {
                self.broken = Some(format!("a write failed ({error}) and cannot be undone"));
            }
            return Err(Error::io(&self.path, error));
        }
        self.len += record.len() as u64;
        Ok(())
    }

    /// Returns when the disk has every appended batch.
    ///
    /// # Errors
    /// The operating system's. The log then takes no further batch, because the disk's state is
    /// unknown.
    pub fn sync(&mut self) -> Result<()> {
        self.check()?;
        self.file.sync_data().map_err(|error| {
            self.broken = Some(format!("the disk failed: {error}"));
            Error::io(&self.path, error)
        })
    }

    fn check(&self) -> Result<()> {
        match &self.broken {
            Some(reason) => Err(Error::ChangeLog {
                path: self.path.clone(),
                reason: format!("{reason}; open the catalog again"),
            }),
            None => Ok(()),
        }
    }

    /// Drops the batches up to a snapshot that the compiled file now has.
    ///
    /// # Errors
    /// The operating system's; the log is then as it was.
    pub fn drop_until(&mut self, snapshot: u64) -> Result<()> {
        self.check()?;
        let io = |error| Error::io(&self.path, error);
        let bytes = std::fs::read(&self.path).map_err(io)?;
        let contents =
            parse(&bytes).map_err(|reason| Error::ChangeLog { path: self.path.clone(), reason })?;
        let mut later = header(self.lineage, snapshot.max(contents.after));
        for batch in contents.batches.iter().filter(|batch| batch.snapshot > snapshot) {
            later.extend_from_slice(&record(batch.snapshot, &batch.changes)?);
        }
        let file = create(&self.path, &later).map_err(io)?;
        (self.file, self.len) = (file, later.len() as u64);
        Ok(())
    }

    /// Bytes of the file.
    pub fn len(&self) -> u64 {
        self.len
    }
}

/// A locked file of these bytes, open for more; the disk has the bytes before the name.
fn create(path: &Path, bytes: &[u8]) -> std::io::Result<LockedFile> {
    let partial = partial_path(path);
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&partial)?;
    let file = LockedFile::new(file).map_err(std::io::Error::from)?;
    (&*file).write_all(bytes)?;
    file.sync_all()?;
    put_in_place(&partial, path)?;
    Ok(file)
}
