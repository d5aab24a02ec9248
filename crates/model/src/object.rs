//! What a VM has in the host's kernel: recorded before it is made, so that a crash leaves nothing that nobody knows of.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What kind of thing. Each but interfaces and tables is named by a path that is there as long as the thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ObjectKind {
    /// A folder of sockets; the name is its path.
    Folder,
    /// A process; the name is the file that says which one.
    Process,
    /// A control group; the name is its folder.
    Cgroup,
    /// A TAP device; the name is the interface's.
    Tap,
    /// The bridge of a network; the name is the interface's.
    Bridge,
    /// The nftables tables of a daemon, one a family; the name is theirs.
    NftTable,
}

impl ObjectKind {
    /// The word that the database stores.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Folder => "folder",
            Self::Process => "process",
            Self::Cgroup => "cgroup",
            Self::Tap => "tap",
            Self::Bridge => "bridge",
            Self::NftTable => "nft-table",
        }
    }
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// One thing of a VM in the host's kernel.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KernelObject {
    /// What it is.
    pub kind: ObjectKind,
    /// Which one it is; unique among those of its kind on this host.
    pub name: String,
}
