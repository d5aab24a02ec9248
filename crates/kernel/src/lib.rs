//! Kernel bundles: a kernel that a VMM can start, and an initramfs with the agent and the modules that a guest needs.
//!
//! ```text
//! <data>/kernels/
//!   default                 the id of the bundle that new VMs get
//!   <id>/vmlinux            uncompressed ELF, started through its PVH entry
//!   <id>/initramfs          newc cpio: /init (the agent), /modules
//!   <id>/kernel.json        KernelManifest
//!
//! package ─apt─► vmlinuz ─┐
//! source ──make──► vmlinux┤
//! files ──────────────────┼─ vmlinux ──► ELF, release, PVH?  ─┐
//! modules ── modinfo ── plan ──────────► what to load, when  ─┼─ store ──► <data>/kernels/<id>/
//! agent ──────────────────────────────► initramfs            ─┘
//! ```
//!
//! A bundle never changes: its id is a hash over its files. A new agent makes a new bundle beside the old one, out of
//! the old one and without a network; see [`KernelStore::refresh`]. The formats are in `docs/formats/kernel.md`.
//!
//! Not here: starting VMs, and deciding which bundle may be removed.

mod bundle;
mod compile;
mod decompress;
mod distro;
mod initramfs;
mod manifest;
mod modinfo;
mod module_tree;
mod modules;
mod store;
mod version;
mod vmlinux;

pub use bundle::BuildError;
pub use compile::{CompileError, CompileOptions, FRAGMENT_MAX, FragmentError};
pub use decompress::DecompressError;
pub use distro::{DistroError, DistroOptions};
pub use initramfs::InitramfsError;
pub use manifest::{BuiltinKnowledge, FORMAT, FileInfo, KernelFeatures, KernelManifest, KernelSource};
pub use modules::{ModuleError, ModuleGroup};
pub use store::{FoundBundle, KernelBundle, KernelError, KernelStore};
pub use vmlinux::VmlinuxError;
