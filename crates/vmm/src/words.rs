//! What a program of ours says, in memory that cannot grow.
//!
//! Its guest can make it complain without end, or take it over. A sealed memory file takes the first 64 KiB, outlives us as
//! long as the program has it open, and refuses the rest; the programs do not mind. When the program has ended, its words
//! go into a log that is limited, too.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use offshoot_sys::process::share_fd;
use rustix::fs::{MemfdFlags, OFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create};

use crate::bounded_log;
use crate::said::plain_lines;

/// A start that fails says a line or two; a VM that works says nothing, or warns now and then.
const SIZE: u64 = 64 << 10;
/// How much of it goes into an error.
const MAX_SAID: usize = 2048;

/// Words of a program: what it writes to, and we read.
#[derive(Debug)]
pub(crate) struct Words {
    file: File,
}

impl Words {
    /// No words yet; `name` is what `/proc` shows of them.
    pub(crate) fn new(name: &str) -> io::Result<Self> {
        let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&fd, SIZE)?;
        fcntl_add_seals(&fd, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
        Ok(Self { file: fd.into() })
    }

    /// The words of a process that an earlier daemon started.
    ///
    /// A program that was taken over may have put something else in their place: only what cannot grow is read.
    pub(crate) fn of_process(pid: u32) -> io::Result<Self> {
        Self::of_descriptor(pid, 2)
    }

    /// The same for words under another number than standard error.
    pub(crate) fn of_descriptor(pid: u32, number: i32) -> io::Result<Self> {
        let file = File::options()
            .read(true)
            .custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed())
            .open(format!("/proc/{pid}/fd/{number}"))?;
        if !fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(SealFlags::GROW)) {
            return Err(io::Error::other(
                "its standard error is not what it was started with",
            ));
        }
        Ok(Self { file })
    }

    /// What the program gets as its standard output and error.
    pub(crate) fn writer(&self) -> io::Result<OwnedFd> {
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

    /// The end of them, line by line, fit for an error message.
    pub(crate) fn said(&self) -> Vec<String> {
        let bytes = self.read().unwrap_or_default();
        plain_lines(&bytes[bytes.len().saturating_sub(MAX_SAID)..])
    }

    /// Adds them to the log `path`; nothing when there are none.
    pub(crate) fn save(&self, path: &Path) -> io::Result<()> {
        let bytes = self.read()?;
        if bytes.is_empty() {
            return Ok(());
        }
        bounded_log::append(path, &bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn words_are_kept_up_to_their_limit() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let words = Words::new("test").unwrap();
        words.save(&log).unwrap();
        assert!(!log.exists(), "nothing was said");
        let mut writer = File::from(words.writer().unwrap());
        writer.write_all(b"one\n\x1btwo\n").unwrap();
        assert_eq!(words.said(), ["one", "two"]);
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
        assert!(words.said().concat().len() <= MAX_SAID);
        let before = std::fs::metadata(&log).unwrap().len();
        words.save(&log).unwrap();
        assert_eq!(std::fs::metadata(&log).unwrap().len(), before + SIZE);
    }

    #[test]
    fn words_of_another_daemons_child_are_found_and_nothing_else_is_read() {
        use std::process::{Command, Stdio};
        let check = |stderr: Stdio, expected: Option<&str>| {
            let mut child = Command::new("/bin/sh")
                .args(["-c", "echo said >&2; echo ready; exec cat"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(stderr)
                .spawn()
                .unwrap();
            let mut ready = [0; 6];
            std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
            let found = Words::of_process(child.id()).map(|words| words.said().join(" "));
            assert_eq!(found.ok().as_deref(), expected);
            drop(child.stdin.take());
            child.wait().unwrap();
        };
        let words = Words::new("test").unwrap();
        check(words.writer().unwrap().into(), Some("said"));
        check(tempfile::tempfile().unwrap().into(), None);
        // A pipe does not block, either.
        check(Stdio::piped(), None);
        check(Stdio::null(), None);
    }

    #[test]
    fn a_link_in_the_logs_place_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (log, victim) = (folder.path().join("log"), folder.path().join("victim"));
        std::os::unix::fs::symlink(&victim, &log).unwrap();
        let words = Words::new("test").unwrap();
        File::from(words.writer().unwrap()).write_all(b"x").unwrap();
        assert!(words.save(&log).is_err());
        assert!(!victim.exists());
    }
}
