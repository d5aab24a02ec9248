//! Seeds: pristine, sparse ext4 disks that are cloned and grown for each VM instead of being made each time.
//!
//! Making a file system takes tens of milliseconds and a process; cloning one takes one system call or copies 200 KiB.
//! The overlay disk of a VM comes from an empty seed in its base, its work disk from one with the image's `/root` in it.
//! A seed is grown by making the file longer: the agent grows ext4 to its disk when it mounts it.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use offshoot_model::{ByteSize, DEFAULT_DISK, Digest, ErrorKind, Explain};
use offshoot_sys::clone::{CloneKind, clone_file};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use crate::room::is_full;

/// The size that seeds mostly have: that of the disks of a VM that asks for nothing else, so that they need not grow.
pub const SEED_SIZE: ByteSize = DEFAULT_DISK;

/// How mke2fs is called, whatever the disk is for. Measured for what an empty disk takes: 184 KiB at 10 GiB.
///
/// - `meta_bg` instead of `resize_inode`: the file system can grow without limit, and reserves no blocks for that;
/// - tables are initialised by the kernel when it needs them (`lazy_*`), and nothing is discarded, as the file is new;
/// - 4 KiB blocks also where mke2fs would take smaller ones: the smallest journal is counted in blocks.
const MKE2FS_ARGUMENTS: [&str; 12] = [
    "-q",
    "-F",
    "-t",
    "ext4",
    "-b",
    "4096",
    "-m",
    "0",
    "-O",
    "^resize_inode,meta_bg",
    "-E",
    "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0",
];

/// The journal of a seed: there is one, since users' writes are kept in its clones, but a small one.
pub(crate) const SEED_JOURNAL: ByteSize = ByteSize::from_mib(4);
/// Blocks of every file system of ours.
const BLOCK: u64 = 4096;
/// How much is read at once to be hashed.
const HASH_STEP: usize = 256 << 10;

/// The most of a program's complaint that goes into an error.
const COMPLAINT_LIMIT: usize = 2000;

/// Why a seed cannot be made or cloned.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// A program is not there or cannot be started.
    #[error("cannot run {program}")]
    Spawn {
        /// Its name.
        program: &'static str,
        /// What came back.
        #[source]
        source: io::Error,
    },
    /// A program refused.
    #[error("cannot make an ext4 file system in {}: {program} says: {complaint}", path.display())]
    Refused {
        /// Its name.
        program: &'static str,
        /// The disk.
        path: PathBuf,
        /// What it said.
        complaint: String,
    },
    /// What should be on the disk does not fit.
    #[error("a disk of {size} is too small for what should be on it: that takes {needed}")]
    TooSmall {
        /// The size that was asked for.
        size: ByteSize,
        /// A size that is enough.
        needed: ByteSize,
    },
    /// The host's disk is full.
    #[error("cannot make an ext4 file system in {}: the host's disk is full", path.display())]
    Full {
        /// The disk of the VM.
        path: PathBuf,
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
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
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
            Self::Full { .. } => ErrorKind::NoSpace,
            Self::Io { source, .. } if is_full(source) => ErrorKind::NoSpace,
            Self::TooSmall { .. } => ErrorKind::InvalidRequest,
            Self::Refused { .. } | Self::Io { .. } => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        match (self, self.kind()) {
            (Self::Spawn { .. }, _) => vec!["install it: `apt install e2fsprogs`".into()],
            (Self::TooSmall { needed, .. }, _) => {
                vec![format!("ask for more: `--disk {needed}`, `--work {needed}`")]
            }
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
    /// Made by mke2fs, because it is smaller than the seed, or there is none.
    Made,
    /// Cloned from the seed, and made smaller by resize2fs.
    Shrunk(CloneKind),
    /// Made by mke2fs with the image's `/root`, because there is no seed.
    Built,
}

/// What an ext4 file system gets besides its size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ext4Plan<'a> {
    pub(crate) journal: ByteSize,
    /// The files it begins with.
    pub(crate) tree: Option<&'a Path>,
    /// How many inodes it has, where mke2fs's own choice is not enough.
    pub(crate) inodes: Option<u64>,
}

impl Ext4Plan<'_> {
    /// The file system of an empty seed.
    pub(crate) const EMPTY: Self = Self {
        journal: SEED_JOURNAL,
        tree: None,
        inodes: None,
    };
}

/// Makes an empty ext4 disk of `size` at `path`, which must not exist. Blocks the thread for some ten milliseconds.
///
/// Nothing is left behind on failure.
pub fn make_disk(path: &Path, size: ByteSize) -> Result<(), SeedError> {
    make_ext4(path, size, Ext4Plan::EMPTY, |_| Ok(()))
}

/// Makes an ext4 disk of `size` at `path`, which must not exist, and lets `finish` have it. Nothing is left on failure.
pub(crate) fn make_ext4(
    path: &Path,
    size: ByteSize,
    plan: Ext4Plan<'_>,
    finish: impl FnOnce(&Path) -> Result<(), SeedError>,
) -> Result<(), SeedError> {
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
            let mut mke2fs = program("mke2fs");
            mke2fs.args(MKE2FS_ARGUMENTS);
            mke2fs.args(["-J".to_owned(), format!("size={}", plan.journal.bytes() >> 20)]);
            if let Some(inodes) = plan.inodes {
                mke2fs.args(["-N".to_owned(), inodes.to_string()]);
            }
            if let Some(tree) = plan.tree {
                mke2fs.arg("-d").arg(tree);
            }
            mke2fs.arg("--").arg(path);
            run(mke2fs, "mke2fs", path)
        })
        .and_then(|()| finish(path));
    made.inspect_err(|_| {
        // It failed; that its remains cannot be removed either adds nothing to that error.
        let _ = std::fs::remove_file(path);
    })
}

/// Runs a program that makes or changes the disk at `path`.
fn run(mut command: Command, program: &'static str, path: &Path) -> Result<(), SeedError> {
    let output = command
        .output()
        .map_err(|source| SeedError::Spawn { program, source })?;
    if output.status.success() {
        return Ok(());
    }
    let said = &output.stderr[..output.stderr.len().min(COMPLAINT_LIMIT)];
    Err(complained(
        program,
        path,
        match String::from_utf8_lossy(said).trim() {
            "" => output.status.to_string(),
            said => said.to_owned(),
        },
    ))
}

/// What a program's complaint means.
pub(crate) fn complained(program: &'static str, path: &Path, complaint: String) -> SeedError {
    let path = path.to_owned();
    if complaint.contains("No space left on device") || complaint.contains("Disk quota exceeded") {
        return SeedError::Full { path };
    }
    SeedError::Refused {
        program,
        path,
        complaint,
    }
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

/// As [`clone_seed`], for a seed with something in it: where the disk is smaller than the seed, the clone is made smaller,
/// which takes some 50 ms and writes the journal anew (4 MiB).
pub fn clone_work_seed(seed: &Path, dst: &Path, size: ByteSize) -> Result<DiskOrigin, SeedError> {
    let seed_size = std::fs::metadata(seed)
        .map_err(SeedError::io("look at", seed))?
        .len();
    if size.bytes() >= seed_size {
        return clone_seed(seed, dst, size);
    }
    let kind = clone_file(seed, dst).map_err(SeedError::io("clone the seed to", dst))?;
    let shrink = || {
        let mut resize2fs = program("resize2fs");
        resize2fs
            .arg("-f")
            .arg(dst)
            .arg(format!("{}K", size.bytes() >> 10));
        run(resize2fs, "resize2fs", dst)?;
        let file = std::fs::OpenOptions::new().write(true).open(dst);
        file.and_then(|file| file.set_len(size.bytes()))
            .map_err(SeedError::io("set the size of", dst))
    };
    shrink().inspect_err(|_| {
        // As above: the first error is the one that counts.
        let _ = std::fs::remove_file(dst);
    })?;
    Ok(DiskOrigin::Shrunk(kind))
}

/// The SHA-256 of a disk by its content: of its length in bytes, and of each block of 4 KiB that is not all zeros, after
/// the block's number; numbers in 64 bits, little-endian. Where the file has holes makes no difference, and a disk of
/// 10 GiB with 200 KiB in it is hashed in a millisecond. `None` if `go_on` says to stop.
pub(crate) fn hash_blocks(file: &File, go_on: &mut dyn FnMut() -> bool) -> io::Result<Option<Digest>> {
    let len = file.metadata()?.len();
    let mut hasher = Sha256::new();
    hasher.update(len.to_le_bytes());
    let mut buffer = vec![0; HASH_STEP];
    let mut at = 0;
    while at < len {
        at = match seek(file, SeekFrom::Data(at)) {
            // Data begins where the file system says, blocks where we say.
            Ok(start) => start / BLOCK * BLOCK,
            Err(Errno::NXIO) => break,
            // A file system without holes: all of it is data.
            Err(Errno::INVAL) => at,
            Err(errno) => return Err(errno.into()),
        };
        let end = seek(file, SeekFrom::Hole(at))
            .unwrap_or(len)
            .next_multiple_of(BLOCK)
            .min(len);
        while at < end {
            if !go_on() {
                return Ok(None);
            }
            let want = usize::try_from(end - at).map_or(HASH_STEP, |left| left.min(HASH_STEP));
            file.read_exact_at(&mut buffer[..want], at)?;
            for (n, block) in buffer[..want].chunks(BLOCK as usize).enumerate() {
                if block.iter().any(|byte| *byte != 0) {
                    hasher.update((at / BLOCK + n as u64).to_le_bytes());
                    hasher.update(block);
                }
            }
            at += want as u64;
        }
    }
    Ok(Some(Digest::from_bytes(hasher.finalize().into())))
}

/// The version of mke2fs, as it says it: `1.47.0`.
pub fn mke2fs_version() -> Result<String, SeedError> {
    let output = program("mke2fs")
        .arg("-V")
        .output()
        .map_err(|source| SeedError::Spawn {
            program: "mke2fs",
            source,
        })?;
    // `mke2fs 1.47.0 (5-Feb-2023)` on standard error.
    let said = String::from_utf8_lossy(&output.stderr);
    Ok(said.split_whitespace().nth(1).unwrap_or("unknown").to_owned())
}

/// A program of e2fsprogs, to be given its arguments.
pub(crate) fn program(name: &str) -> Command {
    let mut command = Command::new(name);
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
    fn a_hash_is_that_of_the_content_and_not_of_the_holes() {
        let dir = tempfile::tempdir().unwrap();
        let hash = |name: &str, len: u64, pieces: &[(u64, &[u8])]| {
            let path = dir.path().join(name);
            let file = File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(path)
                .unwrap();
            file.set_len(len).unwrap();
            for (at, bytes) in pieces {
                file.write_all_at(bytes, *at).unwrap();
            }
            hash_blocks(&file, &mut || true).unwrap().unwrap()
        };
        let one = hash("one", 1 << 30, &[(5, b"x"), (9 << 20, b"y")]);
        assert_eq!(
            one,
            hash("two", 1 << 30, &[(0, &[0; 70_000]), (5, b"x"), (9 << 20, b"y")])
        );
        for (name, len, pieces) in [
            ("longer", (1 << 30) + 1, &[(5, &b"x"[..]), (9 << 20, b"y")]),
            ("elsewhere", 1 << 30, &[(5, b"x"), ((9 << 20) + 4096, b"y")]),
            ("other", 1 << 30, &[(5, b"x"), (9 << 20, b"z")]),
        ] {
            assert_ne!(one, hash(name, len, pieces), "{name}");
        }
        // An odd end is part of the last block.
        let mut expected = Sha256::new();
        expected.update(5000_u64.to_le_bytes());
        expected.update(1_u64.to_le_bytes());
        expected.update([[0; 903].as_slice(), b"e"].concat());
        assert_eq!(
            hash("odd", 5000, &[(4999, b"e")]),
            Digest::from_bytes(expected.finalize().into())
        );
    }

    #[test]
    fn a_failure_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        assert!(matches!(
            make_disk(&disk, ByteSize::from_bytes(4096)),
            Err(SeedError::Refused { .. })
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
