//! What a virtiofsd says, in memory that cannot grow.
//!
//! Its guest can make it complain without end. A sealed memory file takes the first 64 KiB, outlives us as long as
//! the program has it open, and refuses the rest; the program does not mind.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use offshoot_sys::process::share_fd;

/// A start that fails says one line; a share that works says nothing.
const SIZE: u64 = 64 << 10;
/// How much of it goes into an error.
const MAX_SAID: usize = 2048;

/// Words of a program: what it writes to, and we read.
#[derive(Debug)]
pub(super) struct Words {
    file: File,
}

impl Words {
    /// No words yet.
    pub(super) fn new() -> io::Result<Self> {
        let fd = memfd_create("virtiofsd-log", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&fd, SIZE)?;
        fcntl_add_seals(&fd, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
        Ok(Self { file: fd.into() })
    }

    /// The words of a process that an earlier daemon started.
    pub(super) fn of_process(pid: u32) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/fd/2")).map(|file| Self { file })
    }

    /// What the program gets as its standard output and error.
    pub(super) fn writer(&self) -> io::Result<OwnedFd> {
        share_fd(&self.file)
    }

    /// All of them.
    fn read(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; SIZE as usize];
        let mut length = 0;
        while length < bytes.len() {
            match self.file.read_at(&mut bytes[length..], length as u64) {
                Ok(0) => break,
                Ok(read) => length += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let end = bytes
            .iter()
            .rposition(|byte| *byte != 0)
            .map_or(0, |last| last + 1);
        bytes.truncate(end);
        Ok(bytes)
    }

    /// The end of them in one line, fit for an error message.
    pub(super) fn said(&self) -> String {
        let bytes = self.read().unwrap_or_default();
        let tail = &bytes[bytes.len().saturating_sub(MAX_SAID)..];
        crate::said::plain_lines(tail).join("; ")
    }

    /// Writes them to the log `path`, in place of what an earlier process said; nothing when there are none.
    pub(super) fn save(&self, path: &Path) -> io::Result<()> {
        let bytes = self.read()?;
        if bytes.is_empty() {
            return Ok(());
        }
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc_nofollow())
            .open(path)?;
        file.write_all_at(&bytes, 0)
    }
}

/// A symbolic link in the log's place is refused.
fn libc_nofollow() -> i32 {
    rustix::fs::OFlags::NOFOLLOW.bits().cast_signed()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn words_are_kept_up_to_their_limit() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let words = Words::new().unwrap();
        words.save(&log).unwrap();
        assert!(!log.exists(), "nothing was said");
        let mut writer = File::from(words.writer().unwrap());
        writer.write_all(b"one\n\x1btwo\n").unwrap();
        assert_eq!(words.said(), "one; two");
        words.save(&log).unwrap();
        assert_eq!(std::fs::read(&log).unwrap(), b"one\n\x1btwo\n");

        let mut written = 0;
        let error = loop {
            match writer.write(&[b'x'; 1000]) {
                Ok(length) => written += length,
                Err(error) => break error,
            }
            assert!(written <= SIZE as usize, "it grew");
        };
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert!(words.said().len() <= MAX_SAID);
        words.save(&log).unwrap();
        assert!(std::fs::metadata(&log).unwrap().len() <= SIZE);
        let again = Words::of_process(std::process::id());
        assert!(again.is_ok());
    }

    #[test]
    fn a_link_in_the_logs_place_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (log, victim) = (folder.path().join("log"), folder.path().join("victim"));
        std::os::unix::fs::symlink(&victim, &log).unwrap();
        let words = Words::new().unwrap();
        File::from(words.writer().unwrap()).write_all(b"x").unwrap();
        assert!(words.save(&log).is_err());
        assert!(!victim.exists());
    }
}
