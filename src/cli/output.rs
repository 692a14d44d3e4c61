//! Files that commands write: new files that take their names. A file that is there is never
//! written over, because a program may have it mapped or be half way through it.

use std::fs::{File, Metadata};
use std::io::{BufWriter, Result, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

/// Where files are no files of their own: devices, pipes, and what other processes have open.
const SPECIAL_FOLDERS: [&str; 2] = ["/dev", "/proc"];

/// A file that appears under its name as a whole once it is [finished](OutputFile::finish), and not
/// at all before. Devices and pipes are written to as they are.
pub struct OutputFile {
    writer: BufWriter<Box<dyn Write>>,
    beside: Option<Beside>,
}

/// A new file beside the one whose name it is to take.
struct Beside {
    file: NamedTempFile,
    target: PathBuf,
}

impl OutputFile {
    /// Begins a file.
    ///
    /// # Errors
    /// The operating system's.
    pub fn create(path: &Path) -> Result<OutputFile> {
        let (beside, file): (_, Box<dyn Write>) = match Beside::begin(path)? {
            None => (None, Box::new(File::create(path)?)),
            Some(beside) => {
                let file = beside.file.reopen()?;
                (Some(beside), Box::new(file))
            }
        };
        Ok(OutputFile { writer: BufWriter::new(file), beside })
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// The operating system's; the file that had the name is then still there.
    pub fn finish(mut self) -> Result<()> {
        self.writer.flush()?;
        self.beside.map_or(Ok(()), |beside| beside.put_in_place().map(|_| ()))
    }
}

impl Write for OutputFile {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        self.writer.write(bytes)
    }

    fn flush(&mut self) -> Result<()> {
        self.writer.flush()
    }
}

/// Begins a file that has its name from the start, so that others can follow it as it grows.
///
/// # Errors
/// The operating system's.
pub fn create_stream(path: &Path) -> Result<File> {
    match Beside::begin(path)? {
        None => File::create(path),
        Some(beside) => beside.put_in_place(),
    }
}

impl Beside {
    /// A new file, or none where `path` is no regular file and must be written to itself.
    fn begin(path: &Path) -> Result<Option<Beside>> {
        let before = match std::fs::metadata(path) {
            Ok(metadata) => Some(metadata),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let is_link = path.symlink_metadata().is_ok_and(|metadata| metadata.is_symlink());
        let is_special = before.as_ref().is_some_and(|metadata| !metadata.is_file())
            || SPECIAL_FOLDERS.iter().any(|folder| path.starts_with(folder))
            || (before.is_none() && is_link); // a link to nothing yet: its target is made
        if is_special {
            return Ok(None);
        }
        // A link stays one, and its target is replaced.
        let target = if is_link { path.canonicalize()? } else { path.to_path_buf() };
        let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty());
        let mut builder = tempfile::Builder::new();
        builder.prefix(".sidereal-").suffix(".partial");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // As the process's mask has it: a temporary file would be its owner's alone.
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let file = builder.tempfile_in(folder.unwrap_or(Path::new(".")))?;
        if let Some(before) = before.as_ref().map(Metadata::permissions) {
            file.as_file().set_permissions(before)?;
        }
        Ok(Some(Beside { file, target }))
    }

    fn put_in_place(self) -> Result<File> {
        self.file.persist(&self.target).map_err(|failed| failed.error)
    }
}
