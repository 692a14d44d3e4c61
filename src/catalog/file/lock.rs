//! One writer for each catalog, and what its log has promised: `<catalog>.lock`.
//!
//! Everything that writes a catalog or its log takes the lock of this file first, before it reads
//! anything. A lock belongs to a file and not to its name, and two processes could hold locks of two
//! files of one name. So the file is never replaced, a process that has locked it checks that the
//! name still leads there, and a build alone, which leaves nothing else behind, removes a file that
//! it has made, while it holds the lock.
//!
//! The file also says how far the log has been acknowledged, because a log that lost its end looks
//! like a shorter log:
//!
//! ```text
//! magic | log's id | log's device | log's inode | when it was created | boot | acknowledged | synced |
//! checksum
//! ```
//! Each is 8 bytes, little-endian. `acknowledged` is the last snapshot whose batch was acknowledged,
//! `synced` the last one whose batch is on the disk, `boot` the start of the machine in which the
//! numbers were written. Until the machine starts again, everything acknowledged has to be in the
//! log; afterwards, everything synced. The numbers speak of one log file, by id, inode and creation: a
//! log that was put back from a backup is not held to what another one had promised.
//!
//! The first format had no creation; its promises are read and hold for any file of that inode.
//!
//! The numbers are written without waiting for the disk. After a power loss they may be old, and
//! then they promise less than they could.

use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use xxhash_rust::xxh3::xxh3_64;

use super::replace::{Folder, Identity, folder_of, identity, leads_to, take_after, with_suffix};
use crate::error::{Error, Result};
use crate::mapping::{check_regular, open_file};

const MAGIC: u64 = u64::from_le_bytes(*b"SIDLOCK2");
const MAGIC_V1: u64 = u64::from_le_bytes(*b"SIDLOCK1");
const FIELD_BYTES: usize = 8;
/// Fields before the checksum.
const NUM_FIELDS: usize = 8;
const NUM_FIELDS_V1: usize = 7;
/// How often the lock is taken anew because its file was replaced meanwhile.
const ATTEMPTS: usize = 100;

/// How far a log was acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Promise {
    pub log_id: u64,
    /// `None` where the system gives files no identity.
    pub log_file: Option<Identity>,
    /// The last snapshot whose batch was acknowledged.
    pub acknowledged: u64,
    /// The last snapshot whose batch is on the disk.
    pub synced: u64,
    /// Whether the machine has not been started again since.
    pub is_same_boot: bool,
}

impl Promise {
    /// Whether the promise was made for this log.
    pub fn is_about(&self, log_id: u64, log: &Metadata) -> bool {
        let (mut promised, mut found) = (self.log_file, identity(log));
        // Where one of the two does not know when the file was created, the rest decides.
        if let (Some(promised), Some(found)) = (&mut promised, &mut found)
            && (promised.created == 0 || found.created == 0)
        {
            (promised.created, found.created) = (0, 0);
        }
        (self.log_id, promised) == (log_id, found)
    }

    /// The snapshot up to which the log must have all batches.
    pub fn must_have(&self) -> u64 {
        if self.is_same_boot { self.acknowledged } else { self.synced }
    }

    fn to_bytes(self) -> Vec<u8> {
        let none = Identity { device: 0, inode: 0, created: 0 };
        let Identity { device, inode, created } = self.log_file.unwrap_or(none);
        let (acknowledged, synced) = (self.acknowledged, self.synced);
        let fields: [u64; NUM_FIELDS] =
            [MAGIC, self.log_id, device, inode, created, boot(), acknowledged, synced];
        let mut bytes: Vec<u8> = fields.iter().flat_map(|field| field.to_le_bytes()).collect();
        bytes.extend_from_slice(&xxh3_64(&bytes).to_le_bytes());
        bytes
    }

    /// `None` where the bytes are no promise: there is none yet, or the power went while it was
    /// written.
    fn from_bytes(bytes: &[u8]) -> Option<Promise> {
        let magic = u64::from_le_bytes(*bytes.first_chunk()?);
        let num_fields = match magic {
            MAGIC => NUM_FIELDS,
            MAGIC_V1 => NUM_FIELDS_V1,
            _ => return None,
        };
        // A shorter promise leaves the end of a longer one behind it.
        let (bytes, rest) = bytes.split_at_checked(FIELD_BYTES * num_fields)?;
        if *rest.first_chunk()? != xxh3_64(bytes).to_le_bytes() {
            return None;
        }
        let fields = bytes.chunks_exact(FIELD_BYTES);
        let fields = fields.map(|bytes| u64::from_le_bytes(bytes.try_into().expect("eight bytes")));
        let mut fields: Vec<u64> = fields.collect();
        if magic == MAGIC_V1 {
            fields.insert(4, 0);
        }
        let [_, log_id, device, inode, created, written_in, acknowledged, synced] =
            fields.try_into().expect("the fields of either format");
        let log_file = Identity { device, inode, created };
        Some(Promise {
            log_id,
            log_file: ((device, inode) != (0, 0)).then_some(log_file),
            acknowledged,
            synced,
            is_same_boot: written_in == boot() && written_in != 0,
        })
    }
}

/// Tells the starts of the machine apart; zero where the system does not.
fn boot() -> u64 {
    static BOOT: OnceLock<u64> = OnceLock::new();
    let read = || std::fs::read("/proc/sys/kernel/random/boot_id").map_or(0, |id| xxh3_64(&id));
    *BOOT.get_or_init(read)
}

/// The lock's path beside a catalog, by its resolved name.
fn path_of(catalog: &Path) -> PathBuf {
    with_suffix(catalog, ".lock")
}

/// The promise of a catalog's log, without its lock. The log may have been acknowledged further, or
/// begun again, by the time it is read.
pub(super) fn read_promise(catalog: &Path) -> Option<Promise> {
    let mut bytes = Vec::new();
    open_file(&path_of(catalog)).ok()?.read_to_end(&mut bytes).ok()?;
    Promise::from_bytes(&bytes)
}

/// The lock of a catalog, held by this process alone until it is dropped.
pub(crate) struct CatalogLock {
    path: PathBuf,
    file: File,
    folder: Folder,
    /// Whether there was no such file before.
    is_new: bool,
}

impl CatalogLock {
    /// Takes the lock of a catalog by its resolved name; does not wait for it.
    ///
    /// # Errors
    /// [`Error::CatalogInUse`] where another writer holds it; the operating system's.
    pub fn take(catalog: &Path) -> Result<CatalogLock> {
        let path = path_of(catalog);
        let io = |error| Error::io(&path, error);
        let folder = Folder::open(&folder_of(catalog)).map_err(io)?;
        for _ in 0..ATTEMPTS {
            let (file, is_new) = match open(&path, catalog) {
                // Removed by the build that made it, just as it was opened.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                opened => opened.map_err(io)?,
            };
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::CatalogInUse { path: catalog.to_path_buf() });
                }
                Err(TryLockError::Error(error)) => return Err(io(error)),
            }
            if leads_to(&path, &file).map_err(io)? {
                return Ok(CatalogLock { path, file, folder, is_new });
            }
        }
        Err(io(std::io::Error::other("the file is replaced all the time; leave it where it is")))
    }

    /// Removes the lock's file where there was none before the lock was taken, and unlocks it.
    pub fn remove_if_new(self) {
        if self.is_new {
            let _ = std::fs::remove_file(&self.path); // at worst, the file stays
        }
    }

    pub(super) fn folder(&self) -> &Folder {
        &self.folder
    }

    pub(super) fn promise(&self) -> Option<Promise> {
        let mut file = &self.file;
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(0)).ok()?;
        file.read_to_end(&mut bytes).ok()?;
        Promise::from_bytes(&bytes)
    }

    /// Writes the promise down. Where that fails, less damage can be told later, and nothing else.
    pub(super) fn set_promise(&self, promise: &Promise) {
        let mut file = &self.file;
        let _ = file.seek(SeekFrom::Start(0)).and_then(|_| file.write_all(&promise.to_bytes()));
    }
}

impl Drop for CatalogLock {
    /// Unlocks the file. Closing alone would not: until a child process that another thread is
    /// starting runs its own program, the child has the file open too and keeps the lock.
    fn drop(&mut self) {
        let _ = self.file.unlock(); // at worst, the lock ends with the last process that has it
    }
}

/// The lock's file, and whether it is new. A new one takes after the catalog, so that others who may
/// write the catalog may lock it.
fn open(path: &Path, catalog: &Path) -> std::io::Result<(File, bool)> {
    check_regular(path)?;
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    match options.open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        file => return Ok((file?, false)),
    }
    match options.clone().create_new(true).open(path) {
        Ok(file) => {
            if let Ok(catalog) = std::fs::metadata(catalog) {
                take_after(&file, &catalog)?;
            }
            Ok((file, true))
        }
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            Ok((options.open(path)?, false))
        }
        Err(error) => Err(error),
    }
}
