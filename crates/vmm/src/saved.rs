//! How Cloud Hypervisor and Firecracker get what a saved VM consists of, and how what they save is taken from them.
//!
//! ```text
//! fd 14    the guest's memory: written when it is saved, sealed and mapped privately when it goes on
//! fd 15    what was saved of its devices, sealed
//! own/     where the VMM writes what it saves of its devices; read back as what a stranger wrote
//! ```

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use offshoot_model::ByteSize;
use offshoot_sys::memory_file::for_each_page;
use offshoot_sys::process::{DetachedCommand, InheritedFd, share_fd};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use crate::machine::MachineError;
use crate::plan::Origin;

/// Under which number it gets the guest's memory.
pub(crate) const MEMORY_FD: RawFd = 14;
/// Under which number it gets what was saved of the devices.
pub(crate) const STATE_FD: RawFd = 15;
/// How long it may take to write all of a guest's memory, which it may have to write to a disk.
pub(crate) const SAVE_PATIENCE: Duration = Duration::from_secs(120);

/// How a process names a descriptor that it got under a number.
pub(crate) fn inherited_path(number: RawFd) -> PathBuf {
    format!("/proc/self/fd/{number}").into()
}

/// Gives the process what its guest comes from.
pub(crate) fn inherit(origin: &Origin, command: &mut DetachedCommand) -> io::Result<()> {
    let mut give = |fd, number| command.inherit.push(InheritedFd { fd, number });
    match origin {
        Origin::Kernel => {}
        Origin::KernelInto(memory) => give(share_fd(&**memory)?, MEMORY_FD),
        Origin::Template(guest) => {
            give(share_fd(&*guest.memory)?, MEMORY_FD);
            // Each reads it from its start: a copy of the descriptor would have its position in common with the others.
            give(
                File::open(format!("/proc/self/fd/{}", guest.state.as_raw_fd()))?.into(),
                STATE_FD,
            );
        }
    }
    Ok(())
}

/// Opens a file that a VMM wrote below its own folder, however it looks there now: no link is followed.
pub(crate) fn open_below(own: &Path, name: &str) -> io::Result<File> {
    let folder = File::options()
        .read(true)
        .custom_flags((OFlags::DIRECTORY | OFlags::NOFOLLOW).bits().cast_signed())
        .open(own)?;
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
    let file = File::from(openat2(&folder, name, flags, Mode::empty(), resolve)?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a file"));
    }
    Ok(file)
}

/// Writes what was saved into a new file of ours, at most `limit` of it.
pub(crate) fn keep(parts: impl io::Read, state: &Path, limit: ByteSize) -> io::Result<()> {
    let mut to = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(state)?;
    let length = io::copy(&mut parts.take(limit.bytes() + 1), &mut to)?;
    to.flush()?;
    if length > limit.bytes() {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(())
}

/// Copies a guest's memory that a VMM had as a file into one that can be sealed; pages of zeros stay holes.
pub(crate) fn copy_memory(from: &File, to: &File) -> io::Result<()> {
    if from.metadata()?.len() != to.metadata()?.len() {
        return Err(io::Error::other("it has another size than the guest's memory"));
    }
    for_each_page(from, |at, bytes| to.write_all_at(bytes, at))
}

/// Does something to files off the runtime's threads; `state` is what an error is about.
pub(crate) async fn on_disk(
    state: &Path,
    work: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> Result<(), MachineError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(io::Error::from)
        .flatten()
        .map_err(|source| MachineError::Save {
            path: state.to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_a_vmm_wrote_is_read_and_no_link_of_its_followed() {
        let folder = tempfile::tempdir().unwrap();
        let own = folder.path().join("own");
        std::fs::create_dir_all(own.join("saved")).unwrap();
        std::fs::write(folder.path().join("secret"), "ours").unwrap();
        std::fs::write(own.join("saved/state"), "theirs").unwrap();
        symlink(folder.path().join("secret"), own.join("saved/link")).unwrap();
        symlink(folder.path(), own.join("elsewhere")).unwrap();
        let read = |name: &str| open_below(&own, name).and_then(io::read_to_string);
        assert_eq!(read("saved/state").unwrap(), "theirs");
        for bad in ["saved/link", "elsewhere/secret", "../secret", "saved", "none"] {
            assert!(read(bad).is_err(), "{bad}");
        }
        let other = folder.path().join("other");
        symlink(&own, &other).unwrap();
        assert!(open_below(&other, "saved/state").is_err());
    }

    #[test]
    fn what_is_kept_is_limited_and_new() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        keep(&b"1234"[..], &path, ByteSize::from_bytes(4)).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"1234");
        assert!(keep(&b"1234"[..], &path, ByteSize::from_bytes(4)).is_err());
        std::fs::remove_file(&path).unwrap();
        let error = keep(&b"12345"[..], &path, ByteSize::from_bytes(4)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
    }
}
