//! The merged tree of an image, in memory.
//!
//! Files are inodes, and folders give them names, as on disk, so that hard links need no special case. Everything is in
//! one table and refers to each other by index: a tree of two million files takes about half a GiB and is dropped at once.

use std::collections::BTreeMap;

use super::entry::Metadata;
use super::read::Extent;

/// An inode of a tree, by its place in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InodeId(pub(super) u32);

impl InodeId {
    /// Its place: less than [`Tree::table_len`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A name in a folder.
#[derive(Clone, Copy, Debug)]
pub struct Dirent {
    /// What it names.
    pub inode: InodeId,
    /// The layer that last made this name or described what it names.
    pub(super) layer: u32,
}

/// A file of any sort.
#[derive(Debug)]
pub struct Inode {
    /// Owner, mode, times, attributes.
    pub metadata: Metadata,
    /// How many names it has. For a folder 1: what `stat` shows depends on what is in it.
    pub names: u32,
    /// What sort it is.
    pub node: Node,
}

/// What an inode is.
#[derive(Debug)]
pub enum Node {
    /// A folder and the names in it, in bytewise order.
    Dir(BTreeMap<Box<[u8]>, Dirent>),
    /// A regular file.
    File {
        /// Its size in bytes.
        size: u64,
        /// Where its content went.
        extent: Extent,
    },
    /// A symbolic link and its target.
    Symlink(Box<[u8]>),
    /// A character device.
    CharDev {
        /// Major number, 12 bits.
        major: u32,
        /// Minor number, 20 bits.
        minor: u32,
    },
    /// A block device.
    BlockDev {
        /// Major number, 12 bits.
        major: u32,
        /// Minor number, 20 bits.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
}

/// The files of all layers merged so far.
#[derive(Debug)]
pub struct Tree {
    pub(super) inodes: Vec<Option<Inode>>,
    pub(super) free: Vec<u32>,
    /// Content that no file has any more.
    pub(super) orphans: Vec<(Extent, u64)>,
    /// How many layers were merged.
    pub(super) layers: u32,
}

impl Tree {
    /// The root.
    pub const ROOT: InodeId = InodeId(0);

    /// A tree with nothing but its root, root's and 0755.
    pub fn new() -> Self {
        let root = Inode {
            metadata: Metadata::implied_dir(),
            names: 1,
            node: Node::Dir(BTreeMap::new()),
        };
        Self {
            inodes: vec![Some(root)],
            free: Vec::new(),
            orphans: Vec::new(),
            layers: 0,
        }
    }

    /// The inode of an id of this tree.
    ///
    /// # Panics
    /// If the id is from another tree, or from before a layer that removed it.
    pub fn inode(&self, id: InodeId) -> &Inode {
        self.inodes[id.index()]
            .as_ref()
            .unwrap_or_else(|| panic!("{id:?} is not in the tree"))
    }

    pub(super) fn inode_mut(&mut self, id: InodeId) -> &mut Inode {
        self.inodes[id.index()]
            .as_mut()
            .unwrap_or_else(|| panic!("{id:?} is not in the tree"))
    }

    /// The names in a folder; nothing for anything else.
    pub fn children(&self, id: InodeId) -> impl Iterator<Item = (&[u8], InodeId)> {
        let names = match &self.inode(id).node {
            Node::Dir(names) => Some(names),
            _ => None,
        };
        names
            .into_iter()
            .flatten()
            .map(|(name, dirent)| (&**name, dirent.inode))
    }

    /// How many inodes there are, the root included.
    pub fn inode_count(&self) -> usize {
        self.inodes.len() - self.free.len()
    }

    /// The size of a table with a place for every inode by its index.
    pub fn table_len(&self) -> usize {
        self.inodes.len()
    }

    /// Content that was stored for files which are gone again, with its size.
    pub fn orphans(&self) -> &[(Extent, u64)] {
        &self.orphans
    }
}

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_million_files_fit_into_memory() {
        // With a name of some 20 bytes and its place in the folder, each comes to less than 200 bytes.
        assert!(size_of::<Option<Inode>>() <= 88, "{}", size_of::<Option<Inode>>());
        assert!(size_of::<Dirent>() <= 8);
    }
}
