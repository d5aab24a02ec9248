//! What the layers of an image hold, merged into one tree, without unpacking them anywhere.
//!
//! ```text
//! blob ─► decompress ─┬─► SHA-256 ─► compared with the diff id            stream
//!                     └─► tar ─┬─► names, owners, modes ─► LayerEntries   tarball, pax, sparse, entry
//!                              └─► content ─► ContentSink ─► Extent
//! LayerEntries, lowest layer first ─► Tree                                merge, tree
//! ```
//!
//! A layer is bytes from outside: every name is taken apart and checked here, nothing is ever looked up in a file
//! system, and what a layer may take is limited before it takes it ([`Limits`]). What cannot be unpacked faithfully is
//! an error that names the layer and the entry; nothing is skipped in silence but what the OCI image specification and
//! Linux say has no meaning (see `entry`).
//!
//! Where the content goes, and what the tree is made into, is the business of others: [`ContentSink`].

mod entry;
mod error;
mod merge;
mod path;
mod pax;
mod read;
mod sparse;
mod stream;
mod tarball;
mod tree;

pub use entry::{LayerEntries, Metadata, Time, Xattrs};
pub use error::{EntryProblem, LayerError, TarProblem};
pub use read::{Budget, ContentSink, Extent, LayerSource, Limits, Watch, read_layer};
pub use tree::{Dirent, Inode, InodeId, Node, Tree};

#[cfg(test)]
mod tests;
