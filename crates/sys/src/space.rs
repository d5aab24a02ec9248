//! How much room a file system has, how much a tree takes, and how much of a file is shared with others.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// `st_blocks` counts 512-byte units on Linux, whatever the file system's own block is (stat(2)).
const BLOCKS_UNIT: u64 = 512;

/// The bytes that an unprivileged writer could still put on the file system that holds `path`.
pub fn available(path: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// The bytes that the file system which holds `path` has in all.
pub fn size(path: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(stat.f_blocks.saturating_mul(stat.f_frsize))
}

/// What can still be put on a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// The bytes it has in all, as [`size`] counts them.
    pub size: u64,
    /// Bytes, as [`available`] counts them.
    pub free: u64,
    /// Files and folders; `None` where the file system has no fixed number of them (btrfs).
    pub free_inodes: Option<u64>,
    /// It is mounted read-only.
    pub read_only: bool,
}

/// What an unprivileged writer could still put on the file system that holds `path`.
pub fn room(path: &Path) -> io::Result<Room> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(Room {
        size: stat.f_blocks.saturating_mul(stat.f_frsize),
        free: stat.f_bavail.saturating_mul(stat.f_frsize),
        free_inodes: (stat.f_files > 0).then_some(stat.f_favail),
        read_only: stat.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY),
    })
}

/// The bytes that `path` and everything below it take on disk: allocated blocks, not sizes, and each file with
/// several names once. Symbolic links are not followed; what vanishes meanwhile is not counted.
pub fn disk_usage(path: &Path) -> io::Result<u64> {
    let mut seen = HashSet::new();
    let mut pending = vec![path.to_path_buf()];
    let mut total = 0;
    while let Some(path) = pending.pop() {
        let Some(metadata) = unless_gone(std::fs::symlink_metadata(&path))? else {
            continue;
        };
        if metadata.nlink() > 1 && !metadata.is_dir() && !seen.insert((metadata.dev(), metadata.ino())) {
            continue;
        }
        total += metadata.blocks() * BLOCKS_UNIT;
        if metadata.is_dir() {
            let Some(entries) = unless_gone(std::fs::read_dir(&path))? else {
                continue;
            };
            for entry in entries {
                pending.push(entry?.path());
            }
        }
    }
    Ok(total)
}

/// What a file takes on disk, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extents {
    /// Allocated, with what is shared: what `du` says of the file.
    pub allocated: u64,
    /// Of that, held together with other files (reflinks): removing this file alone would not free it.
    pub shared: u64,
}

/// How much of a file is its own and how much it shares with its clones.
///
/// One look without a sync, while others may write: a snapshot of the moment. A file system that cannot say what is
/// shared (tmpfs) gives 0 for it. Source: the kernel's `Documentation/filesystems/fiemap.rst`.
pub fn extents(path: &Path) -> io::Result<Extents> {
    let file = File::open(path)?;
    let allocated = file.metadata()?.blocks() * BLOCKS_UNIT;
    // Compressed extents have the length of what they hold, so there may be more of them than is allocated.
    let shared = shared_extents(&file)?.min(allocated);
    Ok(Extents { allocated, shared })
}

/// `FS_IOC_FIEMAP`, `_IOWR('f', 11, struct fiemap)`, of `linux/fs.h`.
const FS_IOC_FIEMAP: libc::Ioctl = 0xc020_660b;
/// No extent follows this one.
const FIEMAP_EXTENT_LAST: u32 = 0x1;
/// Other files have this extent, too.
const FIEMAP_EXTENT_SHARED: u32 = 0x2000;
/// How many extents one call tells: a disk of a VM has a few hundred, and 14 KiB are nothing.
const FIEMAP_BATCH: usize = 256;

/// `struct fiemap` of `linux/fiemap.h`, with its extents behind it.
#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [FiemapExtent; FIEMAP_BATCH],
}

/// `struct fiemap_extent` of `linux/fiemap.h`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct FiemapExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

fn shared_extents(file: &File) -> io::Result<u64> {
    let mut shared = 0;
    let mut start = 0;
    loop {
        let mut map = Fiemap {
            start,
            length: u64::MAX - start,
            flags: 0,
            mapped_extents: 0,
            extent_count: u32::try_from(FIEMAP_BATCH).unwrap_or(u32::MAX),
            reserved: 0,
            extents: [FiemapExtent::default(); FIEMAP_BATCH],
        };
        // SAFETY: the kernel writes at most `extent_count` extents behind the head, and `map` has room for them.
        if unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP, &raw mut map) } < 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::EOPNOTSUPP | libc::ENOTTY) => Ok(0),
                _ => Err(error),
            };
        }
        let found = map.mapped_extents.min(map.extent_count) as usize;
        let found = &map.extents[..found];
        shared += found
            .iter()
            .filter(|extent| extent.flags & FIEMAP_EXTENT_SHARED != 0)
            .map(|extent| extent.length)
            .sum::<u64>();
        match found.last() {
            Some(last) if last.flags & FIEMAP_EXTENT_LAST == 0 && last.logical + last.length > start => {
                start = last.logical + last.length;
            }
            _ => return Ok(shared),
        }
    }
}

fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::path::PathBuf;
    use std::process::Command;

    use super::*;
    use crate::clone::{CloneKind, clone_file};

    #[test]
    fn room_is_what_the_file_system_says() {
        let dir = tempfile::tempdir().unwrap();
        let room = room(dir.path()).unwrap();
        assert!(!room.read_only);
        assert_eq!(room.size, size(dir.path()).unwrap());
        assert!(room.free <= room.size && room.free_inodes != Some(0), "{room:?}");
        // The kernel's own files cannot be made by anybody, and nobody counts them.
        assert_eq!(super::room(Path::new("/proc")).unwrap().free_inodes, None);
    }

    #[test]
    fn usage_counts_blocks_and_hard_links_once() {
        let dir = tempfile::tempdir().unwrap();
        let sub = dir.path().join("sub");
        std::fs::create_dir(&sub).unwrap();
        let empty = disk_usage(dir.path()).unwrap();
        std::fs::write(sub.join("a"), vec![1; 1 << 20]).unwrap();
        std::fs::hard_link(sub.join("a"), sub.join("b")).unwrap();
        std::os::unix::fs::symlink("/", sub.join("link")).unwrap();
        std::fs::File::create(sub.join("hole"))
            .unwrap()
            .set_len(1 << 30)
            .unwrap();
        let grown = disk_usage(dir.path()).unwrap() - empty;
        assert!((1 << 20..2 << 20).contains(&grown), "{grown}");
        assert_eq!(disk_usage(&dir.path().join("none")).unwrap(), 0);
    }

    /// Says why a test is not run; `true` then.
    fn skip(reason: &str) -> bool {
        #[expect(clippy::print_stderr, reason = "a skipped test says so")]
        {
            eprintln!("SKIPPED: {reason}");
        }
        true
    }

    /// A file system of its own, gone with the value.
    struct Mounted(tempfile::TempDir);

    impl Mounted {
        fn xfs() -> Option<Self> {
            let missing = match Command::new("mkfs.xfs").arg("-V").output() {
                Err(_) => skip("needs mkfs.xfs"),
                Ok(_) if !rustix::process::geteuid().is_root() => skip("needs root"),
                Ok(_) => false,
            };
            if missing {
                return None;
            }
            let dir = tempfile::tempdir().unwrap();
            let (image, point) = (dir.path().join("image"), dir.path().join("mnt"));
            // mkfs.xfs refuses less than 300 MB; the file is sparse.
            File::create(&image).unwrap().set_len(320 << 20).unwrap();
            std::fs::create_dir(&point).unwrap();
            run(Command::new("mkfs.xfs")
                .args(["-q", "-m", "reflink=1"])
                .arg(&image));
            run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&point));
            Some(Self(dir))
        }

        fn point(&self) -> PathBuf {
            self.0.path().join("mnt")
        }
    }

    impl Drop for Mounted {
        fn drop(&mut self) {
            run(Command::new("umount").arg(self.point()));
        }
    }

    fn run(command: &mut Command) {
        let out = command.output().unwrap();
        assert!(
            out.status.success(),
            "{command:?}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
    }

    #[test]
    fn clones_share_until_one_side_writes() {
        let Some(mounted) = Mounted::xfs() else { return };
        let (one, two) = (mounted.point().join("one"), mounted.point().join("two"));
        let len = 4 << 20;
        std::fs::write(&one, vec![7; len]).unwrap();
        let len = len as u64;
        let alone = extents(&one).unwrap();
        assert!(alone.allocated >= len && alone.shared == 0, "{alone:?}");
        assert_eq!(clone_file(&one, &two).unwrap(), CloneKind::Reflink);
        for path in [&one, &two] {
            assert_eq!(extents(path).unwrap().shared, len, "{}", path.display());
        }
        // A block here and there, so that there are more extents than one call tells.
        let file = File::options().write(true).open(&two).unwrap();
        let blocks = (0..len).step_by(8192);
        let written = blocks.clone().count() as u64 * 4096;
        for at in blocks {
            file.write_all_at(&[8; 4096], at).unwrap();
        }
        file.sync_all().unwrap();
        assert_eq!(extents(&two).unwrap().shared, len - written);
        // XFS frees the blocks of a removed file later; those of a truncated one at once.
        file.set_len(0).unwrap();
        assert_eq!(extents(&one).unwrap().shared, 0);
    }

    #[test]
    fn what_is_not_shared_is_said_so_on_any_file_system() {
        for dir in [
            tempfile::tempdir().unwrap(),
            tempfile::tempdir_in("/dev/shm").unwrap(),
        ] {
            let path = dir.path().join("file");
            let file = File::create(&path).unwrap();
            file.set_len(64 << 20).unwrap();
            file.write_all_at(&[1; 1 << 20], 8 << 20).unwrap();
            let found = extents(&path).unwrap();
            assert!((1 << 20..2 << 20).contains(&found.allocated), "{found:?}");
            assert_eq!(found.shared, 0);
            assert_eq!(found.allocated, disk_usage(&path).unwrap());
        }
        assert!(extents(Path::new("/no/such/file")).is_err());
    }

    #[test]
    fn some_room_is_left() {
        let root = Path::new("/");
        assert!((1..size(root).unwrap()).contains(&available(root).unwrap()));
        assert!(available(Path::new("/no/such/path")).is_err());
        let room = room(root).unwrap();
        assert!(room.free > 0 && room.free_inodes != Some(0), "{room:?}");
    }
}
