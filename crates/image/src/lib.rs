//! OCI images: references, registries, archives, and what their layers hold.

pub mod platform;
pub mod reference;

mod index;
pub mod manifest;

pub mod archive;
pub mod bootstrap;
pub mod registry;

pub mod layer;

#[cfg(test)]
mod testing;
