//! The root: the shared read-only tree below, the VM's own disk above.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use rustix::mount::{MountFlags, mount};

use super::disk::{self, Disk};
use super::{ConfigureError, Lower, RootPlan, Stages, device};

/// Where the new root is put together.
pub(super) const SYSROOT: &str = "/sysroot";

const LOWER: &str = "/lower";
const OVERLAY: &str = "/overlay";
const UPPER: &str = "/overlay/upper";
const WORK: &str = "/overlay/work";

/// The overlay's options. Without redirects, metadata-only copies and an index every upper layer is what OCI layers
/// are: whole files and whiteouts, which `commit` packs.
const OVERLAY_OPTIONS: &std::ffi::CStr =
    c"lowerdir=/lower,upperdir=/overlay/upper,workdir=/overlay/work,redirect_dir=off,metacopy=off,index=off,xino=auto";

/// Mounts the root on [`SYSROOT`]; returns the disks that are written to.
pub(super) fn mount_root(plan: &RootPlan, stages: &mut Stages) -> Result<Vec<Disk>, ConfigureError> {
    match plan {
        RootPlan::Copy { serial } => {
            let device = disk::find(serial)?;
            disk::mount_ext4(&device, SYSROOT)?;
            stages.end("root");
            Ok(vec![Disk {
                device,
                mounted_on: None,
            }])
        }
        RootPlan::Overlay {
            lower,
            overlay_serial,
        } => {
            mount_lower(lower)?;
            stages.end("root");
            let device = disk::find(overlay_serial)?;
            disk::mount_ext4(&device, OVERLAY)?;
            stages.end("overlay-disk");
            ensure_layers().map_err(ConfigureError::step("make the overlay's folders"))?;
            fs::create_dir_all(SYSROOT).map_err(ConfigureError::step("make /sysroot"))?;
            mount(
                "overlay",
                SYSROOT,
                "overlay",
                MountFlags::NOATIME,
                OVERLAY_OPTIONS,
            )
            .map_err(|error| ConfigureError::Mount {
                what: "overlay".to_owned(),
                target: SYSROOT.to_owned(),
                source: error.into(),
            })?;
            stages.end("overlay");
            Ok(vec![Disk {
                device,
                mounted_on: Some(OVERLAY),
            }])
        }
    }
}

/// Mounts the image, unless a rehearsal did.
pub(super) fn mount_lower(lower: &Lower) -> Result<(), ConfigureError> {
    fs::create_dir_all(LOWER).map_err(ConfigureError::step("make /lower"))?;
    if is_mounted(LOWER).map_err(ConfigureError::step("look at /lower"))? {
        return Ok(());
    }
    let (source, kind, options) = match lower {
        Lower::Block { serial } => (disk::find(serial)?, "erofs", None),
        Lower::Pmem { index } => {
            let device = device(&format!("pmem{index}"));
            disk::wait_for(&format!("the persistent memory {}", device.display()), || {
                disk::opens(&device).then_some(())
            })?;
            (device, "erofs", Some(c"dax=always"))
        }
        Lower::Virtiofs { tag } => (Path::new(tag).to_owned(), "virtiofs", None),
    };
    mount(
        &source,
        LOWER,
        kind,
        MountFlags::RDONLY | MountFlags::NOATIME,
        options,
    )
    .map_err(|error| ConfigureError::Mount {
        what: format!("{kind} of {}", source.display()),
        target: LOWER.to_owned(),
        source: error.into(),
    })
}

/// What the first processes of most images read, below the root. A copy of each libc, and what is started through it.
const READ_FIRST: [&str; 18] = [
    "etc/ld.so.cache",
    "etc/passwd",
    "etc/group",
    "etc/nsswitch.conf",
    "lib64/ld-linux-x86-64.so.2",
    "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
    "lib/x86_64-linux-gnu/libc.so.6",
    "lib/x86_64-linux-gnu/libtinfo.so.6",
    "lib/x86_64-linux-gnu/libselinux.so.1",
    "lib/x86_64-linux-gnu/libpcre2-8.so.0",
    "lib/ld-musl-x86_64.so.1",
    "bin/sh",
    "bin/bash",
    "bin/busybox",
    "bin/true",
    "bin/cat",
    "bin/sleep",
    "sbin/init",
];

/// No file of them is larger; one that is, is none of them.
const READ_MOST: u64 = 8 << 20;

/// Reads what is read first, so that it is in memory when the guest is saved. What an image lacks, it lacks.
pub(super) fn read_ahead() {
    for name in READ_FIRST {
        let path = Path::new(LOWER).join(name);
        // Not through links that lead out of the image.
        let inside = path.canonicalize().is_ok_and(|path| path.starts_with(LOWER));
        let plain = fs::metadata(&path).is_ok_and(|meta| meta.is_file() && meta.len() <= READ_MOST);
        if inside && plain {
            drop(fs::read(path));
        }
    }
}

fn is_mounted(folder: &str) -> io::Result<bool> {
    Ok(fs::metadata(folder)?.dev() != fs::metadata("/")?.dev())
}

/// Makes the overlay's two folders on a new disk; the upper one stands for `/`, so it looks like the image's.
fn ensure_layers() -> io::Result<()> {
    fs::create_dir_all(WORK)?;
    if !fs::exists(UPPER)? {
        fs::create_dir(UPPER)?;
        let image = fs::metadata(LOWER)?;
        std::os::unix::fs::chown(UPPER, Some(image.uid()), Some(image.gid()))?;
        fs::set_permissions(UPPER, fs::Permissions::from_mode(image.mode() & 0o7777))?;
    }
    debug_assert!(Path::new(UPPER).starts_with(OVERLAY));
    Ok(())
}
