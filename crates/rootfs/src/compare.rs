//! Whether a tree on disk is what an image says, name by name and byte by byte.
//!
//! Where a file system cannot keep what the image says, or Linux shows it otherwise, the tree is not called different: times
//! that do not fit into 32 bits, `user` attributes of links and devices, and permissions that an access control list stands
//! for. Access and change times, and where files have holes, are nobody's concern.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use offshoot_model::{ErrorKind, Explain};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, SeekFrom, Stat, lgetxattr, llistxattr, makedev, openat,
    readlinkat, seek, statat,
};
use rustix::io::Errno;

use crate::erofs::{ErofsImage, ErofsReadError, Inode, InodeKind, Step};
use crate::unpack::{open_below, open_dir, owner, proc_path, takes_xattr};

/// How much is read at once from either side.
const READ_STEP: usize = 256 << 10;
/// The most that the names of attributes take, and the most that a value does (xattr(7)).
const XATTR_LIST_MAX: usize = 64 << 10;
/// Whose attributes come and go by themselves: security modules label what they like.
const LABELS: [&[u8]; 4] = [
    b"security.selinux",
    b"security.ima",
    b"security.evm",
    b"security.SMACK64",
];

/// Why a tree is not, or may not be, what the image says.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// The image cannot be read.
    #[error("cannot compare with the image")]
    Image {
        /// What is wrong with it.
        #[source]
        source: ErofsReadError,
    },
    /// The tree cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file, within the tree.
        path: PathBuf,
        /// What came back.
        #[source]
        source: io::Error,
    },
    /// Something in it is different.
    #[error("`{}` has changed: {what}", path.display())]
    Differs {
        /// The file, within the tree; empty for its root.
        path: PathBuf,
        /// What is different.
        what: &'static str,
    },
}

impl From<ErofsReadError> for CompareError {
    fn from(source: ErofsReadError) -> Self {
        Self::Image { source }
    }
}

impl Explain for CompareError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Image { source } => source.kind(),
            Self::Read { .. } => ErrorKind::Internal,
            Self::Differs { .. } => ErrorKind::BadContent,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Image { source } => source.hints(),
            Self::Read { .. } | Self::Differs { .. } => Vec::new(),
        }
    }
}

/// Compares all of the tree in the folder `tree` with the image; gives the bytes of files that were compared. Blocks the
/// thread; needs root. Stops at the first difference.
pub fn compare(image: &ErofsImage, tree: &Path) -> Result<u64, CompareError> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = openat(CWD, tree, flags, Mode::empty()).map_err(|errno| CompareError::Read {
        path: tree.to_owned(),
        source: errno.into(),
    })?;
    let mut comparison = Comparison {
        image,
        root,
        current: None,
        linked: HashMap::new(),
        bytes: 0,
    };
    for step in image.walk()? {
        match step? {
            Step::Enter { .. } => {}
            Step::Entry { path, inode, first } => comparison.entry(&path, &inode, first.is_some())?,
            Step::Leave { path, dir, names } => comparison.folder(&path, &dir, names)?,
        }
    }
    Ok(comparison.bytes)
}

struct Comparison<'a> {
    image: &'a ErofsImage,
    root: OwnedFd,
    /// The folder that was last opened.
    current: Option<(PathBuf, OwnedFd)>,
    /// The file on disk of each inode with several names.
    linked: HashMap<u64, (u64, u64)>,
    bytes: u64,
}

impl Comparison<'_> {
    /// Compares a folder itself, when all that the image has in it was found: then as many names are the same names.
    fn folder(&mut self, path: &Path, dir: &Inode, names: usize) -> Result<(), CompareError> {
        let handle = self.open(path)?;
        let stat = statat(handle, "", AtFlags::EMPTY_PATH).map_err(|errno| unreadable(path, errno))?;
        let found = Dir::read_from(handle)
            .and_then(|mut entries| {
                entries.try_fold(0, |count, entry| {
                    let own = matches!(entry?.file_name().to_bytes(), b"." | b"..");
                    Ok(count + usize::from(!own))
                })
            })
            .map_err(|errno| unreadable(path, errno))?;
        if found != names {
            return Err(differs(path, "it has more names"));
        }
        described(path, dir, &stat)?;
        attributes(handle, Path::new("."), path, dir)
    }

    fn entry(&mut self, path: &Path, inode: &Inode, linked: bool) -> Result<(), CompareError> {
        let name = Path::new(path.file_name().unwrap_or_default());
        let parent = self.open(path.parent().unwrap_or(Path::new("")))?;
        let stat = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Err(differs(path, "it is gone")),
            Err(errno) => return Err(unreadable(path, errno)),
        };
        described(path, inode, &stat)?;
        if u64::from(inode.links) != stat.st_nlink {
            return Err(differs(path, "it has another number of names"));
        }
        if inode.links > 1 {
            let file = (stat.st_dev, stat.st_ino);
            if *self.linked.entry(inode.nid).or_insert(file) != file {
                return Err(differs(path, "it is another file than under its other name"));
            }
        }
        if linked {
            return Ok(());
        }
        let parent = self.open(path.parent().unwrap_or(Path::new("")))?;
        attributes(parent, name, path, inode)?;
        match inode.kind {
            InodeKind::Symlink => {
                let target = readlinkat(parent, name, Vec::new()).map_err(|errno| unreadable(path, errno))?;
                if target.as_bytes() != self.image.read_link(inode)? {
                    return Err(differs(path, "it leads elsewhere"));
                }
                Ok(())
            }
            InodeKind::File => {
                let file =
                    open_below(parent, name, OFlags::NONBLOCK).map_err(|source| CompareError::Read {
                        path: path.to_owned(),
                        source,
                    })?;
                self.bytes += inode.size;
                content(self.image, inode, &file.into(), path)
            }
            _ => Ok(()),
        }
    }

    fn open(&mut self, path: &Path) -> Result<BorrowedFd<'_>, CompareError> {
        if self.current.as_ref().is_none_or(|(open, _)| open != path) {
            let handle = match open_dir(self.root.as_fd(), path) {
                Ok(handle) => handle,
                Err(error) => return Err(no_folder(path, error)),
            };
            self.current = Some((path.to_owned(), handle));
        }
        let Some((_, handle)) = &self.current else {
            unreachable!("it was just opened")
        };
        Ok(handle.as_fd())
    }
}

fn no_folder(path: &Path, source: io::Error) -> CompareError {
    match Errno::from_io_error(&source) {
        Some(Errno::NOENT) => differs(path, "it is gone"),
        Some(Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => differs(path, "it is no folder any more"),
        _ => CompareError::Read {
            path: path.to_owned(),
            source,
        },
    }
}

fn differs(path: &Path, what: &'static str) -> CompareError {
    CompareError::Differs {
        path: path.to_owned(),
        what,
    }
}

fn unreadable(path: &Path, errno: Errno) -> CompareError {
    CompareError::Read {
        path: path.to_owned(),
        source: errno.into(),
    }
}

fn has_acl(inode: &Inode) -> bool {
    let xattrs = inode.metadata.xattrs.as_deref();
    xattrs.is_some_and(|xattrs| xattrs.contains_key(&b"system.posix_acl_access"[..]))
}

/// Compares what `stat` shows.
fn described(path: &Path, inode: &Inode, stat: &Stat) -> Result<(), CompareError> {
    let kind = match inode.kind {
        InodeKind::Dir => FileType::Directory,
        InodeKind::File => FileType::RegularFile,
        InodeKind::Symlink => FileType::Symlink,
        InodeKind::CharDev { .. } => FileType::CharacterDevice,
        InodeKind::BlockDev { .. } => FileType::BlockDevice,
        InodeKind::Fifo => FileType::Fifo,
    };
    if FileType::from_raw_mode(stat.st_mode) != kind {
        return Err(differs(path, "it is something else"));
    }
    let metadata = &inode.metadata;
    // The group's bits are the list's mask there.
    let bits = if has_acl(inode) { 0o7707 } else { 0o7777 };
    if (stat.st_mode ^ u32::from(metadata.mode)) & bits != 0 && kind != FileType::Symlink {
        return Err(differs(path, "its mode"));
    }
    if (stat.st_uid, stat.st_gid) != (owner(metadata.uid), owner(metadata.gid)) {
        return Err(differs(path, "its owner"));
    }
    let time = (metadata.mtime.seconds, i64::from(metadata.mtime.nanos));
    // Nanoseconds have another type on other machines, and never more than 30 bits.
    let found = (stat.st_mtime, stat.st_mtime_nsec as i64);
    if i32::try_from(time.0).is_ok() && time != found {
        return Err(differs(path, "its time"));
    }
    if let InodeKind::CharDev { major, minor } | InodeKind::BlockDev { major, minor } = inode.kind
        && stat.st_rdev != makedev(major, minor)
    {
        return Err(differs(path, "its device number"));
    }
    let sized = matches!(inode.kind, InodeKind::File | InodeKind::Symlink);
    if sized && u64::try_from(stat.st_size) != Ok(inode.size) {
        return Err(differs(path, "its size"));
    }
    Ok(())
}

fn attributes(dir: BorrowedFd<'_>, name: &Path, path: &Path, inode: &Inode) -> Result<(), CompareError> {
    let full = proc_path(dir, name);
    let mut names = vec![0; XATTR_LIST_MAX];
    let len = match llistxattr(&full, &mut names[..]) {
        Ok(len) => len,
        Err(Errno::OPNOTSUPP) => 0,
        Err(errno) => return Err(unreadable(path, errno)),
    };
    let xattrs = inode.metadata.xattrs.as_deref();
    for found in names[..len]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        let ours = [&b"user."[..], b"trusted.", b"security.", b"system.posix_acl_"]
            .iter()
            .any(|prefix| found.starts_with(prefix));
        let known = xattrs.is_some_and(|xattrs| xattrs.contains_key(found));
        if ours && !known && !LABELS.contains(&found) {
            return Err(differs(path, "it has another attribute"));
        }
    }
    let mut place = Vec::new();
    for (attribute, value) in xattrs.into_iter().flatten() {
        if !takes_xattr(inode.kind, attribute) {
            continue;
        }
        place.resize(XATTR_LIST_MAX, 0);
        match lgetxattr(&full, &**attribute, &mut place[..]) {
            Ok(len) if place[..len] == **value => {}
            // A list that says no more than the mode is kept as the mode.
            Err(Errno::NODATA) if attribute.starts_with(b"system.posix_acl_") => {}
            Ok(_) | Err(Errno::NODATA) => return Err(differs(path, "one of its attributes")),
            Err(errno) => return Err(unreadable(path, errno)),
        }
    }
    Ok(())
}

/// The next range of a file, from `at` on, that is no hole.
fn next_data(file: &File, at: u64, size: u64) -> io::Result<Option<Range<u64>>> {
    match seek(file, SeekFrom::Data(at)) {
        Ok(start) if start < size => {
            let end = seek(file, SeekFrom::Hole(start))?.clamp(start, size);
            Ok(Some(start..end))
        }
        Ok(_) | Err(Errno::NXIO) => Ok(None),
        Err(Errno::INVAL) => Ok((at < size).then_some(at..size)),
        Err(errno) => Err(errno.into()),
    }
}

/// Compares content wherever one side has no hole.
fn content(image: &ErofsImage, inode: &Inode, file: &File, path: &Path) -> Result<(), CompareError> {
    let read = |source| CompareError::Read {
        path: path.to_owned(),
        source,
    };
    let step = usize::try_from(inode.size).map_or(READ_STEP, |size| size.min(READ_STEP));
    let (mut ours, mut theirs) = (vec![0; step], vec![0; step]);
    let mut at = 0;
    loop {
        let extents = [
            image.next_extent(inode, at)?,
            next_data(file, at, inode.size).map_err(read)?,
        ];
        let Some(extent) = extents.into_iter().flatten().min_by_key(|extent| extent.start) else {
            return Ok(());
        };
        at = extent.start;
        while at < extent.end {
            let want = usize::try_from(extent.end - at).map_or(step, |left| left.min(step));
            image.read_at(inode, &mut ours[..want], at)?;
            file.read_exact_at(&mut theirs[..want], at).map_err(read)?;
            if ours[..want] != theirs[..want] {
                return Err(differs(path, "its content"));
            }
            at += want as u64;
        }
    }
}
