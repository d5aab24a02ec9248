//! Reading images back, inode by inode, without the kernel.
//!
//! Only what this crate writes is read (`docs/formats/erofs.md`). The bytes come from a disk and may be anything: every
//! place is compared with the image's own bounds before it is read, and nothing is allocated by a length that was not.
//! What spans several inodes (no folder within itself, no file with too many names) is for [`Walk`](super::Walk) to see.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use offshoot_image::layer::Metadata;
use offshoot_model::{ErrorKind, Explain};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::dirs;
use super::format::{
    BLOCK, DataLayout, FileType, INODE, InodeFields, SLOT, Superblock, mode, read_xattrs, split_device_number,
};

/// The longest target of a link (Linux `PATH_MAX`, less its NUL).
const LINK_MAX: u64 = 4095;

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ErofsReadError {
    /// The operating system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The image.
        path: PathBuf,
        /// What came back.
        #[source]
        source: io::Error,
    },
    /// It is not what our writer writes.
    #[error("{} is damaged: {what}", path.display())]
    Damaged {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// Its folders go deeper than what can be unpacked and removed again.
    #[error("{} has folders of more than {depth} levels or paths of more than {length} bytes", path.display())]
    TooDeep {
        /// The image.
        path: PathBuf,
        /// The most levels.
        depth: usize,
        /// The longest path.
        length: usize,
    },
}

impl Explain for ErofsReadError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { .. } => ErrorKind::Internal,
            Self::Damaged { .. } => ErrorKind::BadContent,
            Self::TooDeep { .. } => ErrorKind::NotPossible,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Io { .. } => Vec::new(),
            Self::Damaged { .. } => vec!["prepare the image again: `offshoot image prepare --force`".into()],
            Self::TooDeep { .. } => {
                vec!["show it as a disk, which has no such limit: `offshoot run --root block`".into()]
            }
        }
    }
}

/// What an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InodeKind {
    /// A folder.
    Dir,
    /// A regular file.
    File,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDev {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDev {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
}

impl InodeKind {
    /// The type as folders say it.
    pub(super) fn file_type(self) -> FileType {
        match self {
            Self::Dir => FileType::Dir,
            Self::File => FileType::Regular,
            Self::Symlink => FileType::Symlink,
            Self::CharDev { .. } => FileType::CharDev,
            Self::BlockDev { .. } => FileType::BlockDev,
            Self::Fifo => FileType::Fifo,
        }
    }
}

/// A file of any sort.
#[derive(Clone, Debug)]
pub struct Inode {
    /// Its number.
    pub nid: u64,
    /// What it is.
    pub kind: InodeKind,
    /// Owner, permissions, time, attributes.
    pub metadata: Metadata,
    /// How many names it has; for a folder 2 and one for each folder in it.
    pub links: u32,
    /// Bytes of content: of a folder its entries, of a link its target.
    pub size: u64,
    /// Where its whole blocks are in the image.
    blocks_at: u64,
    /// How many bytes they hold.
    blocks_len: u64,
    /// Where the rest is.
    tail_at: u64,
}

/// A name in a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dirent {
    /// The name: no slash, no NUL, not `.` or `..`.
    pub name: Box<[u8]>,
    /// The inode of this number.
    pub nid: u64,
    /// What the folder says it is.
    pub(super) file_type: u8,
}

/// An open image. Any number of threads may read it at once.
#[derive(Debug)]
pub struct ErofsImage {
    file: File,
    path: PathBuf,
    superblock: Superblock,
}

impl ErofsImage {
    /// Opens the image at `path` and checks its superblock.
    pub fn open(path: &Path) -> Result<Self, ErofsReadError> {
        let io = |action| {
            move |source| ErofsReadError::Io {
                action,
                path: path.to_owned(),
                source,
            }
        };
        let damaged = |what| ErofsReadError::Damaged {
            path: path.to_owned(),
            what,
        };
        let file = File::open(path).map_err(io("open"))?;
        let metadata = file.metadata().map_err(io("look at"))?;
        if !metadata.is_file() || metadata.len() < BLOCK {
            return Err(damaged("it is too small"));
        }
        let mut block = [0; BLOCK as usize];
        file.read_exact_at(&mut block, 0).map_err(io("read"))?;
        let superblock = Superblock::from_block(&block).map_err(damaged)?;
        if u64::from(superblock.blocks) * BLOCK > metadata.len() {
            return Err(damaged("it is shorter than it says"));
        }
        if superblock.meta_block == 0 || superblock.meta_block >= superblock.blocks {
            return Err(damaged("its metadata lies outside of it"));
        }
        Ok(Self {
            file,
            path: path.to_owned(),
            superblock,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many inodes it says it has.
    pub fn inodes(&self) -> u64 {
        self.superblock.inodes
    }

    /// The file, for copies of the ranges that [`next_extent`](Self::next_extent) gives and [`position`](Self::position) places.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The root.
    pub fn root(&self) -> Result<Inode, ErofsReadError> {
        let root = self.inode(u64::from(self.superblock.root_nid))?;
        if root.kind != InodeKind::Dir {
            return Err(self.damaged("its root is no folder"));
        }
        Ok(root)
    }

    /// One more than the highest number an inode could have.
    pub(super) fn slots(&self) -> u64 {
        u64::from(self.superblock.blocks - self.superblock.meta_block) * BLOCK / SLOT
    }

    pub(super) fn damaged(&self, what: &'static str) -> ErofsReadError {
        ErofsReadError::Damaged {
            path: self.path.clone(),
            what,
        }
    }

    fn read_exact(&self, buffer: &mut [u8], at: u64) -> Result<(), ErofsReadError> {
        self.file
            .read_exact_at(buffer, at)
            .map_err(|source| ErofsReadError::Io {
                action: "read",
                path: self.path.clone(),
                source,
            })
    }

    /// The inode of a number that a folder gave.
    pub fn inode(&self, nid: u64) -> Result<Inode, ErofsReadError> {
        if nid == 0 || nid >= self.slots() {
            return Err(self.damaged("an inode lies outside of it"));
        }
        let meta_at = u64::from(self.superblock.meta_block) * BLOCK;
        let end = u64::from(self.superblock.blocks) * BLOCK;
        let at = meta_at + nid * SLOT;
        if at + INODE > end {
            return Err(self.damaged("an inode lies outside of it"));
        }
        let mut raw = [0; INODE as usize];
        self.read_exact(&mut raw, at)?;
        let fields = InodeFields::read(&raw).map_err(|what| self.damaged(what))?;
        let tail_at = at + INODE + fields.xattrs;
        if tail_at > end {
            return Err(self.damaged("attributes lie outside of it"));
        }
        let xattrs = match fields.xattrs {
            0 => None,
            len => {
                // 256 KiB at most, since it is counted in 16 bits.
                let mut place = vec![0; len as usize];
                self.read_exact(&mut place, at + INODE)?;
                Some(Arc::new(read_xattrs(&place).map_err(|what| self.damaged(what))?))
            }
        };
        let (major, minor) = split_device_number(fields.block_or_device);
        let kind = match fields.mode & mode::TYPE {
            mode::DIR => InodeKind::Dir,
            mode::FILE => InodeKind::File,
            mode::LINK => InodeKind::Symlink,
            mode::CHAR => InodeKind::CharDev { major, minor },
            mode::BLOCK => InodeKind::BlockDev { major, minor },
            mode::FIFO => InodeKind::Fifo,
            _ => return Err(self.damaged("an inode is of no known type")),
        };
        let mut inode = Inode {
            nid,
            kind,
            metadata: Metadata {
                mode: fields.mode & !mode::TYPE,
                uid: fields.uid,
                gid: fields.gid,
                mtime: fields.mtime,
                xattrs,
            },
            links: fields.links,
            size: fields.size,
            blocks_at: u64::from(fields.block_or_device) * BLOCK,
            blocks_len: fields.size,
            tail_at,
        };
        self.check_content(&mut inode, fields.layout)?;
        Ok(inode)
    }

    /// Finds out where the content of an inode is, and that it is within the image.
    fn check_content(&self, inode: &mut Inode, layout: DataLayout) -> Result<(), ErofsReadError> {
        let has_content = matches!(inode.kind, InodeKind::Dir | InodeKind::File | InodeKind::Symlink);
        if !has_content && (inode.size != 0 || layout != DataLayout::FlatPlain) {
            return Err(self.damaged("an inode has content that its type has not"));
        }
        if inode.links == 0 {
            return Err(self.damaged("an inode has no name"));
        }
        match inode.kind {
            InodeKind::File if layout != DataLayout::FlatPlain => {
                return Err(self.damaged("a file lies among the metadata"));
            }
            InodeKind::Symlink if inode.size == 0 || inode.size > LINK_MAX => {
                return Err(self.damaged("a link has an impossible target"));
            }
            InodeKind::Dir if inode.size == 0 => return Err(self.damaged("a folder has no entries")),
            _ => {}
        }
        if layout == DataLayout::FlatInline {
            inode.blocks_len = inode.size / BLOCK * BLOCK;
            // The metadata ends at a block, so a tail within one block is within the image.
            if inode.tail_at % BLOCK + inode.size % BLOCK > BLOCK {
                return Err(self.damaged("a tail goes on in another block"));
            }
        }
        if inode.blocks_len > 0 {
            let end = inode
                .blocks_at
                .checked_add(inode.blocks_len)
                .filter(|end| *end <= u64::from(self.superblock.meta_block) * BLOCK);
            if inode.blocks_at == 0 || end.is_none() {
                return Err(self.damaged("content lies outside of it"));
            }
        }
        Ok(())
    }

    /// Reads content of an inode from `offset` on into `buffer`, holes as zeros; gives how much there was, which is less than
    /// asked for only at the end.
    pub fn read_at(&self, inode: &Inode, buffer: &mut [u8], offset: u64) -> Result<usize, ErofsReadError> {
        let left = inode.size.saturating_sub(offset);
        let count = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
        let in_blocks = inode.blocks_len.saturating_sub(offset);
        let split = usize::try_from(in_blocks).map_or(count, |in_blocks| in_blocks.min(count));
        let (blocks, tail) = buffer[..count].split_at_mut(split);
        if !blocks.is_empty() {
            self.read_exact(blocks, inode.blocks_at + offset)?;
        }
        if !tail.is_empty() {
            let from = offset.max(inode.blocks_len) - inode.blocks_len;
            self.read_exact(tail, inode.tail_at + from)?;
        }
        Ok(count)
    }

    /// The names in a folder in the order of their bytes, without `.` and `..`.
    pub fn read_dir(&self, dir: &Inode) -> Result<Vec<Dirent>, ErofsReadError> {
        if dir.kind != InodeKind::Dir {
            return Err(self.damaged("a folder was expected"));
        }
        let mut dirents: Vec<Dirent> = Vec::new();
        let mut last: Box<[u8]> = Box::default();
        let mut own = 0;
        let mut block = [0; BLOCK as usize];
        let mut at = 0;
        while at < dir.size {
            let used = self.read_at(dir, &mut block, at)?;
            for entry in dirs::entries(&block[..used]).map_err(|what| self.damaged(what))? {
                if *entry.name <= *last {
                    return Err(self.damaged("the names of a folder are not in order"));
                }
                last = entry.name.into();
                match entry.name {
                    b"." if entry.nid != dir.nid => return Err(self.damaged("a folder is not its own")),
                    b"." | b".." => own += 1,
                    name => dirents.push(Dirent {
                        name: name.into(),
                        nid: entry.nid,
                        file_type: entry.file_type,
                    }),
                }
            }
            at += used as u64;
        }
        if own != 2 {
            return Err(self.damaged("a folder does not know its parent"));
        }
        Ok(dirents)
    }

    /// The target of a symbolic link: 1 to 4095 bytes without NUL.
    pub fn read_link(&self, link: &Inode) -> Result<Vec<u8>, ErofsReadError> {
        if link.kind != InodeKind::Symlink {
            return Err(self.damaged("a link was expected"));
        }
        // Not more than LINK_MAX, which was checked when the inode was read.
        let mut target = vec![0; link.size as usize];
        self.read_at(link, &mut target, 0)?;
        if target.contains(&0) {
            return Err(self.damaged("a link has an impossible target"));
        }
        Ok(target)
    }

    /// The inode of a name in a folder.
    pub fn lookup(&self, dir: &Inode, name: &[u8]) -> Result<Option<Inode>, ErofsReadError> {
        let dirents = self.read_dir(dir)?;
        match dirents.binary_search_by(|dirent| (*dirent.name).cmp(name)) {
            Ok(index) => self.inode(dirents[index].nid).map(Some),
            Err(_) => Ok(None),
        }
    }

    /// Where in the image the byte of a regular file at `offset` is.
    pub fn position(&self, file: &Inode, offset: u64) -> u64 {
        file.blocks_at + offset
    }

    /// The next range of a regular file, from `offset` on, that is no hole; `None` behind the last. In bytes of the file.
    pub fn next_extent(&self, file: &Inode, offset: u64) -> Result<Option<Range<u64>>, ErofsReadError> {
        if file.kind != InodeKind::File || offset >= file.size {
            return Ok(None);
        }
        let io = |errno: Errno| ErofsReadError::Io {
            action: "read",
            path: self.path.clone(),
            source: errno.into(),
        };
        let end = file.blocks_at + file.size;
        let from = file.blocks_at + offset;
        let start = match seek(&self.file, SeekFrom::Data(from)) {
            Ok(start) if start < end => start.max(from),
            Ok(_) | Err(Errno::NXIO) => return Ok(None),
            // A file system without holes: all of it is data.
            Err(Errno::INVAL) => return Ok(Some(offset..file.size)),
            Err(errno) => return Err(io(errno)),
        };
        let stop = seek(&self.file, SeekFrom::Hole(start))
            .map_err(io)?
            .clamp(start, end);
        Ok(Some(start - file.blocks_at..stop - file.blocks_at))
    }
}
