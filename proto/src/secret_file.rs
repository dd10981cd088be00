//! Files that hold a secret: who may read them, and how one is replaced whole.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use zeroize::Zeroizing;

use crate::{Code, Problem};

/// A file's text, at most so many bytes of it, in a buffer that is cleared, and what the system says of the file.
pub fn read(file: &Path, bytes_max: u64) -> io::Result<(Zeroizing<String>, fs::Metadata)> {
    let opened = File::open(file)?;
    let metadata = opened.metadata()?;
    // Room for all of it at once: a text that grows leaves copies behind.
    let size = metadata.len().min(bytes_max);
    let mut text = Zeroizing::new(String::with_capacity(usize::try_from(size).unwrap_or(0) + 1));
    opened.take(bytes_max).read_to_string(&mut text)?;
    Ok((text, metadata))
}

/// `LOOSE_FILE_MODE` where others than its owner may read or change a file. What root owns a group may read, as the
/// system's own keys are kept and systemd hands credentials over.
///
/// Files elsewhere than on Unix have no mode: there the folder's rights have to do.
pub fn check_mode(file: &Path, metadata: &fs::Metadata) -> Result<(), Problem> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt as _;
        let mode = metadata.mode() & 0o777;
        let allowed = if metadata.uid() == 0 { 0o740 } else { 0o700 };
        if mode & !allowed != 0 {
            let shown = file.display();
            let sentence = format!(
                "{shown} holds a secret and has mode {mode:04o}, so others may read or change it: run `chmod 600 {shown}`"
            );
            return Err(Problem::new(Code::LooseFileMode, sentence));
        }
    }
    #[cfg(not(unix))]
    let _ = (file, metadata);
    Ok(())
}

/// Replaces a file in one step (mode 0600), on disk when this returns: a crash leaves the old one or the new one.
pub fn replace(file: &Path, content: &[u8]) -> io::Result<()> {
    let folder = folder_of(file);
    let temporary = temporary(file);
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    // Of a process that had this number and was killed.
    let _ = fs::remove_file(&temporary);
    let mut written = options.open(&temporary)?;
    let done = written
        .write_all(content)
        .and_then(|()| written.sync_all())
        .and_then(|()| fs::rename(&temporary, file))
        .and_then(|()| sync_folder(&folder));
    if done.is_err() {
        // What was half written is a secret nobody needs; that it cannot be removed changes nothing about the error.
        let _ = fs::remove_file(&temporary);
    }
    done
}

fn temporary(file: &Path) -> PathBuf {
    // Two of one process are no hindrance to each other.
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let mut name = file.file_name().unwrap_or_default().to_owned();
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    name.push(format!(".new-{}-{number}", std::process::id()));
    file.with_file_name(name)
}

fn folder_of(file: &Path) -> PathBuf {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
    folder.unwrap_or(Path::new(".")).to_owned()
}

#[cfg(unix)]
fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

#[cfg(not(unix))]
fn sync_folder(_: &Path) -> io::Result<()> {
    Ok(())
}
