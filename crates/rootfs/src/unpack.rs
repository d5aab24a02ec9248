//! The tree of an image as files on disk, with all that the image says about them.
//!
//! ```text
//! walk ─┬─► folders, links, devices, pipes          one thread, which makes every name
//!       └─► open files ─► content, owner, mode …    two threads, which see no names
//! ```
//!
//! Names are made below a handle of the folder they are in, and a folder is only opened without following links
//! (`openat2`, `RESOLVE_NO_SYMLINKS`), so that whatever an image holds, nothing is written beside its tree. A folder gets its
//! own owner, mode, time and attributes when it is finished: what is made in it would change them, and they what is made.
//! Nothing is synced.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;

use offshoot_image::layer::Metadata;
use offshoot_model::{ErrorKind, Explain};
use offshoot_sys::clone::copy_range;
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, Uid,
    XattrFlags, chmodat, chownat, fchmod, fchown, fsetxattr, futimens, linkat, lsetxattr, makedev, mkdirat,
    mknodat, openat, openat2, symlinkat, utimensat,
};

use crate::erofs::{ErofsImage, ErofsReadError, Inode, InodeKind, Step};
use crate::room::{Room, SpaceGuard, is_full};

/// How many threads write content: as many as keep one disk busy.
const WRITERS: usize = 2;
/// Files that are open and wait for a writer.
const QUEUE: usize = 64;
/// How much is copied between two looks at whether somebody still wants it.
const COPY_STEP: u64 = 8 << 20;
/// What a name is taken to cost on disk: a block for its inode and whatever it has beside its content.
const NAME_COST: u64 = 4096;
/// How many entries are made between two words of progress.
const REPORT_EVERY: u64 = 256;
/// Attributes up to this size fit on every file system; a larger one may be refused as if the disk were full.
const SMALL_XATTRS: usize = 1024;

/// Why a tree cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The image cannot be read.
    #[error("cannot unpack the image")]
    Image {
        /// What is wrong with it.
        #[source]
        source: ErofsReadError,
    },
    /// The file system does not take an attribute.
    #[error("cannot store the attribute `{name}` of `{}`", path.display())]
    Xattr {
        /// The file, within the tree.
        path: PathBuf,
        /// The attribute.
        name: String,
        /// The bytes of all attributes of that file.
        size: usize,
        /// What came back.
        #[source]
        source: io::Error,
    },
    /// The operating system refused.
    #[error("cannot {action} `{}`", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file, within the tree.
        path: PathBuf,
        /// What came back.
        #[source]
        source: io::Error,
    },
    /// Nobody wanted it any more.
    #[error("unpacking was cancelled")]
    Cancelled,
}

impl From<ErofsReadError> for UnpackError {
    fn from(source: ErofsReadError) -> Self {
        Self::Image { source }
    }
}

impl UnpackError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

impl Explain for UnpackError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Image { source } => source.kind(),
            Self::Xattr { source, size, .. } if is_full(source) && *size <= SMALL_XATTRS => {
                ErrorKind::NoSpace
            }
            Self::Xattr { .. } => ErrorKind::NotPossible,
            Self::Io { source, .. } if is_full(source) => ErrorKind::NoSpace,
            Self::Io { .. } => ErrorKind::Internal,
            Self::Cancelled => ErrorKind::Cancelled,
        }
    }

    fn hints(&self) -> Vec<String> {
        match (self, self.kind()) {
            (Self::Image { source }, _) => source.hints(),
            (_, ErrorKind::NoSpace) => vec!["make room with `offshoot rm` and `offshoot image rm`".into()],
            (Self::Xattr { .. }, _) => {
                vec!["the root as a disk keeps every attribute: `offshoot run --root block`".into()]
            }
            _ => Vec::new(),
        }
    }
}

/// What a caller hears and says while a tree is unpacked.
#[derive(Clone, Copy)]
pub struct UnpackWatch<'a> {
    /// Whether to stop. Asked often, from several threads.
    pub cancelled: &'a (dyn Fn() -> bool + Sync),
    /// Hears how many entries were made.
    pub moved: &'a (dyn Fn(u64) + Sync),
}

/// What was unpacked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Names, the root's among them.
    pub names: u64,
    /// Bytes of files as they are read, holes included, each file once.
    pub bytes: u64,
}

/// Makes `into`, which must not exist, the folder `dir` of an image with all that is in it. Blocks the thread; needs root.
///
/// What was made stays on failure: unpack into a staging folder. With a full disk the error's kind is
/// [`ErrorKind::NoSpace`], and so it is when the disk would come below the guard's reserve.
pub fn unpack(
    image: &ErofsImage,
    dir: Inode,
    into: &Path,
    guard: SpaceGuard,
    watch: UnpackWatch<'_>,
) -> Result<Unpacked, UnpackError> {
    let private = Mode::RWXU;
    mkdirat(CWD, into, private).map_err(|errno| UnpackError::io("create", into)(errno.into()))?;
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = openat(CWD, into, flags, Mode::empty())
        .map_err(|errno| UnpackError::io("open", into)(errno.into()))?;
    let room = Room::new(into, guard);
    let failed = AtomicBool::new(false);
    let cancelled = || failed.load(Ordering::Relaxed) || (watch.cancelled)();
    let (sender, receiver) = sync_channel(QUEUE);
    let receiver = Mutex::new(receiver);
    let mut names = Names {
        root: &root,
        room: &room,
        watch,
        failed: &failed,
        writers: sender,
        current: None,
        done: Unpacked::default(),
    };
    let writer = Writer {
        image,
        room: &room,
        cancelled: &cancelled,
        failed: &failed,
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..WRITERS)
            .map(|_| {
                let (writer, receiver) = (&writer, &receiver);
                scope.spawn(move || writer.work(receiver))
            })
            .collect();
        let named = names.all(image, dir);
        let done = names.done;
        if named.is_err() {
            failed.store(true, Ordering::Relaxed);
        }
        // The writers end when there is nobody left who could send them more.
        drop(names);
        let mut written = Ok(());
        for thread in threads {
            let result = thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            written = first_cause(written, result);
        }
        first_cause(named, written).map(|()| done)
    })
}

/// Of two results the error, and of two errors the one that is no consequence of the other.
fn first_cause(one: Result<(), UnpackError>, other: Result<(), UnpackError>) -> Result<(), UnpackError> {
    match (one, other) {
        (Err(UnpackError::Cancelled), Err(error)) | (Err(error), _) | (Ok(()), Err(error)) => Err(error),
        (Ok(()), Ok(())) => Ok(()),
    }
}

/// A folder below `root` by its path, through no link. The empty path is `root` itself.
pub(crate) fn open_dir(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    open_below(root, path, OFlags::DIRECTORY)
}

/// A file below `root` by its path, to be read; through no link, and it is none.
pub(crate) fn open_below(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let path = match path.as_os_str().as_bytes() {
        b"" => b".",
        path => path,
    };
    let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    Ok(openat2(root, path, flags, Mode::empty(), resolve)?)
}

/// A file in an open folder as a path, for calls that take attributes only by path.
pub(crate) fn proc_path(dir: BorrowedFd<'_>, name: &Path) -> PathBuf {
    let mut path = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    path.push(name);
    path
}

/// Linux has no owner of this number; its own EROFS shows such a file as nobody's.
pub(crate) fn owner(id: u32) -> u32 {
    if id == u32::MAX { 65_534 } else { id }
}

/// Whether a file of this kind can have this attribute: Linux keeps `user` from what everybody may write (xattr(7)).
pub(crate) fn takes_xattr(kind: InodeKind, name: &[u8]) -> bool {
    matches!(kind, InodeKind::Dir | InodeKind::File) || !name.starts_with(b"user.")
}

fn times(metadata: &Metadata) -> Timestamps {
    Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: metadata.mtime.seconds,
            tv_nsec: metadata.mtime.nanos.into(),
        },
    }
}

fn owners(metadata: &Metadata) -> (Option<Uid>, Option<Gid>) {
    (
        Some(Uid::from_raw(owner(metadata.uid))),
        Some(Gid::from_raw(owner(metadata.gid))),
    )
}

fn set_xattrs(
    path: &Path,
    inode: &Inode,
    set: impl Fn(&[u8], &[u8]) -> rustix::io::Result<()>,
) -> Result<(), UnpackError> {
    let xattrs = inode.metadata.xattrs.as_deref();
    for (name, value) in xattrs.into_iter().flatten() {
        if takes_xattr(inode.kind, name) {
            set(name, value).map_err(|errno| UnpackError::Xattr {
                path: path.to_owned(),
                name: name.escape_ascii().to_string(),
                size: xattrs
                    .into_iter()
                    .flatten()
                    .map(|(name, value)| name.len() + value.len())
                    .sum(),
                source: errno.into(),
            })?;
        }
    }
    Ok(())
}

/// Gives an open file or folder all that the image says about it. The mode comes after the owner, whose change takes the
/// setuid bit away, and attributes after both, since capabilities go with either.
fn describe(file: BorrowedFd<'_>, path: &Path, inode: &Inode) -> Result<(), UnpackError> {
    let (uid, gid) = owners(&inode.metadata);
    fchown(file, uid, gid).map_err(|errno| UnpackError::io("set the owner of", path)(errno.into()))?;
    fchmod(file, Mode::from_raw_mode(inode.metadata.mode.into()))
        .map_err(|errno| UnpackError::io("set the mode of", path)(errno.into()))?;
    set_xattrs(path, inode, |name, value| {
        fsetxattr(file, name, value, XattrFlags::empty())
    })?;
    futimens(file, &times(&inode.metadata))
        .map_err(|errno| UnpackError::io("set the time of", path)(errno.into()))
}

/// Makes the names.
struct Names<'a> {
    root: &'a OwnedFd,
    room: &'a Room,
    watch: UnpackWatch<'a>,
    failed: &'a AtomicBool,
    writers: SyncSender<Job>,
    /// The folder that was last opened.
    current: Option<(PathBuf, OwnedFd)>,
    done: Unpacked,
}

impl Names<'_> {
    fn all(&mut self, image: &ErofsImage, dir: Inode) -> Result<(), UnpackError> {
        for step in image.walk_below(dir) {
            if self.failed.load(Ordering::Relaxed) || (self.watch.cancelled)() {
                return Err(UnpackError::Cancelled);
            }
            match step? {
                Step::Enter { path, .. } => {
                    self.room
                        .take(NAME_COST)
                        .map_err(UnpackError::io("create", &path))?;
                    if !path.as_os_str().is_empty() {
                        let (parent, name) = self.parent(&path)?;
                        mkdirat(parent, name, Mode::RWXU)
                            .map_err(|errno| UnpackError::io("create", &path)(errno.into()))?;
                    }
                    self.count();
                }
                Step::Entry { path, inode, first } => {
                    self.room
                        .take(NAME_COST)
                        .map_err(UnpackError::io("create", &path))?;
                    match first {
                        Some(first) => self.link(&path, &first)?,
                        None => self.make(image, &path, inode)?,
                    }
                    self.count();
                }
                Step::Leave { path, dir, .. } => {
                    self.current = None;
                    let handle =
                        open_dir(self.root.as_fd(), &path).map_err(UnpackError::io("open", &path))?;
                    describe(handle.as_fd(), &path, &dir)?;
                }
            }
        }
        (self.watch.moved)(self.done.names);
        Ok(())
    }

    fn count(&mut self) {
        self.done.names += 1;
        if self.done.names.is_multiple_of(REPORT_EVERY) {
            (self.watch.moved)(self.done.names);
        }
    }

    /// The folder that `path` is in, opened, and its last part.
    fn parent<'p>(&mut self, path: &'p Path) -> Result<(BorrowedFd<'_>, &'p Path), UnpackError> {
        let parent = path.parent().unwrap_or(Path::new(""));
        let name = Path::new(path.file_name().unwrap_or_default());
        if self.current.as_ref().is_none_or(|(open, _)| open != parent) {
            let handle = open_dir(self.root.as_fd(), parent).map_err(UnpackError::io("open", parent))?;
            self.current = Some((parent.to_owned(), handle));
        }
        let Some((_, handle)) = &self.current else {
            unreachable!("it was just opened")
        };
        Ok((handle.as_fd(), name))
    }

    fn link(&mut self, path: &Path, first: &Path) -> Result<(), UnpackError> {
        let failed = |source: io::Error| UnpackError::io("create", path)(source);
        let from = open_dir(self.root.as_fd(), first.parent().unwrap_or(Path::new(""))).map_err(failed)?;
        let first = Path::new(first.file_name().unwrap_or_default());
        let (parent, name) = self.parent(path)?;
        linkat(from, first, parent, name, AtFlags::empty()).map_err(|errno| failed(errno.into()))
    }

    fn make(&mut self, image: &ErofsImage, path: &Path, inode: Inode) -> Result<(), UnpackError> {
        let failed = |errno: rustix::io::Errno| UnpackError::io("create", path)(errno.into());
        let private = Mode::RUSR | Mode::WUSR;
        if inode.kind == InodeKind::File {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let (parent, name) = self.parent(path)?;
            let file = openat(parent, name, flags, private).map_err(failed)?;
            self.done.bytes += inode.size;
            let job = Job {
                file: file.into(),
                path: path.to_owned(),
                inode,
            };
            // Writers take jobs until there are no more, also when they have failed.
            return self.writers.send(job).map_err(|_| UnpackError::Cancelled);
        }
        let (parent, name) = self.parent(path)?;
        match inode.kind {
            InodeKind::Symlink => {
                let target = image.read_link(&inode)?;
                symlinkat(target, parent, name).map_err(failed)?;
            }
            InodeKind::Fifo => mknodat(parent, name, FileType::Fifo, private, 0).map_err(failed)?,
            InodeKind::CharDev { major, minor } => {
                let device = makedev(major, minor);
                mknodat(parent, name, FileType::CharacterDevice, private, device).map_err(failed)?;
            }
            InodeKind::BlockDev { major, minor } => {
                let device = makedev(major, minor);
                mknodat(parent, name, FileType::BlockDevice, private, device).map_err(failed)?;
            }
            InodeKind::Dir | InodeKind::File => unreachable!("folders and files are made elsewhere"),
        }
        describe_unopened(parent, name, path, &inode)
    }
}

/// As [`describe`], for what must not be opened: a pipe would block, a device would do whatever it does.
fn describe_unopened(
    dir: BorrowedFd<'_>,
    name: &Path,
    path: &Path,
    inode: &Inode,
) -> Result<(), UnpackError> {
    let (uid, gid) = owners(&inode.metadata);
    chownat(dir, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|errno| UnpackError::io("set the owner of", path)(errno.into()))?;
    if inode.kind != InodeKind::Symlink {
        // It was made a moment ago and is no link, so there is none to follow.
        let mode = Mode::from_raw_mode(inode.metadata.mode.into());
        chmodat(dir, name, mode, AtFlags::empty())
            .map_err(|errno| UnpackError::io("set the mode of", path)(errno.into()))?;
    }
    if inode.metadata.xattrs.is_some() {
        let full = proc_path(dir, name);
        set_xattrs(path, inode, |attribute, value| {
            lsetxattr(&full, attribute, value, XattrFlags::empty())
        })?;
    }
    utimensat(dir, name, &times(&inode.metadata), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|errno| UnpackError::io("set the time of", path)(errno.into()))
}

/// A file that has its name and waits for all else.
struct Job {
    file: File,
    path: PathBuf,
    inode: Inode,
}

/// Fills files.
struct Writer<'a> {
    image: &'a ErofsImage,
    room: &'a Room,
    cancelled: &'a (dyn Fn() -> bool + Sync),
    failed: &'a AtomicBool,
}

impl Writer<'_> {
    fn work(&self, jobs: &Mutex<Receiver<Job>>) -> Result<(), UnpackError> {
        let mut result = Ok(());
        loop {
            let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(Job { file, path, inode }) = job else {
                return result;
            };
            // After an error jobs are taken and dropped, or whoever sends them would wait for ever.
            if result.is_ok() {
                result = self
                    .fill(&file, &path, &inode)
                    .and_then(|()| describe(file.as_fd(), &path, &inode))
                    .inspect_err(|_| self.failed.store(true, Ordering::Relaxed));
            }
        }
    }

    fn fill(&self, file: &File, path: &Path, inode: &Inode) -> Result<(), UnpackError> {
        if inode.size > 0 {
            file.set_len(inode.size)
                .map_err(UnpackError::io("set the size of", path))?;
        }
        let mut at = 0;
        while let Some(extent) = self.image.next_extent(inode, at)? {
            at = extent.start;
            while at < extent.end {
                if (self.cancelled)() {
                    return Err(UnpackError::Cancelled);
                }
                let step = (extent.end - at).min(COPY_STEP);
                self.room
                    .take(step)
                    .and_then(|()| {
                        let from = self.image.position(inode, at);
                        copy_range(self.image.file(), from, file, at, step)
                    })
                    .map_err(UnpackError::io("write", path))?;
                at += step;
            }
        }
        Ok(())
    }
}
