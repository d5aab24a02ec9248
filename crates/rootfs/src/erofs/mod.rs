//! EROFS images made straight from the layers of an image, and read back.
//!
//! ```text
//! block 0            superblock at byte 1024
//! data               contents of files, each at a block of its own; blocks of zeros and what no file has are holes
//! folders            whole blocks of large folders, long link targets
//! metadata           inodes, attributes, and what of folders and links fits behind their inode; the root first
//! padding            a hole up to a multiple of 2 MiB
//! ```
//!
//! The content of files is written while the layers stream in ([`DataWriter`]); once they are merged, [`finish`] gives
//! back what lower layers had and upper ones removed, and writes all else. Files are never compressed and never share
//! a block with metadata, so a guest that maps the image (virtio-pmem, DAX) uses the host's page cache as it is.
//!
//! [`ErofsImage`] reads such an image without the kernel, and [`Walk`] goes through all of its tree: bases are shown in
//! other forms, and checked, without being mounted.
//!
//! The same layers give the same bytes. `docs/formats/erofs.md` describes what is written.
//!
//! [`finish`]: DataWriter::finish

mod data;
mod dirs;
mod format;
mod layout;
mod write;

mod read;
mod walk;

pub use crate::room::SpaceGuard;
pub use data::DataWriter;
pub use read::{Dirent, ErofsImage, ErofsReadError, Inode, InodeKind};
pub use walk::{Step, Walk};
pub use write::{ErofsError, Written};
