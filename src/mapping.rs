//! Files seen as memory: read into it as a whole, or mapped.
//!
//! A copy in memory is out of reach of whoever writes to the file. A mapped file is shared with
//! them: a program that writes into it in place (as `cp` does) changes the bytes under their
//! reader, and one that shortens it takes the memory away, which ends the process by SIGBUS. So a
//! mapped file is compared with what it was when it was opened before its bytes are used and again
//! before results are given out ([`Mapping::check`]). A change between the check and the access
//! remains possible. A file that is replaced by rename is another file and harms nobody.
#![allow(unsafe_code)] // memory mapping, the only unsafe code of the CPU build

use std::fs::File;
use std::io::Read;
use std::ops::{Deref, DerefMut, Range};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::error::{Error, Result};

/// Opens a file to read it. A pipe, a socket or a device is refused, because opening one can wait for
/// ever and reading one never says how much there is.
///
/// # Errors
/// The operating system's.
pub(crate) fn open_file(path: &Path) -> std::io::Result<File> {
    check_regular(path)?;
    File::open(path)
}

/// Checks that a name leads to a regular file, if it leads anywhere.
///
/// # Errors
/// The operating system's.
pub(crate) fn check_regular(path: &Path) -> std::io::Result<()> {
    use std::io::ErrorKind;
    let metadata = match std::fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        metadata => metadata?,
    };
    if metadata.is_dir() {
        return Err(ErrorKind::IsADirectory.into());
    }
    match metadata.is_file() {
        true => Ok(()),
        false => Err(std::io::Error::other("this is a pipe, a socket or a device, and no file")),
    }
}

/// A whole file, read-only.
pub(crate) struct Mapping {
    path: PathBuf,
    contents: Contents,
}

enum Contents {
    /// In whole words, so that numbers of any type are aligned; the last word may be part filled.
    Copy {
        words: Vec<u64>,
        len: usize,
    },
    Mapped {
        map: memmap2::Mmap,
        file: File,
        stamp: Stamp,
    },
}

/// Size and time of the last write of an open file: another stamp tells of another content.
#[derive(PartialEq, Eq)]
struct Stamp {
    len: u64,
    modified: SystemTime,
}

impl Stamp {
    fn of(file: &File) -> std::io::Result<Stamp> {
        let metadata = file.metadata()?;
        if metadata.is_dir() {
            return Err(std::io::ErrorKind::IsADirectory.into());
        }
        Ok(Stamp { len: metadata.len(), modified: metadata.modified()? })
    }
}

impl Mapping {
    /// Maps a file of more than `map_above` bytes, and reads a smaller one into memory.
    ///
    /// # Errors
    /// The operating system's; [`Error::FileChanged`] where the file changed while it was read.
    pub fn open(path: &Path, map_above: u64) -> Result<Mapping> {
        let io = |error| Error::io(path, error);
        let mut file = open_file(path).map_err(io)?;
        let stamp = Stamp::of(&file).map_err(io)?;
        let path = path.to_path_buf();
        if stamp.len > map_above {
            // SAFETY: the mapping is read-only and we never hand out a mutable view. What others
            // may do to the file is said above, and `check` is how we notice.
            let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
            return Ok(Mapping { path, contents: Contents::Mapped { map, file, stamp } });
        }
        let len = stamp.len as usize;
        let mut words = vec![0u64; len.div_ceil(size_of::<u64>())];
        let read = file.read_exact(&mut bytemuck::cast_slice_mut(&mut words)[..len]);
        match read {
            Err(error) if error.kind() != std::io::ErrorKind::UnexpectedEof => Err(io(error)),
            Ok(()) if Stamp::of(&file).map_err(io)? == stamp => {
                Ok(Mapping { path, contents: Contents::Copy { words, len } })
            }
            _ => Err(Error::FileChanged { path }),
        }
    }

    /// A copy of some of the bytes.
    pub fn copy(&self, range: Range<usize>) -> Mapping {
        let len = range.len();
        let mut words = vec![0u64; len.div_ceil(size_of::<u64>())];
        bytemuck::cast_slice_mut(&mut words)[..len].copy_from_slice(&self.bytes()[range]);
        Mapping { path: self.path.clone(), contents: Contents::Copy { words, len } }
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        match &self.contents {
            Contents::Copy { words, len } => &bytemuck::cast_slice(words)[..*len],
            Contents::Mapped { map, .. } => map,
        }
    }

    /// Gives back the memory that some of a mapped file's bytes take: those of whole pages. They are
    /// read again from the file, or from the system's copy of it, when somebody asks for them.
    pub fn forget(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Contents::Mapped { map, .. } = &self.contents {
            const PAGE: usize = 1 << 16; // a multiple of every system's
            let range = range.start.next_multiple_of(PAGE)..range.end / PAGE * PAGE;
            if !range.is_empty() {
                let advice = memmap2::UncheckedAdvice::DontNeed;
                // SAFETY: the mapping is shared and read-only, so that its pages hold nothing but
                // what the file holds, and are the file's again when they are next read.
                // A refusal leaves the memory taken, which harms nobody.
                let _ = unsafe { map.unchecked_advise_range(advice, range.start, range.len()) };
            }
        }
    }

    /// Whether the bytes are the file's own rather than a copy of them.
    pub fn is_mapped(&self) -> bool {
        matches!(self.contents, Contents::Mapped { .. })
    }

    /// Checks that nobody has written to the file since it was mapped; a copy is always sound.
    ///
    /// It costs one system call, and none for a copy. Another file that takes the name changes
    /// nothing here: the mapping keeps the old one. A write within the clock tick of the write
    /// before it (some milliseconds on Linux) leaves no trace.
    ///
    /// # Errors
    /// [`Error::FileChanged`].
    pub fn check(&self) -> Result<()> {
        let Contents::Mapped { file, stamp, .. } = &self.contents else { return Ok(()) };
        match Stamp::of(file) {
            Ok(now) if now == *stamp => Ok(()),
            _ => Err(Error::FileChanged { path: self.path.clone() }),
        }
    }
}

/// Memory of this process that begins with a cache line. What is large comes in large pages where the
/// system has them: they are there at once, and the processor finds them faster.
pub(crate) enum MappedMemory {
    Lines { lines: Vec<Line>, len: usize },
    Pages { pages: memmap2::MmapMut, len: usize },
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Line([u8; 64]);

impl MappedMemory {
    /// So many bytes, all zero.
    pub fn zeros(len: usize) -> MappedMemory {
        const LARGE_PAGE: usize = 1 << 21;
        if len >= LARGE_PAGE
            && let Ok(pages) = memmap2::MmapMut::map_anon(len)
        {
            // Small pages are as right.
            #[cfg(target_os = "linux")]
            let _ = pages.advise(memmap2::Advice::HugePage);
            return MappedMemory::Pages { pages, len };
        }
        let lines = bytemuck::zeroed_vec(len.div_ceil(size_of::<Line>()));
        MappedMemory::Lines { lines, len }
    }
}

impl Deref for MappedMemory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            MappedMemory::Lines { lines, len } => &bytemuck::cast_slice(lines)[..*len],
            MappedMemory::Pages { pages, len } => &pages[..*len],
        }
    }
}

impl DerefMut for MappedMemory {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            MappedMemory::Lines { lines, len } => &mut bytemuck::cast_slice_mut(lines)[..*len],
            MappedMemory::Pages { pages, len } => &mut pages[..*len],
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const NEVER: u64 = u64::MAX;

    #[test]
    fn a_copy_and_a_mapping_have_the_bytes_of_the_file() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("file");
        for len in [0, 1, 7, 8, 9, 4096, 100_001] {
            let bytes: Vec<u8> = (0..len).map(|at: usize| at as u8).collect();
            std::fs::write(&path, &bytes).expect("a writable folder");
            for map_above in [0, NEVER] {
                let mapping = Mapping::open(&path, map_above).expect("a readable file");
                assert_eq!(mapping.bytes(), bytes);
                assert_eq!(mapping.is_mapped(), map_above == 0 && len > 0);
                mapping.check().expect("nobody writes");
            }
        }
        assert!(Mapping::open(folder.path(), 0).is_err());
    }

    #[test]
    fn a_write_to_a_mapped_file_is_noticed_and_a_rename_is_harmless() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let [path, other] = ["file", "other"].map(|name| folder.path().join(name));
        let write = |path: &Path, byte: u8| {
            std::fs::write(path, vec![byte; 5000]).expect("a writable folder");
            // Beyond the tick of the clock that stamps files.
            std::thread::sleep(std::time::Duration::from_millis(20));
        };
        write(&path, 1);
        write(&other, 2);
        let [mapped, copy] =
            [0, NEVER].map(|map_above| Mapping::open(&path, map_above).expect("a readable file"));
        std::fs::rename(&other, &path).expect("a writable folder");
        mapped.check().expect("the old file is whole");
        assert_eq!(mapped.bytes(), copy.bytes());

        let mapped = Mapping::open(&path, 0).expect("a readable file");
        let copy = Mapping::open(&path, NEVER).expect("a readable file");
        write(&path, 3);
        assert!(matches!(mapped.check(), Err(Error::FileChanged { .. })));
        copy.check().expect("a copy is out of reach");
        assert_eq!(copy.bytes(), [2; 5000]);

        let mapped = Mapping::open(&path, 0).expect("a readable file");
        let file = std::fs::OpenOptions::new().append(true).open(&path);
        file.expect("a writable file").write_all(b"more").expect("room");
        assert!(mapped.check().is_err(), "longer");
    }
}
