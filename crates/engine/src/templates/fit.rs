//! Which VM can be restored from a template, and which boots its kernel. Pure.

use offshoot_model::{Boot, VmConfig};
use offshoot_rootfs::policy::RootKind;

/// Why a VM cannot be restored from any template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misfit {
    /// `--boot cold`.
    Asked,
    /// The tree is shown by a virtiofsd.
    VirtiofsRoot,
    /// The root is the VM's own disk.
    CopyRoot,
    /// Shared folders.
    Mounts,
}

impl Misfit {
    /// The reason, for people.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Asked => "asked for",
            Self::VirtiofsRoot => {
                "its root is shown by virtiofs, which shares the guest's memory with another process"
            }
            Self::CopyRoot => "its root is a private copy, which no other VM has",
            Self::Mounts => {
                "it has shared folders (`-v`), for which its memory is shared with another process"
            }
        }
    }

    /// What to do about it, for somebody who asked for a template.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::Asked => "leave `--boot cold` out",
            Self::VirtiofsRoot | Self::CopyRoot => "choose another root with `--root block`",
            Self::Mounts => "leave `-v` out and copy files with `offshoot cp`",
        }
    }
}

/// Why this VM cannot be restored; `None` when it can, if there is a template.
pub fn misfit(config: &VmConfig, root: RootKind) -> Option<Misfit> {
    if config.boot == Boot::Cold {
        return Some(Misfit::Asked);
    }
    match root {
        RootKind::Virtiofs => return Some(Misfit::VirtiofsRoot),
        RootKind::Copy => return Some(Misfit::CopyRoot),
        RootKind::Pmem | RootKind::Block => {}
    }
    (!config.mounts.is_empty()).then_some(Misfit::Mounts)
}
