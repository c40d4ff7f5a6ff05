//! One process per data directory.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// Holds a directory for this process until it is dropped, or the process ends in whatever way.
#[derive(Debug)]
pub struct DirectoryLock {
    _file: File,
    path: PathBuf,
}

impl DirectoryLock {
    /// Creates the directory when it is missing, and takes it.
    ///
    /// # Errors
    /// `WouldBlock` when another process holds it; other kinds when it can't be created or written.
    pub fn take(directory: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        let path = directory.join("lock");
        let file = File::options().create(true).truncate(false).write(true).open(&path)?;
        match file.try_lock() {
            Ok(()) => Ok(Self { _file: file, path }),
            Err(std::fs::TryLockError::WouldBlock) => Err(io::ErrorKind::WouldBlock.into()),
            Err(std::fs::TryLockError::Error(error)) => Err(error),
        }
    }

    /// The file that is locked.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_taker_is_refused_until_the_first_lets_go() {
        let dir = std::env::temp_dir().join(format!("aeterna-lock-{}", std::process::id()));
        let first = DirectoryLock::take(&dir).unwrap();
        assert_eq!(DirectoryLock::take(&dir).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(first);
        drop(DirectoryLock::take(&dir).unwrap());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
