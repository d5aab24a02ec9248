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

fn mount_lower(lower: &Lower) -> Result<(), ConfigureError> {
    fs::create_dir_all(LOWER).map_err(ConfigureError::step("make /lower"))?;
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
