//! Seeds: pristine, sparse ext4 disks that are cloned and grown for each VM instead of being made each time.
//!
//! Making a file system takes tens of milliseconds and a process; cloning one takes one system call or copies 200 KiB.
//! The overlay disk of a VM comes from the seed in its base; a work disk is made and cloned by the same two functions.
//! A seed is grown by making the file longer: the agent grows ext4 to its disk when it mounts it.

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use offshoot_model::{ByteSize, ErrorKind, Explain};
use offshoot_sys::clone::{CloneKind, clone_file};

/// The size of the seed in a base: the size that most disks are asked to have, so that they need not grow.
pub const SEED_SIZE: ByteSize = ByteSize::from_mib(10 << 10);

/// How mke2fs is called for a seed of `root_owner=0:0`. Measured for what an empty disk takes: 184 KiB at 10 GiB.
///
/// - a journal, since users' writes are kept here, but a small one;
/// - `meta_bg` instead of `resize_inode`: the file system can grow without limit, and reserves no blocks for that;
/// - tables are initialised by the kernel when it needs them (`lazy_*`), and nothing is discarded, as the file is new;
/// - 4 KiB blocks also where mke2fs would take smaller ones: the smallest journal is counted in blocks.
const MKE2FS_ARGUMENTS: [&str; 14] = [
    "-q",
    "-F",
    "-t",
    "ext4",
    "-b",
    "4096",
    "-m",
    "0",
    "-J",
    "size=4",
    "-O",
    "^resize_inode,meta_bg",
    "-E",
    "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0",
];

/// The most of mke2fs's complaint that goes into an error.
const COMPLAINT_LIMIT: usize = 2000;

/// Why a seed cannot be made or cloned.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// mke2fs is not there or cannot be started.
    #[error("cannot run mke2fs")]
    Spawn {
        /// What came back.
        #[source]
        source: io::Error,
    },
    /// mke2fs refused.
    #[error("cannot make an ext4 file system in {}: {complaint}", path.display())]
    Mke2fs {
        /// The disk.
        path: PathBuf,
        /// What it said.
        complaint: String,
    },
    /// The operating system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// What came back.
        #[source]
        source: io::Error,
    },
}

impl SeedError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

impl Explain for SeedError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Spawn { .. } => ErrorKind::NotPossible,
            Self::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => ErrorKind::NoSpace,
            Self::Mke2fs { .. } | Self::Io { .. } => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        match (self, self.kind()) {
            (Self::Spawn { .. }, _) => vec!["install it: `apt install e2fsprogs`".into()],
            (_, ErrorKind::NoSpace) => vec!["make room with `offshoot rm` and `offshoot image rm`".into()],
            _ => Vec::new(),
        }
    }
}

/// Where a disk came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskOrigin {
    /// Cloned from the seed.
    Cloned(CloneKind),
    /// Made by mke2fs, because it is smaller than the seed.
    Made,
}

/// Makes an empty ext4 disk of `size` at `path`, which must not exist. Blocks the thread for some ten milliseconds.
///
/// Nothing is left behind on failure.
pub fn make_disk(path: &Path, size: ByteSize) -> Result<(), SeedError> {
    let file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(SeedError::io("create", path))?;
    let made = file
        .set_len(size.bytes())
        .map_err(SeedError::io("set the size of", path))
        .and_then(|()| {
            let output = mke2fs()
                .args(MKE2FS_ARGUMENTS)
                .arg("--")
                .arg(path)
                .output()
                .map_err(|source| SeedError::Spawn { source })?;
            if output.status.success() {
                return Ok(());
            }
            let said = &output.stderr[..output.stderr.len().min(COMPLAINT_LIMIT)];
            let complaint = match String::from_utf8_lossy(said).trim() {
                "" => output.status.to_string(),
                said => said.to_owned(),
            };
            Err(SeedError::Mke2fs {
                path: path.to_owned(),
                complaint,
            })
        });
    made.inspect_err(|_| {
        // It failed; that its remains cannot be removed either adds nothing to that error.
        let _ = std::fs::remove_file(path);
    })
}

/// Makes `dst`, which must not exist, a pristine disk of `size`: a clone of `seed`, longer where that is needed, or made
/// anew where it is smaller. Nothing is left behind on failure.
pub fn clone_seed(seed: &Path, dst: &Path, size: ByteSize) -> Result<DiskOrigin, SeedError> {
    let seed_size = std::fs::metadata(seed)
        .map_err(SeedError::io("look at", seed))?
        .len();
    if size.bytes() < seed_size {
        make_disk(dst, size)?;
        return Ok(DiskOrigin::Made);
    }
    let kind = clone_file(seed, dst).map_err(SeedError::io("clone the seed to", dst))?;
    if size.bytes() > seed_size {
        let grown = std::fs::OpenOptions::new()
            .write(true)
            .open(dst)
            .and_then(|file| file.set_len(size.bytes()));
        grown.map_err(|source| {
            // As above: the first error is the one that counts.
            let _ = std::fs::remove_file(dst);
            SeedError::io("set the size of", dst)(source)
        })?;
    }
    Ok(DiskOrigin::Cloned(kind))
}

/// The version of mke2fs, as it says it: `1.47.0`.
pub fn mke2fs_version() -> Result<String, SeedError> {
    let output = mke2fs()
        .arg("-V")
        .output()
        .map_err(|source| SeedError::Spawn { source })?;
    // `mke2fs 1.47.0 (5-Feb-2023)` on standard error.
    let said = String::from_utf8_lossy(&output.stderr);
    Ok(said.split_whitespace().nth(1).unwrap_or("unknown").to_owned())
}

fn mke2fs() -> Command {
    let mut command = Command::new("mke2fs");
    // The file system tools are where not every account looks.
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(OsString::from(":/usr/sbin:/sbin"));
    command.env("PATH", path).env("LC_ALL", "C").stdin(Stdio::null());
    command
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use offshoot_sys::space::disk_usage;

    use super::*;

    fn fsck(disk: &Path) {
        let output = Command::new("/sbin/e2fsck")
            .args(["-f", "-n"])
            .arg(disk)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stdout)
        );
    }

    #[test]
    fn a_seed_is_small_and_its_clones_are_sound() {
        let dir = tempfile::tempdir().unwrap();
        let seed = dir.path().join("seed.ext4");
        make_disk(&seed, SEED_SIZE).unwrap();
        assert!(
            disk_usage(&seed).unwrap() < 512 << 10,
            "{} bytes",
            disk_usage(&seed).unwrap()
        );
        fsck(&seed);
        let check = |name: &str, mib: u64, cloned: bool| {
            let disk = dir.path().join(name);
            let origin = clone_seed(&seed, &disk, ByteSize::from_mib(mib)).unwrap();
            assert_eq!(matches!(origin, DiskOrigin::Cloned(_)), cloned, "{name}");
            let metadata = std::fs::metadata(&disk).unwrap();
            assert_eq!((metadata.len(), metadata.mode() & 0o777), (mib << 20, 0o600));
            assert!(
                metadata.blocks() * 512 < 1 << 20,
                "{name} takes {} bytes",
                metadata.blocks() * 512
            );
            fsck(&disk);
        };
        check("same", 10 << 10, true);
        check("larger", 100 << 10, true);
        check("smaller", 1 << 10, false);
        check("smallest", 64, false);
    }

    #[test]
    fn a_failure_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        assert!(matches!(
            make_disk(&disk, ByteSize::from_bytes(4096)),
            Err(SeedError::Mke2fs { .. })
        ));
        assert!(matches!(
            clone_seed(Path::new("/no/seed"), &disk, SEED_SIZE),
            Err(SeedError::Io { .. })
        ));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        std::fs::write(&disk, "mine").unwrap();
        assert!(matches!(make_disk(&disk, SEED_SIZE), Err(SeedError::Io { .. })));
        assert_eq!(std::fs::read(&disk).unwrap(), b"mine");
    }
}
