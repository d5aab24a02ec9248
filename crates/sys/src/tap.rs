//! TAP devices of the network namespace that the calling thread is in (Documentation/networking/tuntap.rst).
//!
//! ```text
//! create ─► ours ── set_persistent(true), closed ──► idle: there, and nobody's
//!            ▲ │                                      │
//!            │ └─ closed: gone                        │
//!            └──────── set_persistent(false) ◄─ open ─┘
//! ```

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use crate::process::PidFd;

/// Makes a TAP and gives its file; it is gone when the last copy of that is closed. Packets come whole, each behind a
/// `virtio_net_hdr`. Fails when an interface has that name. Nobody else opens it: it is our user's alone.
pub fn create(name: &str) -> io::Result<OwnedFd> {
    // Without TUN_EXCL, a persistent TAP of that name would be taken over together with whatever it is connected to.
    let file = attach(name, libc::IFF_TUN_EXCL)?;
    // One without an owner may be opened by everybody who may open /dev/net/tun, once it is nobody's.
    set(&file, libc::TUNSETOWNER, rustix::process::geteuid().as_raw())?;
    Ok(file)
}

/// Opens a persistent TAP that nobody has open; refused with `EBUSY` when somebody has. One that is not there is made, as
/// by [`create`].
pub fn open(name: &str) -> io::Result<OwnedFd> {
    attach(name, 0)
}

/// Whether a TAP stays when its last file is closed.
pub fn set_persistent(file: BorrowedFd<'_>, persistent: bool) -> io::Result<()> {
    set(&file, libc::TUNSETPERSIST, u32::from(persistent))
}

/// Whether TAPs can be made at all: the driver answers behind `/dev/net/tun`.
pub fn probe() -> io::Result<()> {
    rustix::fs::open("/dev/net/tun", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    Ok(())
}

fn attach(name: &str, more: libc::c_int) -> io::Result<OwnedFd> {
    let request = request(name, more)?;
    let file = rustix::fs::open("/dev/net/tun", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which `request` is, and keeps no pointer to it.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

fn set(file: &impl std::os::fd::AsRawFd, what: libc::Ioctl, value: u32) -> io::Result<()> {
    // SAFETY: TUNSETPERSIST and TUNSETOWNER take a number, no pointer.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), what, libc::c_ulong::from(value)) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// What an open TAP is called.
pub fn name(tap: &OwnedFd) -> io::Result<String> {
    // SAFETY: `ifreq` is plain data for which all zeros is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: TUNGETIFF fills one `struct ifreq`, which `request` is, and keeps no pointer to it.
    if unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNGETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let name = request.ifr_name.map(i8::cast_unsigned);
    let length = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    Ok(String::from_utf8_lossy(&name[..length]).into_owned())
}

/// A TAP that is somebody else's now.
#[derive(Debug)]
pub struct HandedOver {
    /// Its name.
    pub name: String,
    /// The network namespace that it is in.
    pub namespace: OwnedFd,
}

/// Makes an open TAP one that `owner` can open by its name, without any privilege, in its namespace alone, once it is closed
/// here. From here on it stays until it is removed, or [`end_with_process`].
pub fn hand_over(tap: &OwnedFd, owner: Option<u32>) -> io::Result<HandedOver> {
    let name = name(tap)?;
    // SAFETY: TUNGETDEVNETNS takes no argument and gives a new descriptor, which is ours.
    let namespace = unsafe {
        let fd = libc::ioctl(tap.as_raw_fd(), TUNGETDEVNETNS, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    if let Some(owner) = owner {
        set(tap, libc::TUNSETOWNER, owner)?;
    }
    set(tap, libc::TUNSETPERSIST, 1)?;
    Ok(HandedOver { name, namespace })
}

/// Makes every TAP that the process has open end with it.
pub fn end_with_process(process: &PidFd, pid: u32) -> io::Result<()> {
    let mut ended = 0;
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let is_tap = std::fs::read_link(entry.path()).is_ok_and(|path| path == Path::new("/dev/net/tun"));
        if let (Some(number), true) = (number, is_tap) {
            set(&process.descriptor(number)?, libc::TUNSETPERSIST, 0)?;
            ended += 1;
        }
    }
    if ended == 0 {
        return Err(io::Error::other("it has none open"));
    }
    Ok(())
}

/// `_IO('T', 227)` of linux/if_tun.h.
const TUNGETDEVNETNS: libc::Ioctl = 0x54e3;

pub(crate) fn request(name: &str, more: libc::c_int) -> io::Result<libc::ifreq> {
    let fits = !name.is_empty() && name.len() < libc::IFNAMSIZ && !name.contains(['/', '%', '\0']);
    if !fits {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "this is not an interface's name",
        ));
    }
    // SAFETY: `ifreq` is plain data for which all zeros is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | more;
    // The flags fill all 16 bits.
    request.ifr_ifru.ifru_flags = (flags & 0xffff) as libc::c_short;
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_the_kernel_would_read_differently_is_refused() {
        for bad in ["", "tap%d", "a/b", "a\0b", "sixteen-letters-"] {
            for refused in [create(bad), open(bad)] {
                assert_eq!(
                    refused.unwrap_err().kind(),
                    io::ErrorKind::InvalidInput,
                    "{bad:?}"
                );
            }
        }
        let request = request("os-0123456789ab", 0).unwrap();
        let name = request.ifr_name.map(i8::cast_unsigned);
        assert_eq!(&name, b"os-0123456789ab\0");
    }
}
