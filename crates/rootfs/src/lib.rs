//! Prepared bases: what an image becomes once, so that its VMs need only clone two small files.
//!
//! - [`erofs`]: a writer of EROFS images, fed with the layers as they are read, so that no unpacked tree ever has to lie on
//!   disk; and a reader of what it wrote.
//! - [`seed`]: pristine ext4 disks and their clones.
//! - [`base`]: the store of bases; prepares an image once and publishes the result atomically.

mod room;

pub mod erofs;

pub mod seed;

pub mod base;
