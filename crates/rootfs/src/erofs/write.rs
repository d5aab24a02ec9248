//! Everything but the data: folders, inodes, the superblock.

use std::fs::File;
use std::io;

use offshoot_image::layer::{InodeId, Node, Tree};
use offshoot_model::{ErrorKind, Explain};

use super::data::DataWriter;
use super::dirs::{self, Name};
use super::format::{BLOCK, DataLayout, FileType, RawInode, SLOT, Superblock, device_number, mode};
use super::layout::{Layout, Place, Split, core_size, lay_out, sorted_names, split};

/// QEMU wants the file behind a virtio-pmem device to be a multiple of this.
const FILE_ALIGN: u64 = 2 << 20;

/// Why an image cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum ErofsError {
    /// The attributes of a file take more than its inode can count.
    #[error("a file has more extended attributes than an inode can hold")]
    TooManyXattrs,
    /// The image would be larger than its block numbers reach.
    #[error("the image would have more than 16 TiB")]
    TooLarge,
    /// The operating system refused.
    #[error("cannot write the image")]
    Write {
        /// What came back.
        #[source]
        source: io::Error,
    },
}

impl Explain for ErofsError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::TooManyXattrs | Self::TooLarge => ErrorKind::BadContent,
            Self::Write { source } if source.kind() == io::ErrorKind::StorageFull => ErrorKind::NoSpace,
            Self::Write { .. } => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self.kind() {
            ErrorKind::NoSpace => vec!["make room with `offshoot rm` and `offshoot image rm`".into()],
            _ => Vec::new(),
        }
    }
}

/// A finished image.
#[derive(Debug)]
pub struct Written {
    /// The file, not yet synced.
    pub file: File,
    /// Its size with the padding.
    pub size: u64,
    /// How many inodes it has.
    pub inodes: u64,
}

impl DataWriter {
    /// Writes all else for the files of `tree`, whose content was given to this writer; the data of files that are gone
    /// becomes holes. Nothing is synced. The UUID is all that distinguishes images of equal trees.
    pub fn finish(mut self, tree: &Tree, uuid: [u8; 16]) -> Result<Written, ErofsError> {
        self.flush().map_err(write_error)?;
        self.punch(tree.orphans()).map_err(write_error)?;
        let layout = lay_out(tree).map_err(|_| ErofsError::TooManyXattrs)?;
        let extra_at = self.end();
        let meta_block = extra_at + layout.extra_blocks;
        let blocks = meta_block + layout.metadata.div_ceil(BLOCK);
        let (Ok(meta_block_32), Ok(blocks_32)) = (u32::try_from(meta_block), u32::try_from(blocks)) else {
            return Err(ErofsError::TooLarge);
        };
        let (extra, metadata) = Tables {
            tree,
            layout: &layout,
            extra_at,
        }
        .fill();
        self.write_blocks(extra_at, &extra).map_err(write_error)?;
        drop(extra);
        self.write_blocks(meta_block, &metadata).map_err(write_error)?;
        let superblock = Superblock {
            // The root is first, so its number is small.
            root_nid: layout.places[Tree::ROOT.index()].nid as u16,
            inodes: layout.order.len() as u64,
            blocks: blocks_32,
            meta_block: meta_block_32,
            uuid,
        };
        self.write_blocks(0, &superblock.to_block())
            .map_err(write_error)?;
        let size = (blocks * BLOCK).next_multiple_of(FILE_ALIGN);
        self.file.set_len(size).map_err(write_error)?;
        Ok(Written {
            file: self.file,
            size,
            inodes: superblock.inodes,
        })
    }
}

fn write_error(source: io::Error) -> ErofsError {
    ErofsError::Write { source }
}

/// Fills the blocks of folders and the metadata.
struct Tables<'a> {
    tree: &'a Tree,
    layout: &'a Layout,
    extra_at: u64,
}

impl Tables<'_> {
    fn fill(&self) -> (Vec<u8>, Vec<u8>) {
        let mut extra = vec![0; (self.layout.extra_blocks * BLOCK) as usize];
        let mut metadata = vec![0; self.layout.metadata.next_multiple_of(BLOCK) as usize];
        for (number, id) in self.layout.order.iter().enumerate() {
            self.inode(*id, number, &mut extra, &mut metadata);
        }
        (extra, metadata)
    }

    fn inode(&self, id: InodeId, number: usize, extra: &mut [u8], metadata: &mut [u8]) {
        let inode = self.tree.inode(id);
        let place = self.layout.places[id.index()];
        let (split, content) = match &inode.node {
            Node::Dir(_) => (split(self.tree, id), self.dir_content(id, place)),
            Node::Symlink(target) => (split(self.tree, id), target.to_vec()),
            _ => (
                Split {
                    size: 0,
                    blocks: 0,
                    inline: 0,
                },
                Vec::new(),
            ),
        };
        debug_assert_eq!(split.size, content.len() as u64);
        let extra_block = (self.extra_at as u32) + place.blocks_at;
        let (type_bits, size, block_or_device, links) = match &inode.node {
            Node::Dir(_) => (mode::DIR, split.size, extra_block, 2 + self.subdirs(id)),
            Node::Symlink(_) => (mode::LINK, split.size, extra_block, inode.names),
            // The writer gives out no block beyond 32 bits.
            Node::File { size, extent } => (mode::FILE, *size, extent.0 as u32, inode.names),
            Node::CharDev { major, minor } => (mode::CHAR, 0, device_number(*major, *minor), inode.names),
            Node::BlockDev { major, minor } => (mode::BLOCK, 0, device_number(*major, *minor), inode.names),
            Node::Fifo => (mode::FIFO, 0, 0, inode.names),
        };
        let at = place.nid as usize * SLOT as usize;
        RawInode {
            layout: if split.inline > 0 {
                DataLayout::FlatInline
            } else {
                DataLayout::FlatPlain
            },
            type_bits,
            metadata: &inode.metadata,
            size,
            block_or_device,
            number: number as u32 + 1,
            links,
        }
        .write(&mut metadata[at..]);
        let (whole, tail) = content.split_at((content.len() as u64 - split.inline) as usize);
        extra[place.blocks_at as usize * BLOCK as usize..][..whole.len()].copy_from_slice(whole);
        let tail_at = at + core_size(self.tree, id) as usize;
        metadata[tail_at..][..tail.len()].copy_from_slice(tail);
    }

    fn subdirs(&self, dir: InodeId) -> u32 {
        let is_dir = |(_, child): &(&[u8], InodeId)| matches!(self.tree.inode(*child).node, Node::Dir(_));
        self.tree.children(dir).filter(is_dir).count() as u32
    }

    fn dir_content(&self, dir: InodeId, place: Place) -> Vec<u8> {
        let nid = |index: usize| u64::from(self.layout.places[index].nid);
        let names: Vec<Name<'_>> = sorted_names(self.tree, dir)
            .into_iter()
            .map(|(name, inode)| match inode {
                Some(child) => Name {
                    name,
                    nid: nid(child.index()),
                    kind: file_type(&self.tree.inode(child).node),
                },
                None if name == b"." => Name {
                    name,
                    nid: u64::from(place.nid),
                    kind: FileType::Dir,
                },
                None => Name {
                    name,
                    nid: nid(place.parent as usize),
                    kind: FileType::Dir,
                },
            })
            .collect();
        dirs::content(&names)
    }
}

fn file_type(node: &Node) -> FileType {
    match node {
        Node::Dir(_) => FileType::Dir,
        Node::File { .. } => FileType::Regular,
        Node::Symlink(_) => FileType::Symlink,
        Node::CharDev { .. } => FileType::CharDev,
        Node::BlockDev { .. } => FileType::BlockDev,
        Node::Fifo => FileType::Fifo,
    }
}
