//! What belongs to the kernel and not to a file system: clock, entropy, host name, loopback, and what the
//! network lets everybody do.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use super::ConfigureError;
use crate::log;

/// `RNDADDENTROPY` of linux/random.h: `_IOW('R', 3, int[2])`.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
/// `RNDRESEEDCRNG` of linux/random.h: `_IO('R', 7)`.
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
/// What one host call can credit.
const MAX_ENTROPY: usize = 64;

/// What processes may do without privileges. Docker gives every container the same, and images count on it.
const FOR_EVERYBODY: [(&str, &str); 2] = [
    // ICMP echo sockets, icmp(7), for all groups: ping.
    ("/proc/sys/net/ipv4/ping_group_range", "0 2147483647"),
    // A server that does not run as root listens on 80.
    ("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0"),
];

/// `struct rand_pool_info` of linux/random.h.
#[repr(C)]
struct RandPoolInfo {
    entropy_count: libc::c_int,
    buf_size: libc::c_int,
    buf: [u8; MAX_ENTROPY],
}

/// What comes before everything else: the time, and random bytes. Those of a guest that was restored would be those of all
/// its kind.
pub(super) fn begin(realtime: Duration, entropy: &[u8]) -> Result<(), ConfigureError> {
    set_clock(realtime).map_err(ConfigureError::step("set the clock"))?;
    credit_entropy(entropy).map_err(ConfigureError::step("credit entropy"))
}

pub(super) fn set_up(hostname: &str, realtime: Duration, entropy: &[u8]) -> Result<(), ConfigureError> {
    begin(realtime, entropy)?;
    rustix::system::sethostname(hostname.as_bytes())
        .map_err(|error| ConfigureError::step("set the host name")(error.into()))?;
    Ok(())
}

/// What is the same in every guest: loopback, and what the network lets everybody do.
pub(super) fn open_to_everybody() {
    if let Err(error) = loopback_up() {
        log::warning(format_args!("cannot bring the loopback interface up: {error}"));
    }
    for (path, value) in FOR_EVERYBODY {
        if let Err(error) = fs::write(path, value) {
            log::warning(format_args!("cannot write {path}: {error}"));
        }
    }
}

/// What the kernel takes its ticks from.
const TICKS: &str = "/sys/devices/system/clockevents/clockevent0/current_device";

/// Refuses the interval timer, which a kernel takes when it got no processor while it measured the local APIC's: emulated,
/// it stops for good in some guests.
pub(super) fn check_timer() -> Result<(), ConfigureError> {
    let device = fs::read_to_string(TICKS).map_err(ConfigureError::step(format!("read {TICKS}")))?;
    match device.trim() {
        "pit" => Err(ConfigureError::Timer { device: "pit".into() }),
        _ => Ok(()),
    }
}

/// Sets the clock; nothing where the host did not say.
pub(super) fn set_clock(realtime: Duration) -> io::Result<()> {
    // Zero is "the host did not say"; no clock of ours is at the epoch.
    let Ok(seconds @ 1..) = libc::time_t::try_from(realtime.as_secs()) else {
        return Ok(());
    };
    let time = libc::timespec {
        tv_sec: seconds,
        tv_nsec: libc::c_long::from(realtime.subsec_nanos()),
    };
    // SAFETY: the value lives through the call.
    if unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &raw const time) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn credit_entropy(entropy: &[u8]) -> io::Result<()> {
    let entropy = &entropy[..entropy.len().min(MAX_ENTROPY)];
    if entropy.is_empty() {
        return Ok(());
    }
    let mut buf = [0; MAX_ENTROPY];
    buf[..entropy.len()].copy_from_slice(entropy);
    // At most 64 bytes, 512 bits.
    let length = entropy.len() as libc::c_int;
    let info = RandPoolInfo {
        entropy_count: length * 8,
        buf_size: length,
        buf,
    };
    let random = File::options().write(true).open("/dev/random")?;
    // SAFETY: the struct has the layout that the request expects and says how long its buffer is.
    let result = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the request takes no argument. Older kernels do without.
    unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) };
    Ok(())
}

fn loopback_up() -> io::Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: ifreq is plain numbers and a union of such, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    // The kernel adds IFF_LOOPBACK by itself.
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request has the layout that SIOCSIFFLAGS expects, and a name that ends in a zero byte.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
