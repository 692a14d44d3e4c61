//! A file that one process writes at a time.

use std::fs::{File, TryLockError};
use std::ops::Deref;

/// A file open for writing, with its advisory lock.
pub struct LockedFile {
    file: File,
}

impl LockedFile {
    /// Takes the lock of an open file; does not wait for it.
    ///
    /// # Errors
    /// [`TryLockError::WouldBlock`] where another process holds it.
    pub fn new(file: File) -> Result<LockedFile, TryLockError> {
        file.try_lock()?;
        Ok(LockedFile { file })
    }
}

impl Deref for LockedFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

impl Drop for LockedFile {
    /// Unlocks the file. Closing alone would not: until a child process that another thread is
    /// starting runs its own program, the child has the file open too and keeps the lock.
    fn drop(&mut self) {
        let _ = self.file.unlock(); // at worst, the lock ends with the last process that has it
    }
}
