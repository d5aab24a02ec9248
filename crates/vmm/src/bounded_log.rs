//! Logs of what a guest or its VMM said: the end of it, never more than [`MAX_LOG`] on disk.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// A few dozen verbose boots. Whoever talks on only moves the window.
const MAX_LOG: u64 = 1 << 20;

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
        .open(path)
}

/// Appends to the log; when it would grow over the limit, its older half goes.
pub(crate) fn append(path: &Path, said: &[u8]) -> io::Result<()> {
    let mut file = open(path)?;
    let length = file.metadata()?.len();
    if length + said.len() as u64 <= MAX_LOG {
        return file.write_all(said);
    }
    let mut kept = tail_of(&mut file, usize::try_from(MAX_LOG / 2).unwrap_or(usize::MAX))?;
    kept.extend_from_slice(
        &said[said
            .len()
            .saturating_sub(usize::try_from(MAX_LOG / 2).unwrap_or(usize::MAX))..],
    );
    file.set_len(0)?;
    file.write_all(&kept)
}

/// The last `limit` bytes of the log; nothing when there is none yet.
pub(crate) fn tail(path: &Path, limit: usize) -> io::Result<Vec<u8>> {
    match File::open(path) {
        Ok(mut file) => tail_of(&mut file, limit),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}

fn tail_of(file: &mut File, limit: usize) -> io::Result<Vec<u8>> {
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(limit as u64)))?;
    let mut out = Vec::new();
    file.take(limit as u64).read_to_end(&mut out)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_keeps_the_end_and_stays_small() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        assert_eq!(tail(&path, 10).unwrap(), b"");
        append(&path, b"hello ").unwrap();
        append(&path, b"world").unwrap();
        assert_eq!(tail(&path, 100).unwrap(), b"hello world");
        assert_eq!(tail(&path, 5).unwrap(), b"world");
        for n in 0..64u8 {
            append(&path, &vec![n; 50_000]).unwrap();
            assert!(std::fs::metadata(&path).unwrap().len() <= MAX_LOG);
        }
        assert_eq!(
            tail(&path, 100_000).unwrap(),
            [vec![62; 50_000], vec![63; 50_000]].concat()
        );
        append(&path, &vec![b'x'; 3 << 20]).unwrap();
        assert!(std::fs::metadata(&path).unwrap().len() <= MAX_LOG);
        assert_eq!(tail(&path, 3).unwrap(), b"xxx");
    }

    #[test]
    fn a_link_in_its_place_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (path, victim) = (folder.path().join("console.log"), folder.path().join("victim"));
        std::os::unix::fs::symlink(&victim, &path).unwrap();
        assert!(append(&path, b"x").is_err());
        assert!(!victim.exists());
    }
}
