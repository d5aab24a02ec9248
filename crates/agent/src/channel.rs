//! Where the host is: the agent's virtio-serial port, else vsock. And the agent's main loop.
//!
//! One thread runs everything that waits. A guest mostly has one vCPU, and what takes time (mounting, unpacking,
//! walking trees) has threads of its own: a second worker would only cost memory and locks.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use offshoot_agent_proto::limits::PORT_NAME;
use offshoot_agent_proto::link::GuestLink;
use offshoot_agent_proto::serve::{serve, service};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, Rlimit};

use crate::fd::Fd;
use crate::guest::Guest;
use crate::modules::{CONSOLE, VIRTIO_DEVICES, VSOCK, virtio_devices};
use crate::pid1::Pid1;
use crate::port::Port;
use crate::service::Service;
use crate::{log, power, shutdown, vsock};

/// Where the kernel shows named virtio-serial ports.
const PORTS: &str = "/sys/class/virtio-ports";

/// How long the machine may take to show its port: the names come from the VMM in a conversation of their own.
const PORT_PATIENCE: Duration = Duration::from_secs(10);

/// Beside a vsock device, a console that has no port of ours is just a console.
const PORT_PATIENCE_WITH_VSOCK: Duration = Duration::from_millis(300);

/// Open descriptors of the agent itself.
const OPEN_FILES: Rlimit = Rlimit {
    current: Some(16_384),
    maximum: Some(524_288),
};

/// The agent's whole life.
pub(crate) fn run() -> ! {
    // The guest's memory may run out; the agent is what can still tell the host.
    drop(fs::write("/proc/self/oom_score_adj", "-1000"));
    let _ = rustix::thread::set_name(c"offshoot-agent");
    // Each forwarded connection is one; processes get limits of their own.
    let _ = rustix::process::setrlimit(Resource::Nofile, OPEN_FILES);
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => power::fail(format_args!("cannot start: {error}")),
    };
    let result = runtime.block_on(listen());
    power::fail(format_args!("cannot listen for the host: {result:?}"))
}

async fn listen() -> io::Result<()> {
    let (pid1, asked_to_end) = Pid1::new(rustix::stdio::stdin().try_clone_to_owned()?)?;
    let guest = Arc::new(Guest::new(pid1));
    tokio::spawn(shutdown::when_pid_1_is_asked(Arc::clone(&guest), asked_to_end));
    match find().await {
        Some(Channel::Port(path)) => serve_port(&path, &guest).await,
        Some(Channel::Vsock) => serve_vsock(&guest).await,
        None => Err(io::Error::new(
            io::ErrorKind::NotFound,
            "no virtio-serial port offshoot.agent and no vsock",
        )),
    }
}

enum Channel {
    Port(PathBuf),
    Vsock,
}

/// Waits until the machine shows a way to the host.
async fn find() -> Option<Channel> {
    let start = Instant::now();
    loop {
        if let Some(name) = port_named(Path::new(PORTS), PORT_NAME) {
            return Some(Channel::Port(Path::new("/dev").join(name)));
        }
        let devices = virtio_devices(Path::new(VIRTIO_DEVICES));
        let patience = match (devices.contains(&VSOCK), devices.contains(&CONSOLE)) {
            (true, false) => Duration::ZERO,
            (true, true) => PORT_PATIENCE_WITH_VSOCK,
            (false, _) => PORT_PATIENCE,
        };
        if start.elapsed() >= patience {
            return devices.contains(&VSOCK).then_some(Channel::Vsock);
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// The device of the port with a name.
fn port_named(ports: &Path, name: &str) -> Option<std::ffi::OsString> {
    fs::read_dir(ports)
        .ok()?
        .flatten()
        .map(|entry| entry.file_name())
        .find(|device| {
            fs::read_to_string(ports.join(device).join("name")).is_ok_and(|text| text.trim_end() == name)
        })
}

async fn serve_port(path: &Path, guest: &Arc<Guest>) -> io::Result<()> {
    let port = rustix::fs::open(
        path,
        OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOCTTY,
        Mode::empty(),
    )?;
    guest.ready();
    log::info(format_args!("listening on {}", path.display()));
    let service = service(Arc::new(Service::new(Arc::clone(guest))));
    let mut port = Port::new(port)?;
    loop {
        port.wait_for_host().await?;
        let mut link = GuestLink::new(port);
        loop {
            match link.accept().await {
                Ok(()) => {
                    if let Err(error) = serve(&mut link, service.clone()).await {
                        log::info(format_args!("a conversation with the host ended: {error}"));
                    }
                }
                // The host closed the port.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe
                    ) =>
                {
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        port = link.into_inner();
    }
}

async fn serve_vsock(guest: &Arc<Guest>) -> io::Result<()> {
    let listener = vsock::listen()?;
    guest.ready();
    let service = service(Arc::new(Service::new(Arc::clone(guest))));
    loop {
        let stream = Fd::new(vsock::accept(&listener).await?)?;
        let service = service.clone();
        tokio::spawn(async move {
            if let Err(error) = serve(stream, service).await {
                log::info(format_args!("a conversation with the host ended: {error}"));
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_found_by_its_name() {
        let ports = tempfile::tempdir().unwrap();
        for (device, name) in [
            ("vport0p0", None),
            ("vport0p1", Some("org.qemu.0\n")),
            ("vport0p2", Some("offshoot.agent\n")),
        ] {
            fs::create_dir(ports.path().join(device)).unwrap();
            if let Some(name) = name {
                fs::write(ports.path().join(device).join("name"), name).unwrap();
            }
        }
        assert_eq!(port_named(ports.path(), PORT_NAME), Some("vport0p2".into()));
        assert_eq!(port_named(ports.path(), "other"), None);
        assert_eq!(port_named(Path::new("/nonexistent"), PORT_NAME), None);
    }
}
