//! The root of a confined child, made by us while it is nobody's: places for what it will see, and the mounts that come there.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, mkdirat, mknodat, symlinkat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen, open_tree,
};

use super::{Access, ConfinementError, MountAttr, Visible, mount_setattr};
use crate::process::bound_folder::{MOUNT_ATTR_NODEV, MOUNT_ATTR_RDONLY};

const MOUNT_ATTR_NOSUID: u64 = 0x2;
const MOUNT_ATTR_NOEXEC: u64 = 0x8;
/// Folders that can be entered and files that hold nothing.
const FOLDER: Mode = Mode::from_raw_mode(0o755);
const FILE: Mode = Mode::from_raw_mode(0o444);

/// A root, and what is to be mounted where in it, in order; the paths are relative to it.
pub(super) fn make(files: &[Visible]) -> Result<(OwnedFd, Vec<(OwnedFd, CString)>), ConfinementError> {
    let failed = |error: Errno| ConfinementError::Root { source: error.into() };
    let root = empty().map_err(failed)?;
    mkdirat(&root, "proc", FOLDER).map_err(failed)?;
    let mut mounts = Vec::new();
    // Folders that are mounted: what lies below them is there already.
    let mut folders: Vec<&Path> = Vec::new();
    for (path, access) in by_path(files)? {
        let show = |error: io::Error| ConfinementError::Show {
            path: path.to_owned(),
            source: error,
        };
        let inside = path.strip_prefix("/").unwrap_or(path);
        let covered = folders.iter().any(|folder| path.starts_with(folder));
        let Ok(meta) = path.symlink_metadata() else {
            continue;
        };
        if meta.is_symlink() && access == Access::Program {
            if !covered {
                let target = std::fs::read_link(path).map_err(show)?;
                make_parents(&root, inside).map_err(show)?;
                symlinkat(&target, &root, inside).map_err(|error| show(error.into()))?;
            }
            continue;
        }
        if covered && access == Access::Read {
            continue;
        }
        let tree = match open(path, access) {
            Ok(tree) => tree,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(show(error)),
        };
        let is_folder = path.is_dir();
        if !covered {
            make_place(&root, inside, is_folder).map_err(show)?;
        }
        if is_folder {
            folders.push(path);
        }
        let place = CString::new(inside.as_os_str().as_bytes()).map_err(|_| ConfinementError::Path {
            path: path.to_owned(),
        })?;
        mounts.push((tree, place));
    }
    set(&root, MOUNT_ATTR_RDONLY, false).map_err(|source| ConfinementError::Root { source })?;
    Ok((root, mounts))
}

/// Each path once, folders before what is in them, with the most that was asked for.
fn by_path(files: &[Visible]) -> Result<BTreeMap<&Path, Access>, ConfinementError> {
    let mut out = BTreeMap::new();
    for Visible { path, access } in files {
        let mut parts = path.components();
        let below_root = parts.next() == Some(Component::RootDir) && path.file_name().is_some();
        if !below_root || !parts.all(|part| matches!(part, Component::Normal(_))) {
            return Err(ConfinementError::Path { path: path.clone() });
        }
        let most = out.entry(path.as_path()).or_insert(*access);
        *most = (*most).max(*access);
    }
    Ok(out)
}

/// A tmpfs that is mounted nowhere.
fn empty() -> rustix::io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "mode", "0755")?;
    // Nobody can write to it: what there is are a few empty files and the folders that they are in.
    fsconfig_set_string(&context, "size", "1m")?;
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// A copy of the mount behind a path, that allows no more than it must.
fn open(path: &Path, access: Access) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if access == Access::Program {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    if access == Access::Write {
        // What it wrote itself leads nowhere else.
        flags |= OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    }
    let tree = open_tree(CWD, path, flags)?;
    let less = MOUNT_ATTR_NOSUID
        | match access {
            Access::Read => MOUNT_ATTR_RDONLY | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC,
            Access::Program => MOUNT_ATTR_RDONLY | MOUNT_ATTR_NODEV,
            Access::Write => MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC,
            Access::Device => MOUNT_ATTR_NOEXEC,
        };
    set(&tree, less, access == Access::Program)?;
    Ok(tree)
}

/// Takes rights from a mount of ours, and keeps others from appearing below it.
fn set(mount: &OwnedFd, less: u64, recursive: bool) -> io::Result<()> {
    let attr = MountAttr {
        attr_set: less,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: the descriptor is ours, and the call only reads `attr`.
    let result = unsafe { mount_setattr(mount.as_raw_fd(), recursive, &attr) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn make_place(root: impl AsFd, inside: &Path, is_folder: bool) -> io::Result<()> {
    make_parents(&root, inside)?;
    if is_folder {
        return make_folder(&root, inside);
    }
    // Not opened: a process that another thread forks meanwhile would have it open to write, and the root could not become
    // read-only.
    Ok(mknodat(root, inside, FileType::RegularFile, FILE, 0)?)
}

fn make_parents(root: impl AsFd, inside: &Path) -> io::Result<()> {
    let mut so_far = PathBuf::new();
    for part in inside.parent().unwrap_or(Path::new("")).components() {
        so_far.push(part);
        make_folder(&root, &so_far)?;
    }
    Ok(())
}

fn make_folder(root: impl AsFd, inside: &Path) -> io::Result<()> {
    match mkdirat(root, inside, FOLDER) {
        // Or a link to one: then what is made below it comes to lie there.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
