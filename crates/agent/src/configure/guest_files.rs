//! What is prepared inside the VM's own namespace: kernel file systems, devices and the work disk, which are those of any VM;
//! then what makes it this one: `names`, ids and shares.
//!
//! Everything here runs with the guest's root, so the image's symlinks lead where the image meant.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use offshoot_agent_proto::v1;
use rustix::mount::{MountFlags, mount};

use super::names::{self, Names};
use super::{ConfigureError, Stages, disk};
use crate::log;

/// What makes a guest this VM and no other.
pub(super) struct OwnPlan {
    pub(super) names: Names,
    /// For machine-id(5); empty leaves what the image has.
    pub(super) machine_id: String,
    /// The kernel's is that of all guests that go on from the same saved one.
    pub(super) new_boot_id: bool,
    pub(super) mounts: Vec<v1::SharedMount>,
}

struct KernelMount {
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    options: Option<&'static std::ffi::CStr>,
    required: bool,
}

const fn kernel_mount(kind: &'static str, target: &'static str, flags: MountFlags) -> KernelMount {
    KernelMount {
        kind,
        target,
        flags,
        options: None,
        required: true,
    }
}

/// In order: each may be the mount point of the next.
const KERNEL_MOUNTS: [KernelMount; 9] = {
    const HIDDEN: MountFlags = MountFlags::NOSUID
        .union(MountFlags::NOEXEC)
        .union(MountFlags::NODEV);
    const PLAIN: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);
    [
        kernel_mount("proc", "/proc", HIDDEN),
        kernel_mount("sysfs", "/sys", HIDDEN),
        KernelMount {
            options: Some(c"nsdelegate,memory_recursiveprot"),
            required: false,
            ..kernel_mount("cgroup2", "/sys/fs/cgroup", HIDDEN)
        },
        kernel_mount("devtmpfs", "/dev", MountFlags::NOSUID),
        KernelMount {
            options: Some(c"newinstance,gid=5,mode=620,ptmxmode=666"),
            ..kernel_mount("devpts", "/dev/pts", MountFlags::NOSUID.union(MountFlags::NOEXEC))
        },
        KernelMount {
            options: Some(c"mode=1777"),
            ..kernel_mount("tmpfs", "/dev/shm", PLAIN)
        },
        KernelMount {
            required: false,
            ..kernel_mount("mqueue", "/dev/mqueue", HIDDEN)
        },
        KernelMount {
            options: Some(c"mode=755"),
            ..kernel_mount("tmpfs", "/run", PLAIN)
        },
        KernelMount {
            options: Some(c"mode=1777"),
            ..kernel_mount("tmpfs", "/tmp", PLAIN)
        },
    ]
};

/// Links that programs expect in `/dev`.
const DEV_LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Prepares the guest's tree, with the work disk's device at `/root`.
pub(super) fn prepare(work: Option<&Path>, stages: &mut Stages) -> Result<(), ConfigureError> {
    for wanted in &KERNEL_MOUNTS {
        match kernel_file_system(wanted) {
            Err(error) if !wanted.required => log::info(error),
            result => result?,
        }
    }
    for (target, link) in DEV_LINKS {
        match symlink(target, link) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(ConfigureError::step(format!("make {link}"))(error));
            }
            _ => {}
        }
    }
    // Debian's tools and others lock here.
    let lock = fs::create_dir("/run/lock")
        .and_then(|()| fs::set_permissions("/run/lock", fs::Permissions::from_mode(0o1777)));
    lock.map_err(ConfigureError::step("make /run/lock"))?;
    stages.end("guest-files");
    if let Some(device) = work {
        disk::mount_ext4(device, "/root")?;
        stages.end("work-disk");
    }
    Ok(())
}

/// Makes the tree this VM's.
pub(super) fn make_own(plan: &OwnPlan, stages: &mut Stages) -> Result<(), ConfigureError> {
    ensure_folder(Path::new("/etc"))
        .and_then(|()| names::write(Path::new("/"), &plan.names))
        .and_then(|()| names::write_machine_id(Path::new("/"), &plan.machine_id))
        .map_err(ConfigureError::step("write the guest's names below /etc"))?;
    if plan.new_boot_id {
        cover_boot_id().map_err(ConfigureError::step("give the guest a boot id of its own"))?;
    }
    stages.end("own-files");
    for share in &plan.mounts {
        mount_share(share)?;
    }
    if !plan.mounts.is_empty() {
        stages.end("shares");
    }
    Ok(())
}

/// Puts a boot id of its own over the kernel's, which cannot be changed.
fn cover_boot_id() -> io::Result<()> {
    const KERNELS: &str = "/proc/sys/kernel/random/boot_id";
    const OURS: &str = "/run/.boot_id";
    // A UUID of random bytes, as the kernel's own is one. The entropy was renewed before.
    let id = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    fs::write(OURS, id)?;
    fs::set_permissions(OURS, fs::Permissions::from_mode(0o444))?;
    rustix::mount::mount_bind(OURS, KERNELS)?;
    // The mount keeps the file.
    fs::remove_file(OURS)
}

fn kernel_file_system(wanted: &KernelMount) -> Result<(), ConfigureError> {
    let mounted = ensure_folder(Path::new(wanted.target)).and_then(|()| {
        mount(
            wanted.kind,
            wanted.target,
            wanted.kind,
            wanted.flags,
            wanted.options,
        )
        .map_err(io::Error::from)
    });
    mounted.map_err(|source| ConfigureError::Mount {
        what: wanted.kind.to_owned(),
        target: wanted.target.to_owned(),
        source,
    })
}

/// Makes a mount point where there is none. What is not a folder is the image's own mistake.
fn ensure_folder(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        Ok(())
    } else {
        fs::create_dir_all(path)
    }
}

fn mount_share(share: &v1::SharedMount) -> Result<(), ConfigureError> {
    let flags = if share.read_only {
        MountFlags::RDONLY
    } else {
        MountFlags::empty()
    };
    let mounted = ensure_folder(Path::new(&share.target))
        .and_then(|()| mount(&share.tag, &share.target, "virtiofs", flags, None).map_err(io::Error::from));
    mounted.map_err(|source| ConfigureError::Mount {
        what: format!("share {}", share.tag),
        target: share.target.clone(),
        source,
    })
}
