//! Files seen as memory.
#![allow(unsafe_code)] // memory mapping, the only unsafe code of the CPU build

use std::fs::File;
use std::path::Path;

use crate::error::{Error, Result};

/// A whole file, mapped read-only.
pub(crate) struct Mapping {
    map: Option<memmap2::Mmap>, // None for an empty file, which cannot be mapped
}

impl Mapping {
    pub fn open(path: &Path) -> Result<Mapping> {
        let file = File::open(path).map_err(|error| Error::io(path, error))?;
        let metadata = file.metadata().map_err(|error| Error::io(path, error))?;
        if metadata.is_dir() {
            return Err(Error::io(path, std::io::ErrorKind::IsADirectory.into()));
        }
        if metadata.len() == 0 {
            return Ok(Mapping { map: None });
        }
        // SAFETY: the mapping is read-only and we never hand out a mutable view. As for every
        // user of mapped files, the caller must not truncate the file while it is open: replace
        // files by rename, as `catalog build` does.
        let map = unsafe { memmap2::Mmap::map(&file) };
        Ok(Mapping { map: Some(map.map_err(|error| Error::io(path, error))?) })
    }

    pub fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}
