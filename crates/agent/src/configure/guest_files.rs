//! What is prepared inside the VM's own namespace: kernel file systems, devices, names, work disk and shares.
//!
//! Everything here runs with the guest's root, so the image's symlinks lead where the image meant.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use offshoot_agent_proto::v1;
use rustix::mount::{MountFlags, mount};

use super::{ConfigureError, Stages, disk};
use crate::log;
use crate::spawn::write_file;

/// The largest `/etc/hosts` that is looked at.
const MAX_HOSTS: u64 = 1 << 20;

pub(super) struct GuestPlan {
    pub(super) hostname: String,
    pub(super) work: Option<PathBuf>,
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

/// Prepares the guest's tree; returns the timed steps.
pub(super) fn prepare(plan: &GuestPlan) -> Result<Vec<v1::GuestStage>, ConfigureError> {
    let mut stages = Stages::new();
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
    write_names(&plan.hostname).map_err(ConfigureError::step("write the host's name below /etc"))?;
    stages.end("guest-files");
    if let Some(device) = &plan.work {
        disk::mount_ext4(device, "/root")?;
        stages.end("work-disk");
    }
    for share in &plan.mounts {
        mount_share(share)?;
    }
    if !plan.mounts.is_empty() {
        stages.end("shares");
    }
    Ok(stages.done)
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

/// Writes `/etc/hostname` and `/etc/hosts` where they don't say it already, so that a restart writes nothing.
fn write_names(hostname: &str) -> io::Result<()> {
    ensure_folder(Path::new("/etc"))?;
    let line = format!("{hostname}\n");
    if fs::read_to_string("/etc/hostname").ok().as_ref() != Some(&line) {
        write_file("/etc/hostname", &line)?;
    }
    let known = fs::metadata("/etc/hosts")
        .ok()
        .filter(|metadata| metadata.len() <= MAX_HOSTS);
    let hosts = known.and_then(|_| fs::read_to_string("/etc/hosts").ok());
    match hosts_with(hosts.as_deref().unwrap_or_default(), hostname) {
        Some(hosts) => write_file("/etc/hosts", &hosts),
        None => Ok(()),
    }
}

/// The hosts file that also knows the guest's own name (hosts(5)); nothing when it does already. Docker writes such a
/// file into every container, and users expect their name to resolve.
fn hosts_with(hosts: &str, hostname: &str) -> Option<String> {
    const LOCALHOST: &str = "127.0.0.1\tlocalhost\n\
        ::1\tlocalhost ip6-localhost ip6-loopback\n\
        fe00::\tip6-localnet\n\
        ff00::\tip6-mcastprefix\n\
        ff02::1\tip6-allnodes\n\
        ff02::2\tip6-allrouters\n";
    // The address Debian gives to a machine's own name.
    const OWN_ADDRESS: &str = "127.0.1.1";
    let fields = |line: &str| -> Vec<String> {
        let line = line.split('#').next().unwrap_or_default();
        line.split_whitespace().map(str::to_owned).collect()
    };
    let names = |name: &str| {
        hosts
            .lines()
            .any(|line| fields(line).iter().skip(1).any(|known| known == name))
    };
    if names(hostname) {
        return None;
    }
    // A name it had before, as when an image was made of a VM.
    let mut new: String = hosts
        .lines()
        .filter(|line| fields(line).first().is_none_or(|address| address != OWN_ADDRESS))
        .map(|line| format!("{line}\n"))
        .collect();
    if !names("localhost") {
        new.insert_str(0, LOCALHOST);
    }
    if hostname != "localhost" {
        new.push_str(&format!("{OWN_ADDRESS}\t{hostname}\n"));
    }
    Some(new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_file_knows_the_guest_once() {
        let first = hosts_with("", "vm").unwrap();
        assert!(
            first.starts_with("127.0.0.1\tlocalhost\n") && first.ends_with("127.0.1.1\tvm\n"),
            "{first}"
        );
        assert_eq!(hosts_with(&first, "vm"), None);
        let renamed = hosts_with(&first, "other").unwrap();
        assert_eq!(renamed, first.replace("127.0.1.1\tvm", "127.0.1.1\tother"));
        let own = hosts_with("127.0.0.1 localhost\n10.0.0.1 db # vm", "vm").unwrap();
        assert_eq!(own, "127.0.0.1 localhost\n10.0.0.1 db # vm\n127.0.1.1\tvm\n");
        assert_eq!(hosts_with("127.0.0.1 localhost vm", "vm"), None);
    }
}
