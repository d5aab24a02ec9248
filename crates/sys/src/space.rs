//! How much room a file system has, and how much a tree takes.

use std::collections::HashSet;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

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

/// The bytes that `path` and everything below it take on disk: allocated blocks, not sizes, and each file with
/// several names once. Symbolic links are not followed; what vanishes meanwhile is not counted.
pub fn disk_usage(path: &Path) -> io::Result<u64> {
    // `st_blocks` counts 512-byte units on Linux, whatever the file system's own block is (stat(2)).
    const UNIT: u64 = 512;
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
        total += metadata.blocks() * UNIT;
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

fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn some_room_is_left() {
        let root = Path::new("/");
        assert!((1..size(root).unwrap()).contains(&available(root).unwrap()));
        assert!(available(Path::new("/no/such/path")).is_err());
    }
}
