//! Files that are replaced as a whole or not at all: written beside the target, then renamed.
//!
//! A process that has the old file mapped keeps it whole. The caller holds the catalog's lock
//! ([`super::lock`]), so the file beside the target has one fixed name, and what a killed process
//! left there is gone with the next attempt.

use std::ffi::OsString;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// The most symbolic links that a name may lead through, as in Linux.
const MAX_LINKS: usize = 40;

/// The file that a name leads to through symbolic links, whether the file exists or not.
///
/// All names of a file by symbolic links are one catalog with one log. A hard link is like a copy:
/// the compiled file is never written in place, and each name has a log of its own.
///
/// # Errors
/// The operating system's.
pub(crate) fn resolve(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_path_buf();
    for _ in 0..MAX_LINKS {
        match path.canonicalize() {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            found => return found,
        }
        let folder = folder_of(&path);
        match std::fs::read_link(&path) {
            Ok(target) => path = folder.join(target), // a link to a file that is to be made
            Err(_) => {
                let name = path.file_name().ok_or(ErrorKind::InvalidInput)?;
                return Ok(folder.canonicalize()?.join(name));
            }
        }
    }
    Err(io::Error::other("too many symbolic links"))
}

/// The folder of a file.
pub(super) fn folder_of(path: &Path) -> PathBuf {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    folder.unwrap_or(Path::new(".")).to_path_buf()
}

/// A path with more at its end.
pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name: OsString = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// What tells files apart, whatever their names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    pub device: u64,
    pub inode: u64,
    /// Nanoseconds since 1970; zero where the file system does not say. A file that takes the inode
    /// of one that is gone was created later.
    pub created: u64,
}

/// The identity of a file; `None` where the system gives files none.
pub(super) fn identity(metadata: &Metadata) -> Option<Identity> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let created = metadata.created().ok();
        let created = created.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let created = created.map_or(0, |since| since.as_nanos() as u64);
        Some(Identity { device: metadata.dev(), inode: metadata.ino(), created })
    }
    #[cfg(not(unix))]
    {
        let _ = metadata;
        None
    }
}

/// Whether a name leads to an open file.
pub(super) fn leads_to(path: &Path, file: &File) -> io::Result<bool> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(identity(&metadata) == identity(&file.metadata()?)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// A failed replacement.
#[derive(Debug)]
pub(super) struct Failed {
    pub error: io::Error,
    /// Whether the name may lead to the new file all the same.
    pub is_renamed: bool,
}

/// A folder, open so that its entries can be forced to the disk when no file can be opened any more.
pub(super) struct Folder {
    file: Option<File>,
}

impl Folder {
    pub fn open(path: &Path) -> io::Result<Folder> {
        // Elsewhere a folder cannot be opened.
        Ok(Folder { file: if cfg!(unix) { Some(File::open(path)?) } else { None } })
    }

    /// Returns when the disk has the folder's names.
    pub fn sync(&self) -> io::Result<()> {
        self.file.as_ref().map_or(Ok(()), File::sync_all)
    }
}

/// Replaces a file by what `write` writes, and returns the new file, open. Returns when the disk has
/// the new file and its name.
///
/// `path` is a resolved name. The new file has the mode and, where permitted, the owner of `like`,
/// if `like` exists.
pub(super) fn replace(
    path: &Path,
    folder: &Folder,
    like: &Path,
    write: impl FnOnce(&File) -> io::Result<()>,
) -> Result<File, Failed> {
    let partial = with_suffix(path, ".partial");
    let written = create_new(&partial, like).and_then(|file| {
        write(&file)?;
        file.sync_all()?;
        Ok(file)
    });
    let failed = |error, is_renamed| Failed { error, is_renamed };
    let clean_up = || drop(std::fs::remove_file(&partial)); // the first error is the one to report
    let file = written.map_err(|error| {
        clean_up();
        failed(error, false)
    })?;
    if let Err(error) = std::fs::rename(&partial, path) {
        let is_renamed = leads_to(path, &file).unwrap_or(true);
        clean_up();
        return Err(failed(error, is_renamed));
    }
    folder.sync().map_err(|error| failed(error, true))?;
    Ok(file)
}

/// A new file with the mode and, where permitted, the owner of another.
pub(super) fn create_new(path: &Path, like: &Path) -> io::Result<File> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
    match std::fs::metadata(like) {
        Ok(like) => take_after(&file, &like)?,
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    Ok(file)
}

/// Gives a file the owner of another, where permitted, and its mode.
pub(super) fn take_after(file: &File, like: &Metadata) -> io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::{MetadataExt, fchown};
        let own = file.metadata()?;
        if (own.uid(), own.gid()) != (like.uid(), like.gid()) {
            // Root alone may give files away; others keep at least the group if it is theirs.
            if fchown(file, Some(like.uid()), Some(like.gid())).is_err() {
                let _ = fchown(file, None, Some(like.gid()));
            }
        }
    }
    file.set_permissions(like.permissions())
}
