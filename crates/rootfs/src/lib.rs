//! Prepared bases: what an image becomes once, so that its VMs need only clone two small files.
//!
//! - [`erofs`]: a writer of EROFS images, fed with the layers as they are read, so that no unpacked tree ever has to lie on
//!   disk; and a reader of what it wrote.
//! - [`unpack`]: an image's tree as files, for the root back ends that need them; [`compare`] tells whether it still is.
//! - [`seed`]: pristine ext4 disks and their clones; [`copy`]: whole trees on a disk of their own.
//! - [`policy`]: which root back end a VM gets.
//! - [`base`]: the store of bases; prepares an image once and publishes the result atomically.

mod room;

pub mod erofs;

pub mod compare;
pub mod unpack;

pub mod copy;
pub mod seed;

pub mod base;

pub mod policy;
