//! A folder that a child sees with fewer rights than we do, because it has mounts of its own.
//!
//! ```text
//! our mounts   /  /srv/data (read-write)      /srv/data/usb
//! the child's  /  /srv/data (read-only, nodev) /srv/data/usb (read-only, nodev), bound over the same paths
//! ```
//!
//! Nothing that is mounted in the child appears in our namespace. What we unmount later goes away in the child too,
//! except below the folder: that is a copy of its own, and what is mounted there later stays out of it.
//!
//! Sources: open_tree(2), mount_setattr(2), move_mount(2), mount_namespaces(7). Linux 5.12.

use std::ffi::CStr;
use std::os::fd::RawFd;
use std::path::{Component, PathBuf};

/// A folder that a child sees without device nodes, and perhaps only to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BoundFolder {
    /// The folder, an absolute path without `..` and symbolic links; not `/`, which nothing can be bound over.
    pub path: PathBuf,
    /// Whether writing to it, and to everything that is mounted below it, fails with `EROFS` in the child.
    pub read_only: bool,
}

impl BoundFolder {
    /// Whether the path is one that a mount can hide from its own process.
    pub(super) fn is_possible(&self) -> bool {
        let mut parts = self.path.components();
        let below_root = parts.next() == Some(Component::RootDir) && self.path.file_name().is_some();
        below_root && parts.all(|part| matches!(part, Component::Normal(_)))
    }
}

/// The steps of [`bind`], in order.
pub(super) const STEPS: [&str; 5] = [
    "make a mount namespace",
    "detach its mounts from ours",
    "copy the mounts of the folder to bind",
    "take rights from the folder to bind",
    "bind the folder",
];

/// `struct mount_attr` of `linux/mount.h`.
#[repr(C)]
pub(super) struct MountAttr {
    pub(super) attr_set: u64,
    pub(super) attr_clr: u64,
    pub(super) propagation: u64,
    pub(super) userns_fd: u64,
}

pub(super) const MOUNT_ATTR_RDONLY: u64 = 0x1;
pub(super) const MOUNT_ATTR_NODEV: u64 = 0x4;
const OPEN_TREE_CLONE: libc::c_uint = 1;
const OPEN_TREE_CLOEXEC: libc::c_uint = libc::O_CLOEXEC as libc::c_uint;
const AT_RECURSIVE: libc::c_uint = libc::AT_RECURSIVE as libc::c_uint;
const AT_EMPTY_PATH: libc::c_uint = libc::AT_EMPTY_PATH as libc::c_uint;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 0x4;

/// Gives the calling process mounts of its own, with `path` bound on itself; the index of the step that failed if not.
///
/// The copy loses its rights before it is put into place, so there is no moment with more of them.
///
/// # Safety
/// Only in a freshly forked child: replaces its mount namespace. Makes raw system calls and allocates nothing.
pub(super) unsafe fn bind(path: &CStr, read_only: bool) -> Result<(), u8> {
    // SAFETY: the strings are NUL-terminated, and `attr` has the size that is given with it.
    unsafe {
        if libc::syscall(libc::SYS_unshare, libc::CLONE_NEWNS) < 0 {
            return Err(0);
        }
        let none = std::ptr::null::<libc::c_char>();
        let slave = libc::MS_REC | libc::MS_SLAVE;
        if libc::syscall(libc::SYS_mount, none, c"/".as_ptr(), none, slave, none) < 0 {
            return Err(1);
        }
        let flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE;
        let tree = libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags);
        if tree < 0 {
            return Err(2);
        }
        let attr = MountAttr {
            attr_set: MOUNT_ATTR_NODEV | if read_only { MOUNT_ATTR_RDONLY } else { 0 },
            attr_clr: 0,
            // Or a file system that is mounted below the folder later would appear in it, writable.
            propagation: libc::MS_PRIVATE,
            userns_fd: 0,
        };
        if mount_setattr(tree as RawFd, true, &attr) < 0 {
            return Err(3);
        }
        let (empty, flags) = (c"".as_ptr(), MOVE_MOUNT_F_EMPTY_PATH);
        if libc::syscall(
            libc::SYS_move_mount,
            tree,
            empty,
            libc::AT_FDCWD,
            path.as_ptr(),
            flags,
        ) < 0
        {
            return Err(4);
        }
        libc::syscall(libc::SYS_close, tree);
    }
    Ok(())
}

/// Changes a mount that is open under `mount`, or with `recursive` also all that are below it.
///
/// # Safety
/// Makes a raw system call and allocates nothing: also for a freshly forked child. The descriptor must be the caller's.
pub(super) unsafe fn mount_setattr(mount: RawFd, recursive: bool, attr: &MountAttr) -> libc::c_long {
    let flags = if recursive {
        AT_EMPTY_PATH | AT_RECURSIVE
    } else {
        AT_EMPTY_PATH
    };
    // SAFETY: the string is NUL-terminated, and `attr` has the size that is given with it.
    unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount,
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attr),
            size_of::<MountAttr>(),
        )
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use super::super::{DetachedCommand, Exit, SpawnError, is_root, spawn_detached};
    use super::*;

    fn host_mounts() -> String {
        std::fs::read_to_string("/proc/self/mountinfo").unwrap()
    }

    fn mount(arguments: &[&str], point: &Path) {
        let done = Command::new("mount").args(arguments).arg(point).status().unwrap();
        assert!(done.success());
    }

    struct Unmount<'a>(&'a Path);

    impl Drop for Unmount<'_> {
        fn drop(&mut self) {
            let done = Command::new("umount").arg(self.0).status().unwrap();
            assert!(done.success());
        }
    }

    async fn run(folder: &BoundFolder, script: &str) -> (Option<Exit>, String) {
        let out = tempfile::NamedTempFile::new().unwrap();
        let (_, process) = spawn_detached(DetachedCommand {
            args: vec!["-c".into(), script.into()],
            env: vec![("PATH".into(), "/usr/bin:/bin:/usr/sbin:/sbin".into())],
            bound_folder: Some(folder.clone()),
            cwd: folder.path.clone(),
            output: Some(out.reopen().unwrap().into()),
            ..DetachedCommand::new("/bin/sh")
        })
        .unwrap();
        let exit = process.wait_exit().await;
        (exit, std::fs::read_to_string(out.path()).unwrap())
    }

    const TRY: &str = "for f in a sub/a; do echo x >$f && echo wrote $f; done; touch sub/old";

    #[tokio::test]
    async fn a_read_only_folder_refuses_writes_in_the_child_and_nowhere_else() {
        if !is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let sub = dir.path().join("sub");
        std::fs::create_dir(&sub).unwrap();
        mount(&["-t", "tmpfs", "none"], &sub);
        let _unmount = Unmount(&sub);
        std::fs::write(sub.join("old"), "").unwrap();
        let mounts = |text: &str| {
            text.lines()
                .filter(|l| l.contains(dir.path().to_str().unwrap()))
                .count()
        };
        let before = mounts(&host_mounts());
        let mut folder = BoundFolder {
            path: dir.path().to_owned(),
            read_only: true,
        };
        let (exit, said) = run(&folder, TRY).await;
        assert_eq!(exit, Some(Exit::Code(1)));
        assert_eq!(said.matches("Read-only file system").count(), 3, "{said}");
        assert!(!said.contains("wrote"), "{said}");
        // By its absolute path as by its working directory, and nothing of it is left with us.
        let (_, said) = run(&folder, &format!("echo x >{}/b", dir.path().display())).await;
        assert!(said.contains("Read-only file system"), "{said}");
        assert_eq!(mounts(&host_mounts()), before);

        folder.read_only = false;
        let (exit, said) = run(&folder, TRY).await;
        assert_eq!(
            (exit, said.as_str()),
            (Some(Exit::Code(0)), "wrote a\nwrote sub/a\n")
        );
        assert_eq!(std::fs::read_to_string(sub.join("a")).unwrap(), "x\n");
        assert_eq!(mounts(&host_mounts()), before);
    }

    #[tokio::test]
    async fn device_nodes_in_the_folder_are_dead() {
        if !is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let node = dir.path().join("null");
        let made = Command::new("mknod")
            .arg(&node)
            .args(["c", "1", "3"])
            .status()
            .unwrap();
        assert!(made.success());
        let folder = BoundFolder {
            path: dir.path().to_owned(),
            read_only: false,
        };
        let (_, said) = run(&folder, "cat null").await;
        assert!(said.contains("Permission denied"), "{said}");
        std::fs::read(&node).unwrap();
    }

    #[tokio::test]
    async fn what_would_not_take_effect_is_refused() {
        for path in ["/", "/.", "/..", "/usr/..", "usr", ""] {
            let error = spawn_detached(DetachedCommand {
                bound_folder: Some(BoundFolder {
                    path: path.into(),
                    read_only: true,
                }),
                ..DetachedCommand::new("/bin/true")
            })
            .unwrap_err();
            assert!(
                matches!(error, SpawnError::BoundFolder { .. }),
                "{path}: {error:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_folder_that_is_not_there_is_said_so() {
        if !is_root() {
            return;
        }
        let error = spawn_detached(DetachedCommand {
            bound_folder: Some(BoundFolder {
                path: "/no/such/folder".into(),
                read_only: true,
            }),
            ..DetachedCommand::new("/bin/true")
        })
        .unwrap_err();
        let SpawnError::Child { step, source, .. } = error else {
            panic!("{error:?}")
        };
        assert_eq!(step, STEPS[2]);
        assert_eq!(source.kind(), std::io::ErrorKind::NotFound);
    }
}
