//! Atomic writes: a file is written under a temporary name in the same folder, synced and renamed,
//! so it is either complete or absent.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

/// Writes `bytes` to `path` atomically. On an error the previous file, if any, is unchanged.
///
/// # Errors
/// Any I/O error.
pub fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = temporary_name(path);
    let written = (|| {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary); // report the first error
    }
    written?;
    sync_folder(path.parent())
}

/// Writes like [`write_whole`], and reads the file back before the rename.
///
/// # Errors
/// Any I/O error, or contents that differ from `bytes`.
pub(crate) fn write_checked(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = temporary_name(path);
    let written = (|| {
        write_whole(&temporary, bytes)?;
        match fs::read(&temporary)? == bytes {
            true => fs::rename(&temporary, path),
            false => Err(io::Error::other("the file differs from the written data when read back")),
        }
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary); // report the first error
        return written;
    }
    sync_folder(path.parent())
}

/// Remedy for a failed write, for the hint of an error.
pub fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "create the folder first",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => "choose a writable location",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "free some space",
        _ => "free some space or choose another location",
    }
}

/// Makes a rename in this folder durable. No effect on systems where folders cannot be opened.
///
/// # Errors
/// Any I/O error.
pub(crate) fn sync_folder(folder: Option<&Path>) -> io::Result<()> {
    #[cfg(unix)]
    if let Some(folder) = folder {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        File::open(folder)?.sync_all()?;
    }
    let _ = folder;
    Ok(())
}

/// Formats bytes in hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Temporary name of a file: `path` with `.partial` appended.
pub(crate) fn temporary_name(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_write_leaves_the_old_file_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        write_whole(&path, b"old").unwrap();
        let nowhere = folder.path().join("missing/b");
        assert!(write_whole(&nowhere, b"new").is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
