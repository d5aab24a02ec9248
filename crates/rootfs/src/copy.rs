//! Whole trees on an ext4 disk of their own: private roots for guests that cannot use overlayfs, and the seeds of work disks.
//!
//! `mke2fs -d` fills the new file system without mounting it. What it does not copy of e2fsprogs 1.47.0 is the mode, owner
//! and time of the top folder, which debugfs sets afterwards, and parts of seconds. The folder `lost+found`, which every new
//! ext4 has, goes where the tree has none: e2fsck makes one when it needs it.

use std::collections::HashSet;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Stdio;

use offshoot_model::ByteSize;

use crate::room::{Room, SpaceGuard};
use crate::seed::{Ext4Plan, SeedError, complained, make_ext4, program};

/// The size of an inode on ext4.
const INODE: u64 = 256;
/// mke2fs makes an inode for so many bytes, unless it is told a number.
const BYTES_PER_INODE: u64 = 16 << 10;
/// The journal of a root: the smallest, and what mke2fs gives to disks of common size.
const JOURNAL_MIN: u64 = 4 << 20;
const JOURNAL_MAX: u64 = 64 << 20;
/// What a tree of no size needs besides: superblocks, bitmaps, group descriptors.
const FIXED: u64 = 4 << 20;

/// What a tree takes on ext4.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TreeSize {
    /// Bytes in blocks, holes left out.
    pub(crate) bytes: u64,
    /// Files of all sorts, each once.
    pub(crate) inodes: u64,
}

impl TreeSize {
    /// Adds up the tree in the folder `tree`.
    pub(crate) fn of(tree: &Path) -> io::Result<Self> {
        let mut size = Self::default();
        let mut linked = HashSet::new();
        let mut pending = vec![tree.to_path_buf()];
        while let Some(path) = pending.pop() {
            let metadata = std::fs::symlink_metadata(&path)?;
            if metadata.is_dir() {
                for entry in std::fs::read_dir(&path)? {
                    pending.push(entry?.path());
                }
            } else if metadata.nlink() > 1 && !linked.insert((metadata.dev(), metadata.ino())) {
                continue;
            }
            size.inodes += 1;
            // Not all file systems give a folder's blocks, and none another's.
            let blocks = if metadata.is_dir() {
                metadata.len().max(1)
            } else {
                (metadata.blocks() * 512).min(metadata.len())
            };
            size.bytes += blocks.next_multiple_of(4096);
        }
        Ok(size)
    }

    /// How many inodes a disk of `size` should have, where mke2fs would make too few: half as many again are free.
    fn inodes_on(&self, size: ByteSize) -> Option<u64> {
        let wanted = self.inodes + self.inodes / 2 + 1024;
        (size.bytes() / BYTES_PER_INODE < wanted).then_some(wanted)
    }

    /// A size of disk that holds the tree with a journal of `journal` bytes and some room to spare.
    pub(crate) fn needed(&self, journal: u64) -> ByteSize {
        let wanted = self.inodes + self.inodes / 2 + 1024;
        let content = self.bytes + journal + FIXED + wanted * INODE;
        // Bitmaps, extents, and the inodes that mke2fs makes of itself: a sixty-fourth, and as much in reserve.
        ByteSize::from_bytes((content + content / 32).next_multiple_of(1 << 20))
    }
}

/// The journal of a root of this size.
fn journal(size: ByteSize) -> u64 {
    (size.bytes() / 64).clamp(JOURNAL_MIN, JOURNAL_MAX) >> 20 << 20
}

/// Makes `dst`, which must not exist, an ext4 disk of `size` with all of the tree in the folder `tree`: owners, modes,
/// attributes, links, devices, holes; times in whole seconds. Blocks the thread for about a second for 200 MB; needs root.
///
/// Nothing is left behind on failure. A disk that is too small is [`SeedError::TooSmall`], which says what is enough; a full
/// host disk is an error of kind [`NoSpace`](offshoot_model::ErrorKind::NoSpace), and found before anything is written.
pub fn make_copy(tree: &Path, dst: &Path, size: ByteSize) -> Result<(), SeedError> {
    let taken = TreeSize::of(tree).map_err(SeedError::io("measure", tree))?;
    let folder = dst.parent().unwrap_or(Path::new("/"));
    SpaceGuard::of_disk(folder)
        .and_then(|guard| Room::new(folder, guard).take(taken.bytes + taken.inodes * INODE))
        .map_err(SeedError::io("make room for", dst))?;
    make_filled(tree, taken, dst, size, ByteSize::from_bytes(journal(size)))
}

/// Makes `dst` a disk with the tree in it; see [`make_copy`].
pub(crate) fn make_filled(
    tree: &Path,
    taken: TreeSize,
    dst: &Path,
    size: ByteSize,
    journal: ByteSize,
) -> Result<(), SeedError> {
    let too_small = || SeedError::TooSmall {
        size,
        needed: taken.needed(journal.bytes()),
    };
    let least = taken.bytes + journal.bytes() + taken.inodes * INODE;
    if size.bytes() < least {
        return Err(too_small());
    }
    let plan = Ext4Plan {
        journal,
        tree: Some(tree),
        inodes: taken.inodes_on(size),
    };
    make_ext4(dst, size, plan, |disk| describe_root(tree, disk)).map_err(|error| match error {
        // What libext2fs says when blocks or inodes run out, and when there is no room for the journal.
        SeedError::Refused { complaint, .. }
            if complaint.contains("Could not allocate") || complaint.contains("too big") =>
        {
            too_small()
        }
        error => error,
    })
}

/// Gives the top folder of a disk what the folder `tree` has.
fn describe_root(tree: &Path, disk: &Path) -> Result<(), SeedError> {
    let metadata = std::fs::symlink_metadata(tree).map_err(SeedError::io("look at", tree))?;
    let mut commands = format!(
        "sif <2> mode 0{:o}\nsif <2> uid {}\nsif <2> gid {}\n",
        metadata.mode(),
        metadata.uid(),
        metadata.gid()
    );
    if let Ok(seconds) = u32::try_from(metadata.mtime()) {
        commands += &format!("sif <2> mtime @{seconds}\nsif <2> mtime_extra 0\n");
    }
    match std::fs::symlink_metadata(tree.join("lost+found")) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => commands += "rmdir lost+found\n",
        Err(error) => return Err(SeedError::io("look at", tree)(error)),
    }
    let spawn = |source| SeedError::Spawn {
        program: "debugfs",
        source,
    };
    let mut child = program("debugfs")
        .args(["-w", "-f", "-"])
        .arg(disk)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(spawn)?;
    // A few hundred bytes, which the pipe takes at once; it is closed before the end is waited for.
    let told = child
        .stdin
        .take()
        .map_or(Ok(()), |mut stdin| stdin.write_all(commands.as_bytes()));
    let output = child.wait_with_output().map_err(spawn)?;
    told.map_err(spawn)?;
    // It succeeds whatever happens, but says its version and nothing else when all is well.
    let said = String::from_utf8_lossy(&output.stderr);
    let complaint: Vec<&str> = said
        .lines()
        .filter(|line| !line.starts_with("debugfs 1.") && !line.is_empty())
        .collect();
    if complaint.is_empty() && output.status.success() {
        return Ok(());
    }
    Err(complained("debugfs", disk, complaint.join("; ")))
}
