//! Prepared bases against the real thing: mounts of the host's kernel, `fsck.erofs`, `umoci`. Needs root.

#![expect(
    clippy::print_stderr,
    reason = "a test that cannot run says so where people see it"
)]

mod place;
mod support;

mod base;
mod erofs;
mod read;

mod copy;
mod seeds;
mod tree;
mod umoci;
