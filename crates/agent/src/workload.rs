//! The mount namespace that the VM's own processes see.
//!
//! The agent stays in the initramfs. The namespace is made once, by a thread: it copies the agent's mounts, moves
//! `/sysroot` over `/` and keeps a descriptor. Whatever has to see what the guest sees runs in a thread of its own that
//! enters the namespace first, and a process that such a thread forks is born there. When the last process and thread
//! in it is gone and the descriptor is closed, the kernel unmounts everything in it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use rustix::fs::{Gid, Uid};
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, mount_move, unmount};
use rustix::thread::{
    LinkNameSpaceType, UnshareFlags, move_into_link_name_space, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid, unshare_unsafe,
};
use tokio::sync::oneshot;

use crate::users::Identity;

/// Mounts of the initramfs that the VM's processes have no use for.
const NOT_FOR_THE_GUEST: [&str; 5] = ["/lower", "/overlay", "/proc", "/sys", "/dev"];

/// A handle on the namespace.
#[derive(Debug)]
pub(crate) struct Workload {
    namespace: File,
}

fn own_namespace() -> io::Result<File> {
    File::open("/proc/thread-self/ns/mnt")
}

impl Workload {
    /// Makes the namespace with `new_root` as its root, and runs `prepare` in it, which must mount `/proc`.
    ///
    /// Blocks. When it fails, nothing of the namespace is left.
    pub(crate) fn create<T, E>(
        new_root: &'static str,
        prepare: impl FnOnce() -> Result<T, E> + Send + 'static,
    ) -> Result<(Self, T), E>
    where
        T: Send + 'static,
        E: From<io::Error> + Send + 'static,
    {
        let thread = std::thread::Builder::new()
            .name("workload".to_owned())
            .spawn(move || {
                // SAFETY: this thread shares nothing but memory and descriptors with the others afterwards, and uses no
                // paths of theirs.
                unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }.map_err(io::Error::from)?;
                move_root(new_root)?;
                let prepared = prepare()?;
                // As on any machine, so that namespaces made in the guest see what is mounted later.
                mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC)
                    .map_err(io::Error::from)?;
                Ok((
                    Self {
                        namespace: own_namespace()?,
                    },
                    prepared,
                ))
            })?;
        thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread that makes the namespace panicked").into()))
    }

    /// The descriptor's number, for PID 1 to find it.
    pub(crate) fn raw_fd(&self) -> i32 {
        self.namespace.as_raw_fd()
    }

    /// Runs `job` in a new thread that sees what the guest sees. The thread runs to its end also when the future is
    /// dropped.
    pub(crate) async fn run<T>(self: &Arc<Self>, job: impl FnOnce() -> T + Send + 'static) -> io::Result<T>
    where
        T: Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let workload = Arc::clone(self);
        std::thread::Builder::new()
            .name("in-guest".to_owned())
            .spawn(move || {
                let result = workload.enter();
                // A thread in the namespace keeps it; the handle is not needed any more.
                drop(workload);
                drop(answer.send(result.map(|()| job())));
            })?;
        answered
            .await
            .unwrap_or_else(|_| Err(io::Error::other("a thread in the guest's namespace panicked")))
    }

    /// Runs `job` as somebody in the guest: what it opens, makes and binds is theirs.
    pub(crate) async fn run_as<T>(
        self: &Arc<Self>,
        who: &Identity,
        job: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T>
    where
        T: Send + 'static,
    {
        let (uid, gid) = (Uid::from_raw(who.uid), Gid::from_raw(who.gid));
        let groups: Vec<Gid> = who.groups.iter().copied().map(Gid::from_raw).collect();
        let result = self.run(move || {
            // These change this thread alone, which ends with the job.
            set_thread_groups(&groups)?;
            set_thread_res_gid(gid, gid, gid)?;
            set_thread_res_uid(uid, uid, uid)?;
            job()
        });
        result.await?
    }

    fn enter(&self) -> io::Result<()> {
        // SAFETY: the thread has its own root and working directory from here on, and is one of ours.
        unsafe { unshare_unsafe(UnshareFlags::FS) }?;
        // The kernel sets root and working directory to the namespace's topmost root.
        Ok(move_into_link_name_space(
            self.namespace.as_fd(),
            Some(LinkNameSpaceType::Mount),
        )?)
    }
}

#[cfg(test)]
impl Workload {
    /// The namespace that the caller is in.
    pub(crate) fn here() -> io::Result<Self> {
        Ok(Self {
            namespace: own_namespace()?,
        })
    }
}

fn move_root(new_root: &str) -> io::Result<()> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    for target in NOT_FOR_THE_GUEST {
        // Not everything is mounted for every kind of root.
        let _ = unmount(target, UnmountFlags::DETACH);
    }
    rustix::process::chdir(new_root)?;
    mount_move(new_root, "/")?;
    rustix::process::chroot(".")?;
    Ok(rustix::process::chdir("/")?)
}
