//! Files that are replaced as a whole or not at all: written beside the target, then renamed.
//!
//! A process that has the old file mapped keeps it whole.

use std::fs::File;
use std::path::{Path, PathBuf};

/// Where the new contents of a file are written.
pub fn partial_path(path: &Path) -> PathBuf {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    partial.into()
}

/// Gives a partial file, whose bytes are on the disk, its name; returns when the disk has the name.
pub fn put_in_place(partial: &Path, path: &Path) -> std::io::Result<()> {
    std::fs::rename(partial, path)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    match cfg!(unix) {
        true => File::open(folder.unwrap_or(Path::new(".")))?.sync_all(),
        false => Ok(()), // elsewhere a folder cannot be opened
    }
}
