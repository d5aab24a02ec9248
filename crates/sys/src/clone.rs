//! Copies of files that share or skip what they can: a reflink where the file system has it, else only the data
//! between the holes.
//!
//! It stands on the path of every VM's creation, so nothing here syncs: a VM's disk that a crash of the host
//! loses is made anew.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek};
use rustix::io::Errno;

/// How a clone came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloneKind {
    /// The blocks are shared until one side writes (`FICLONE`).
    Reflink,
    /// The data was copied, the holes were not.
    SparseCopy,
}

/// Buffer of the copy where the kernel cannot copy by itself: large enough to make system calls not matter.
const BUFFER: usize = 1 << 20;

/// What a try copies: one block of any file system that is in use.
const PROBE: usize = 64 << 10;

/// Makes `dst` (mode 0600, must not exist) a copy of the file `src`. Nothing is left behind on failure.
pub fn clone_file(src: &Path, dst: &Path) -> io::Result<CloneKind> {
    let source = File::open(src)?;
    let target = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(dst)?;
    clone_into(&source, &target).inspect_err(|_| {
        // The copy failed; that its remains cannot be removed either adds nothing to that error.
        let _ = std::fs::remove_file(dst);
    })
}

fn clone_into(source: &File, target: &File) -> io::Result<CloneKind> {
    match ioctl_ficlone(target, source) {
        Ok(()) => {
            if let Err(error) = unshare_little(target) {
                tracing::debug!(%error, "a clone takes more of the disk than it need");
            }
            Ok(CloneKind::Reflink)
        }
        // Not this file system (OPNOTSUPP, NOTTY), not these two (XDEV), not these files (INVAL), not allowed here (PERM).
        Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::PERM) => {
            copy_sparse(source, target)?;
            Ok(CloneKind::SparseCopy)
        }
        Err(errno) => Err(errno.into()),
    }
}

/// `struct fsxattr` of linux/fs.h: what ioctl_xfs_fsgetxattr(2) gives and takes.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct FileAttributes {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    padding: [u8; 8],
}

/// `FS_IOC_FSGETXATTR` of linux/fs.h: `_IOR('X', 31, struct fsxattr)`.
const GET_ATTRIBUTES: libc::Ioctl = 0x801c_581f;
/// `FS_IOC_FSSETXATTR`: `_IOW('X', 32, struct fsxattr)`.
const SET_ATTRIBUTES: libc::Ioctl = 0x401c_5820;
/// `FS_XFLAG_COWEXTSIZE`.
const HAS_COW_EXTENT_SIZE: u32 = 0x0001_0000;
/// `XFS_SUPER_MAGIC` of linux/magic.h.
const XFS: i64 = 0x5846_5342;

/// Lets XFS give a clone only what is written of it. By itself it makes 128 KiB the file's own for each first write, so that a
/// VM's disk would take MiB after the few dozen small writes that come with mounting it. Other file systems have no such hint
/// and no need of it. A hint that is not taken costs disk, not correctness.
fn unshare_little(file: &File) -> io::Result<()> {
    let place = rustix::fs::fstatfs(file)?;
    if place.f_type != XFS {
        return Ok(());
    }
    let mut attributes = FileAttributes::default();
    // SAFETY: the request writes one `struct fsxattr`, which `attributes` is.
    if unsafe { libc::ioctl(file.as_raw_fd(), GET_ATTRIBUTES, &raw mut attributes) } < 0 {
        return Err(io::Error::last_os_error());
    }
    attributes.flags |= HAS_COW_EXTENT_SIZE;
    attributes.cow_extent_size = u32::try_from(place.f_bsize).map_err(io::Error::other)?;
    // SAFETY: the request reads one `struct fsxattr`, which `attributes` is.
    if unsafe { libc::ioctl(file.as_raw_fd(), SET_ATTRIBUTES, &raw const attributes) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether files in `dir` can share their blocks, found out by letting two do it. They have no names: nothing is left,
/// also after a crash. An error where the file system knows no such files, or takes none.
pub fn can_reflink(dir: &Path) -> io::Result<bool> {
    let unnamed = || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .mode(0o600)
            .custom_flags(libc::O_TMPFILE)
            .open(dir)
    };
    let (source, target) = (unnamed()?, unnamed()?);
    // An empty file can be cloned where one with blocks cannot.
    source.write_all_at(&[1; PROBE], 0)?;
    Ok(clone_into(&source, &target)? == CloneKind::Reflink)
}

fn copy_sparse(source: &File, target: &File) -> io::Result<()> {
    let len = source.metadata()?.len();
    target.set_len(len)?;
    let mut at = 0;
    while at < len {
        let start = match seek(source, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            // A file system without holes: all of it is data.
            Err(Errno::INVAL) => at,
            Err(errno) => return Err(errno.into()),
        };
        let end = seek(source, SeekFrom::Hole(start)).unwrap_or(len).min(len);
        copy_range(source, start, target, start, end - start)?;
        at = end;
    }
    Ok(())
}

/// Copies `len` bytes of `source` from `from` on to `target` from `to` on; blocks are shared where the file system can and
/// both sides lie on its blocks. All of it must be there: a source that ends before is an error.
pub fn copy_range(source: &File, from: u64, target: &File, to: u64, len: u64) -> io::Result<()> {
    let end = from + len;
    let (mut at, mut to) = (from, to);
    while at < end {
        let want = usize::try_from(end - at).unwrap_or(usize::MAX);
        match copy_file_range(source, Some(&mut at), target, Some(&mut to), want) {
            Ok(0) => return copy_through_memory(source, at, target, to, end - at),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::NOSYS | Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::PERM | Errno::IO) => {
                return copy_through_memory(source, at, target, to, end - at);
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

fn copy_through_memory(source: &File, from: u64, target: &File, to: u64, len: u64) -> io::Result<()> {
    let mut buffer = vec![0; usize::try_from(len).map_or(BUFFER, |len| len.min(BUFFER))];
    let mut done = 0;
    while done < len {
        let want = usize::try_from(len - done).map_or(BUFFER, |rest| rest.min(BUFFER));
        source.read_exact_at(&mut buffer[..want], from + done)?;
        target.write_all_at(&buffer[..want], to + done)?;
        done += want as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_try_says_what_a_clone_does_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (src, dst) = (dir.path().join("src"), dir.path().join("dst"));
        std::fs::write(&src, [1; PROBE]).unwrap();
        let cloned = clone_file(&src, &dst).unwrap();
        assert_eq!(can_reflink(dir.path()).unwrap(), cloned == CloneKind::Reflink);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
        assert!(can_reflink(&dir.path().join("none")).is_err());
    }

    fn check(pieces: &[(u64, &[u8])], len: u64) {
        let dir = tempfile::tempdir().unwrap();
        let (src, dst) = (dir.path().join("src"), dir.path().join("dst"));
        let file = File::create(&src).unwrap();
        file.set_len(len).unwrap();
        for (at, data) in pieces {
            file.write_all_at(data, *at).unwrap();
        }
        clone_file(&src, &dst).unwrap();
        assert_eq!(std::fs::read(&src).unwrap(), std::fs::read(&dst).unwrap());
        let (source, target) = (std::fs::metadata(&src).unwrap(), std::fs::metadata(&dst).unwrap());
        assert!(
            target.blocks() <= source.blocks() + 8,
            "{} blocks became {}",
            source.blocks(),
            target.blocks()
        );
        assert_eq!(target.mode() & 0o777, 0o600);
    }

    #[test]
    fn a_clone_has_the_bytes_and_the_holes() {
        check(&[], 0);
        check(&[], 10 << 20);
        check(&[(0, b"start"), ((64 << 20) - 3, b"end")], 64 << 20);
        check(&[(8 << 20, &[7; 3 << 20])], 20 << 20);
    }

    #[test]
    fn the_copy_through_memory_equals_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("src");
        let data: Vec<u8> = (0..3_000_001_u32)
            .map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1])
            .collect();
        std::fs::write(&source, &data).unwrap();
        let target = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(dir.path().join("dst"))
            .unwrap();
        let source = File::open(&source).unwrap();
        copy_through_memory(&source, 0, &target, 0, data.len() as u64).unwrap();
        assert!(std::fs::read(dir.path().join("dst")).unwrap() == data);
        // A range goes where it is told to, in both ways.
        copy_through_memory(&source, 1 << 20, &target, 7, 1_000_000).unwrap();
        copy_range(&source, 1 << 20, &target, 2_000_000, 1_000_000).unwrap();
        let moved = &data[1 << 20..(1 << 20) + 1_000_000];
        let found = std::fs::read(dir.path().join("dst")).unwrap();
        assert!(found[7..1_000_007] == *moved && found[2_000_000..3_000_000] == *moved);
        assert!(found[..7] == data[..7] && found.len() == data.len());
        assert!(copy_range(&source, 3_000_000, &target, 0, 2).is_err());
    }

    #[test]
    fn what_exists_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let (src, dst) = (dir.path().join("src"), dir.path().join("dst"));
        std::fs::write(&src, "new").unwrap();
        std::fs::write(&dst, "old").unwrap();
        assert_eq!(
            clone_file(&src, &dst).unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );
        assert_eq!(std::fs::read(&dst).unwrap(), b"old");
        assert!(clone_file(&dir.path().join("none"), &dir.path().join("x")).is_err());
        assert!(!dir.path().join("x").exists());
    }
}
