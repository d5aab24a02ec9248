//! Where in the image every inode goes. Pure: a tree in, places out.
//!
//! An inode's number is its place: so many slots of 32 bytes into the metadata. The root comes first, because the
//! superblock keeps its number in 16 bits; then, folder by folder, what is in it, so that listing a folder reads few
//! blocks. What stands behind an inode must not cross a block; the gap that this leaves is filled with inodes that have
//! nothing behind them.

use offshoot_image::layer::{InodeId, Node, Tree};

use super::dirs;
use super::format::{BLOCK, INODE, SLOT, XATTRS_MAX, xattrs_size};

/// Where an inode is, and what else it has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Place {
    /// The slot in the metadata; 0 is nobody's.
    pub(super) nid: u32,
    /// The first of its blocks outside the metadata, counted from the first such block.
    pub(super) blocks_at: u32,
    /// The folder it is in; for a folder only, which has one.
    pub(super) parent: u32,
}

/// Where everything is.
#[derive(Debug)]
pub(super) struct Layout {
    /// By index of the inode in the tree.
    pub(super) places: Vec<Place>,
    /// The inodes in the order of their numbers' giving out: a folder before what is in it.
    pub(super) order: Vec<InodeId>,
    /// How many blocks folders and links take outside the metadata.
    pub(super) extra_blocks: u64,
    /// The size of the metadata in bytes.
    pub(super) metadata: u64,
}

/// The content of an inode that is not a file's: how many whole blocks outside the metadata, how many bytes behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Split {
    pub(super) size: u64,
    pub(super) blocks: u64,
    pub(super) inline: u64,
}

impl Split {
    /// Divides `size` bytes: the last, partial block goes behind the inode where inode and tail fit into one block.
    pub(super) fn of(size: u64, core: u64) -> Self {
        let tail = size % BLOCK;
        if core + tail <= BLOCK {
            Self {
                size,
                blocks: size / BLOCK,
                inline: tail,
            }
        } else {
            Self {
                size,
                blocks: size.div_ceil(BLOCK),
                inline: 0,
            }
        }
    }
}

/// The names of a folder with `.` and `..` where they belong, for [`dirs`]. `None` stands for the folder and its parent.
pub(super) fn sorted_names(tree: &Tree, dir: InodeId) -> Vec<(&[u8], Option<InodeId>)> {
    let mut names: Vec<(&[u8], Option<InodeId>)> = Vec::new();
    let mut own = [&b"."[..], b".."].into_iter().peekable();
    for (name, inode) in tree.children(dir) {
        while let Some(dots) = own.next_if(|dots| *dots < name) {
            names.push((dots, None));
        }
        names.push((name, Some(inode)));
    }
    names.extend(own.map(|dots| (dots, None)));
    names
}

/// The size of an inode with its attributes.
pub(super) fn core_size(tree: &Tree, id: InodeId) -> u64 {
    INODE + xattrs_size(tree.inode(id).metadata.xattrs.as_deref())
}

/// How the content of a folder or link is divided; nothing for files, whose content is elsewhere.
pub(super) fn split(tree: &Tree, id: InodeId) -> Split {
    let size = match &tree.inode(id).node {
        Node::Dir(_) => {
            let lengths: Vec<usize> = sorted_names(tree, id)
                .iter()
                .map(|(name, _)| name.len())
                .collect();
            dirs::size(&lengths)
        }
        Node::Symlink(target) => target.len() as u64,
        _ => 0,
    };
    Split::of(size, core_size(tree, id))
}

/// Gives every inode of the tree its place; the inode that has too many attributes, where one has.
pub(super) fn lay_out(tree: &Tree) -> Result<Layout, InodeId> {
    let mut layout = Layout {
        places: vec![Place::default(); tree.table_len()],
        order: Vec::new(),
        extra_blocks: 0,
        metadata: 0,
    };
    // Slot 0 stays empty: an inode number of 0 is none to the C library.
    let mut cursor = Cursor {
        at: SLOT,
        gap: (0, 0),
    };
    layout.place(tree, &mut cursor, Tree::ROOT, Tree::ROOT)?;
    let mut pending = vec![Tree::ROOT];
    while let Some(dir) = pending.pop() {
        let first_new = pending.len();
        for (_, child) in tree.children(dir) {
            if layout.places[child.index()].nid != 0 {
                continue;
            }
            layout.place(tree, &mut cursor, child, dir)?;
            if matches!(tree.inode(child).node, Node::Dir(_)) {
                pending.push(child);
            }
        }
        // The first folder's content comes next.
        pending[first_new..].reverse();
    }
    layout.metadata = cursor.at;
    Ok(layout)
}

impl Layout {
    fn place(
        &mut self,
        tree: &Tree,
        cursor: &mut Cursor,
        id: InodeId,
        parent: InodeId,
    ) -> Result<(), InodeId> {
        let core = core_size(tree, id);
        if core - INODE > XATTRS_MAX {
            return Err(id);
        }
        let split = split(tree, id);
        self.places[id.index()] = Place {
            // Two million inodes with all they may have take less than 2^32 slots.
            nid: (cursor.take(core, split.inline) / SLOT) as u32,
            blocks_at: self.extra_blocks as u32,
            parent: parent.index() as u32,
        };
        self.extra_blocks += split.blocks;
        self.order.push(id);
        Ok(())
    }
}

/// Where the next inode goes.
struct Cursor {
    at: u64,
    /// The largest piece that was passed over: start and end.
    gap: (u64, u64),
}

impl Cursor {
    /// Gives out room for an inode of `core` bytes with `tail` bytes behind it.
    fn take(&mut self, core: u64, tail: u64) -> u64 {
        let whole = core + tail;
        if whole <= self.gap.1 - self.gap.0 {
            let at = self.gap.0;
            self.gap.0 = (at + whole).next_multiple_of(SLOT).min(self.gap.1);
            return at;
        }
        // What must not be divided: inode and tail together, or the inode itself, which is easier to read whole.
        let undivided = if tail > 0 { whole } else { INODE };
        let left = BLOCK - self.at % BLOCK;
        if undivided > left {
            if left > self.gap.1 - self.gap.0 {
                self.gap = (self.at, self.at + left);
            }
            self.at += left;
        }
        let at = self.at;
        self.at = (at + whole).next_multiple_of(SLOT);
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_must_stay_whole_crosses_a_block() {
        let mut cursor = Cursor {
            at: SLOT,
            gap: (0, 0),
        };
        let mut taken: Vec<(u64, u64)> = Vec::new();
        for n in 0..3000_u64 {
            let (core, tail) = (64 + 4 * (n * 7 % 50), if n % 3 == 0 { n * 613 % 3800 } else { 0 });
            let at = cursor.take(core, tail);
            assert_eq!(at % SLOT, 0);
            let undivided = if tail > 0 { core + tail } else { INODE };
            assert_eq!(at / BLOCK, (at + undivided - 1) / BLOCK, "{at} {undivided}");
            taken.push((at, at + core + tail));
        }
        taken.sort_unstable();
        assert!(
            taken.windows(2).all(|pair| pair[0].1 <= pair[1].0),
            "pieces overlap"
        );
        assert!(taken.last().unwrap().1 <= cursor.at);
    }

    #[test]
    fn content_stays_behind_the_inode_where_it_fits() {
        assert_eq!(
            Split::of(0, 64),
            Split {
                size: 0,
                blocks: 0,
                inline: 0
            }
        );
        assert_eq!(
            Split::of(4032, 64),
            Split {
                size: 4032,
                blocks: 0,
                inline: 4032
            }
        );
        assert_eq!(
            Split::of(4033, 64),
            Split {
                size: 4033,
                blocks: 1,
                inline: 0
            }
        );
        assert_eq!(
            Split::of(8200, 64),
            Split {
                size: 8200,
                blocks: 2,
                inline: 8
            }
        );
        assert_eq!(
            Split::of(10, 9000),
            Split {
                size: 10,
                blocks: 1,
                inline: 0
            }
        );
    }
}
