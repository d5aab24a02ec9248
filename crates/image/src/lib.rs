//! OCI images: references, registries, archives, and what their layers hold.

pub mod archive;
pub mod bootstrap;
pub mod layer;
pub mod manifest;
pub mod reference;
pub mod registry;
