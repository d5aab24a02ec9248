//! The agent's vsock port, for VMMs whose guests have vsock and no virtio-serial.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use offshoot_agent_proto::limits::VSOCK_PORT;
use tokio::io::unix::AsyncFd;

use crate::fd;

/// More connections than this wait in the kernel only while the agent is busy.
const BACKLOG: libc::c_int = 16;

/// Listens for the host.
pub(crate) fn listen() -> io::Result<AsyncFd<OwnedFd>> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no memory is involved; the descriptor is new and ours.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_VSOCK, kind, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: sockaddr_vm is plain numbers, for which zero is a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_port = VSOCK_PORT;
    address.svm_cid = libc::VMADDR_CID_ANY;
    let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: the address lives through the call and has the length that is told.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    // SAFETY: no memory is involved.
    if bound < 0 || unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) } < 0 {
        return Err(io::Error::last_os_error());
    }
    fd::register(socket)
}

/// The next connection.
pub(crate) async fn accept(listener: &AsyncFd<OwnedFd>) -> io::Result<OwnedFd> {
    loop {
        let mut guard = listener.readable().await?;
        let accepted = guard.try_io(|listener| {
            Ok(rustix::net::accept_with(
                listener.get_ref(),
                rustix::net::SocketFlags::CLOEXEC,
            )?)
        });
        if let Ok(result) = accepted {
            return result;
        }
    }
}
