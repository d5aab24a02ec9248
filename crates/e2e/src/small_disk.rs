//! A data directory on a small file system of its own: it can be filled, and made read-only, without harm to others.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{FallocateFlags, fallocate, statvfs};

use crate::Daemon;

/// What fills it. No name that a daemon would touch.
const BALLAST: &str = "ballast";

/// A mounted tmpfs; unmounted when dropped.
pub(crate) struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Makes the folder and mounts so many MiB there.
    pub(crate) fn mount(at: &Path, mib: u64) -> Self {
        std::fs::create_dir(at).expect("a folder");
        run(
            "mount",
            &["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs"],
            at,
        );
        Self(at.to_owned())
    }

    /// Makes the folder and mounts an XFS of so many MiB there, which lies in a file beside it.
    pub(crate) fn mount_xfs(at: &Path, mib: u64) -> Self {
        let file = at.with_extension("xfs");
        let made = File::create(&file).and_then(|file| file.set_len(mib << 20));
        made.expect("a file for the disk");
        run("mkfs.xfs", &["-q", "-m", "reflink=1"], &file);
        std::fs::create_dir(at).expect("a folder");
        run("mount", &["-o", "loop", &file.to_string_lossy()], at);
        Self(at.to_owned())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// A folder that is read-only for whoever opens something there by its path; until dropped.
#[derive(Debug)]
pub struct ReadOnly(PathBuf);

impl Drop for ReadOnly {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

impl Daemon {
    /// Fills the small disk until only so many KiB are left.
    pub fn fill_disk(&self, leave_kib: u64) {
        let data = self.small();
        let file = File::options()
            .append(true)
            .create(true)
            .open(data.join(BALLAST))
            .expect("the ballast");
        loop {
            let left = available(data).saturating_sub(leave_kib << 10);
            if left == 0 {
                return;
            }
            let length = file.metadata().expect("stat").len();
            // Somebody else may have taken some meanwhile: then less is tried.
            let _ = fallocate(&file, FallocateFlags::empty(), length, left);
        }
    }

    /// Takes away what filled the small disk.
    pub fn free_disk(&self) {
        std::fs::remove_file(self.small().join(BALLAST)).expect("remove the ballast");
    }

    /// Makes the data directory read-only for every open by path from now on. What is open already stays so: the kernel
    /// refuses to make a file system read-only that somebody writes to.
    pub fn close_data(&self) -> ReadOnly {
        let data = self.data();
        run("mount", &["--bind", &data.to_string_lossy()], &data);
        run("mount", &["-o", "remount,bind,ro"], &data);
        ReadOnly(data)
    }

    /// Makes the whole small disk read-only, or writable again. Nobody may have a file open there to write to.
    pub fn set_disk_read_only(&self, read_only: bool) {
        let how = if read_only { "remount,ro" } else { "remount,rw" };
        run("mount", &["-o", how], self.small());
    }

    fn small(&self) -> &Path {
        let disk = self.small_disk.as_ref().expect("a daemon on a small disk");
        &disk.0
    }
}

/// What is left for files, bytes.
fn available(at: &Path) -> u64 {
    let facts = statvfs(at).expect("statvfs");
    facts.f_bavail * facts.f_frsize
}

fn run(program: &str, arguments: &[&str], path: &Path) {
    let status = Command::new(program).args(arguments).arg(path).status();
    assert!(
        status.is_ok_and(|status| status.success()),
        "{program} {arguments:?} {}",
        path.display()
    );
}
