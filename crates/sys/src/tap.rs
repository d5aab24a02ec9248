//! TAP devices of the network namespace that the calling thread is in (Documentation/networking/tuntap.rst).

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use rustix::fs::{Mode, OFlags};

/// Makes a TAP and gives its file; it is gone when the last copy of that is closed. Packets come whole, each behind a
/// `virtio_net_hdr`. Fails when an interface has that name.
pub fn create(name: &str) -> io::Result<OwnedFd> {
    let request = request(name)?;
    let file = rustix::fs::open("/dev/net/tun", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which `request` is, and keeps no pointer to it.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

/// Whether TAPs can be made at all: the driver answers behind `/dev/net/tun`.
pub fn probe() -> io::Result<()> {
    rustix::fs::open("/dev/net/tun", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    Ok(())
}

fn request(name: &str) -> io::Result<libc::ifreq> {
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
    // Without TUN_EXCL, a persistent TAP of that name would be taken over together with whatever it is connected to.
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
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
            let refused = create(bad).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidInput, "{bad:?}");
        }
        let request = request("os-0123456789ab").unwrap();
        let name = request.ifr_name.map(i8::cast_unsigned);
        assert_eq!(&name, b"os-0123456789ab\0");
    }
}
