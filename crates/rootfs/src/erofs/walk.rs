//! Going through a whole tree of an image, folder by folder.
//!
//! ```text
//! Enter a │ Entry a/file │ Entry a/link │ Enter a/b │ … │ Leave a/b │ Leave a
//! ```
//!
//! What a folder has besides folders comes before the folders in it. It ends whatever the image says: a folder is entered
//! once, and names and levels are counted.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::read::{Dirent, ErofsImage, ErofsReadError, Inode, InodeKind};

/// The most levels; layers that have more are refused before they are written.
const DEPTH_MAX: usize = 520;
/// The longest path below the root: with a data directory before it, it still fits into Linux's `PATH_MAX`.
const PATH_MAX: usize = 3584;

/// One step. Paths are relative to where the walk began, which is the empty one.
#[derive(Clone, Debug)]
pub enum Step {
    /// A folder; what is in it comes next.
    Enter {
        /// Its path.
        path: Arc<Path>,
        /// The folder.
        dir: Inode,
    },
    /// Anything but a folder.
    Entry {
        /// Its path.
        path: PathBuf,
        /// What it is.
        inode: Inode,
        /// The path under which the same inode came before.
        first: Option<Arc<Path>>,
    },
    /// The end of a folder.
    Leave {
        /// Its path.
        path: Arc<Path>,
        /// The folder.
        dir: Inode,
        /// How many names are in it.
        names: usize,
    },
}

/// The steps through a tree; nothing more comes after an error.
#[derive(Debug)]
pub struct Walk<'a> {
    image: &'a ErofsImage,
    /// The folder to begin with.
    start: Option<Inode>,
    stack: Vec<Level>,
    /// One bit for each number an inode could have: whether it was met.
    met: Vec<u64>,
    /// Files with several names: the first of them, and how many came.
    linked: HashMap<u64, (Arc<Path>, u32)>,
}

/// A folder that was entered and not yet left.
#[derive(Debug)]
struct Level {
    path: Arc<Path>,
    dir: Inode,
    names: usize,
    left: std::vec::IntoIter<Dirent>,
    dirs: std::collections::VecDeque<(PathBuf, Inode)>,
}

impl ErofsImage {
    /// Goes through all of the tree.
    pub fn walk(&self) -> Result<Walk<'_>, ErofsReadError> {
        Ok(self.walk_below(self.root()?))
    }

    /// Goes through a folder and all that is in it.
    pub fn walk_below(&self, dir: Inode) -> Walk<'_> {
        Walk {
            image: self,
            start: Some(dir),
            stack: Vec::new(),
            // As large as the image's own metadata divided by 256.
            met: vec![0; (self.slots() / 64 + 1) as usize],
            linked: HashMap::new(),
        }
    }
}

impl Walk<'_> {
    /// Notes an inode; whether it was met before.
    fn meet(&mut self, nid: u64) -> bool {
        // An inode that was read has a number below `slots`.
        let (word, bit) = (&mut self.met[(nid / 64) as usize], 1 << (nid % 64));
        let before = *word & bit != 0;
        *word |= bit;
        before
    }

    fn enter(&mut self, path: PathBuf, dir: Inode) -> Result<Step, ErofsReadError> {
        if self.meet(dir.nid) {
            return Err(self.image.damaged("a folder has several names"));
        }
        if self.stack.len() >= DEPTH_MAX {
            return Err(self.too_deep());
        }
        let path: Arc<Path> = path.into();
        let dirents = self.image.read_dir(&dir)?;
        self.stack.push(Level {
            path: path.clone(),
            dir: dir.clone(),
            names: dirents.len(),
            left: dirents.into_iter(),
            dirs: std::collections::VecDeque::new(),
        });
        Ok(Step::Enter { path, dir })
    }

    fn too_deep(&self) -> ErofsReadError {
        ErofsReadError::TooDeep {
            path: self.image.path().to_owned(),
            depth: DEPTH_MAX,
            length: PATH_MAX,
        }
    }

    fn step(&mut self) -> Result<Option<Step>, ErofsReadError> {
        if let Some(start) = self.start.take() {
            return self.enter(PathBuf::new(), start).map(Some);
        }
        loop {
            let Some(level) = self.stack.last_mut() else {
                return Ok(None);
            };
            let Some(dirent) = level.left.next() else {
                break;
            };
            let inode = self.image.inode(dirent.nid)?;
            if inode.kind.file_type() as u8 != dirent.file_type {
                return Err(self.image.damaged("a folder says another type than the inode"));
            }
            let path = level.path.join(OsString::from_vec(dirent.name.into()));
            if path.as_os_str().len() > PATH_MAX {
                return Err(self.too_deep());
            }
            if inode.kind == InodeKind::Dir {
                level.dirs.push_back((path, inode));
                continue;
            }
            let first = self.first_name(&inode, &path)?;
            return Ok(Some(Step::Entry { path, inode, first }));
        }
        let Some(mut level) = self.stack.pop() else {
            return Ok(None);
        };
        match level.dirs.pop_front() {
            Some((path, dir)) => {
                self.stack.push(level);
                self.enter(path, dir).map(Some)
            }
            None => Ok(Some(Step::Leave {
                path: level.path,
                dir: level.dir,
                names: level.names,
            })),
        }
    }

    /// The path under which an inode came before.
    fn first_name(&mut self, inode: &Inode, path: &Path) -> Result<Option<Arc<Path>>, ErofsReadError> {
        let before = self.meet(inode.nid);
        if inode.links == 1 {
            if before {
                return Err(self.image.damaged("a file has more names than it says"));
            }
            return Ok(None);
        }
        let (first, names) = self.linked.entry(inode.nid).or_insert_with(|| (path.into(), 0));
        *names += 1;
        if *names > inode.links {
            return Err(self.image.damaged("a file has more names than it says"));
        }
        Ok(before.then(|| first.clone()))
    }
}

impl Iterator for Walk<'_> {
    type Item = Result<Step, ErofsReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = self.step();
        if step.is_err() {
            self.stack.clear();
        }
        step.transpose()
    }
}
