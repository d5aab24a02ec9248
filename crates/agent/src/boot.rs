//! The first steps of PID 1: the file systems that everything else looks into, then the modules.

use std::io;
use std::path::Path;

use rustix::mount::{MountFlags, mount};

use crate::{log, modules};

/// What PID 1 could not do without.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    /// A kernel file system.
    #[error("cannot mount {target}: {source}")]
    Mount {
        /// Where.
        target: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Mounts `/proc`, `/sys` and `/dev` of the initramfs and loads the modules that this machine needs.
pub(crate) fn prepare() -> Result<(), BootError> {
    let hidden = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    for (target, kind, flags) in [
        ("/dev", "devtmpfs", MountFlags::NOSUID),
        ("/proc", "proc", hidden),
        ("/sys", "sysfs", hidden),
    ] {
        let mounted = std::fs::create_dir_all(target)
            .and_then(|()| mount(kind, target, kind, flags, None).map_err(io::Error::from));
        match mounted {
            // The kernel may have mounted /dev already.
            Err(source) if source.raw_os_error() == Some(libc::EBUSY) => {}
            result => result.map_err(|source| BootError::Mount { target, source })?,
        }
    }
    modules::load(Path::new(modules::FOLDER), Path::new(modules::VIRTIO_DEVICES));
    log::info(format_args!("version {}", env!("CARGO_PKG_VERSION")));
    Ok(())
}
