//! The files of disks that grow, by the plan's paths: a VMM that was taken over could name any other file.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use offshoot_model::ByteSize;

use crate::machine::{MachineError, MachineState};

/// Looks that a disk may get a size: it is there, and would not shrink. Gives its path.
pub(crate) async fn size_now(
    state: &MachineState,
    serial: &str,
    size: ByteSize,
) -> Result<PathBuf, MachineError> {
    look(state, serial, size, false).await
}

/// The same, and makes its file so long, for a VMM that only looks at it again.
pub(crate) async fn grow(
    state: &MachineState,
    serial: &str,
    size: ByteSize,
) -> Result<PathBuf, MachineError> {
    look(state, serial, size, true).await
}

async fn look(
    state: &MachineState,
    serial: &str,
    size: ByteSize,
    grow: bool,
) -> Result<PathBuf, MachineError> {
    let path = state.disks.get(serial).ok_or_else(|| MachineError::NoDisk {
        serial: serial.to_owned(),
    })?;
    let (file, length) = (path.clone(), size.bytes());
    let looked = tokio::task::spawn_blocking(move || {
        let file = open(&file, grow)?;
        let now = file.metadata()?.len();
        if grow && now < length {
            file.set_len(length)?;
        }
        Ok(now)
    });
    match looked.await.map_err(io::Error::from).flatten() {
        Ok(now) if now > length => Err(MachineError::Shrink {
            serial: serial.to_owned(),
            from: ByteSize::from_bytes(now),
            to: size,
        }),
        Ok(_) => Ok(path.clone()),
        Err(source) => Err(MachineError::Disk {
            path: path.clone(),
            source,
        }),
    }
}

fn open(path: &Path, write: bool) -> io::Result<File> {
    File::options()
        .read(true)
        .write(write)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
        .open(path)
}
