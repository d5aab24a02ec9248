//! `kernel.json`: what a bundle is. The format is described in `docs/formats/kernel.md`.

use std::fmt;

use offshoot_model::{ByteSize, Digest};
use serde::{Deserialize, Serialize};

/// The version of a bundle's format: manifest, layout of the initramfs, rules for the agent.
pub const FORMAT: u32 = 1;
/// The largest `kernel.json`; ours have 2 KiB.
pub(crate) const MANIFEST_MAX: u64 = 256 << 10;

/// Where a kernel came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum KernelSource {
    /// A Debian package.
    Debian {
        /// Its name: `linux-image-6.12.1-cloud-amd64`.
        package: String,
        /// Its version.
        version: String,
    },
    /// Compiled on this host, all of it built in.
    Compiled {
        /// The source's package (`linux-source-6.12`), or `tarball`.
        package: String,
        /// The package's version, or the tarball's digest.
        version: String,
        /// The configuration fragment: ours, with what the user said otherwise.
        config: Digest,
        /// What the compiler calls itself.
        compiler: String,
    },
    /// The user's own files.
    Files,
}

impl fmt::Display for KernelSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Debian { package, version } => f.pad(&format!("debian {package} {version}")),
            Self::Compiled {
                package,
                version,
                config,
                ..
            } => {
                let config = config.to_string();
                // As many digits as tell a few apart.
                let config = config.trim_start_matches("sha256:").get(..8).unwrap_or_default();
                f.pad(&format!("compiled {package} {version} config {config}"))
            }
            Self::Files => f.pad("files"),
        }
    }
}

/// How it is known what is built into the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BuiltinKnowledge {
    /// `modules.builtin` lists it.
    Listed,
    /// The configuration inside the kernel says it.
    Config,
    /// Nothing says it: the user's kernel is taken to have everything.
    Assumed,
}

/// What a guest with this kernel can use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct KernelFeatures {
    /// virtio-blk disks with erofs, ext4 and overlayfs on them: always there.
    pub block: bool,
    /// virtio devices on PCI.
    pub pci: bool,
    /// virtio devices on MMIO.
    pub mmio: bool,
    /// A root on virtio-pmem.
    pub pmem: bool,
    /// Shared folders over virtiofs.
    pub virtiofs: bool,
    /// virtio network cards.
    pub net: bool,
    /// Sockets to the host.
    pub vsock: bool,
    /// Random numbers from the host.
    pub rng: bool,
    /// The memory balloon.
    pub balloon: bool,
    /// The kernel has a PVH entry, so a VMM can start the ELF without firmware.
    pub pvh: bool,
}

/// A file of a bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    /// Its size in bytes.
    pub size: ByteSize,
    /// Its content.
    pub digest: Digest,
}

/// What a bundle is, as kept beside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelManifest {
    /// [`FORMAT`].
    pub format: u32,
    /// The machine it runs on, as `uname -m` says it.
    pub arch: String,
    /// What `uname -r` says in the guest.
    pub release: String,
    /// Where the kernel came from.
    pub source: KernelSource,
    /// Every module in the initramfs, in the order of its first use.
    pub modules: Vec<String>,
    /// How it is known what is built in.
    pub builtin: BuiltinKnowledge,
    /// What a guest can use.
    pub features: KernelFeatures,
    /// The agent that is `/init`.
    pub agent: FileInfo,
    /// The kernel.
    pub vmlinux: FileInfo,
    /// The initramfs.
    pub initramfs: FileInfo,
    /// When the bundle was made, milliseconds since 1970.
    pub created_unix_ms: u64,
}
