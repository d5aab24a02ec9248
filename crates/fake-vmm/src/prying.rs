//! A VMM that its guest has taken over: it answers what drivers ask a VMM before they launch it, and then tries what it must not
//! be able to do. Each attempt is a line of what it says; then it ends.
//!
//! ```text
//! yes read /srv/disk                 it could
//! no read /etc/shadow: No such file or directory (os error 2)
//! is Uid: 65534 65534 65534 65534    a fact
//! ```

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rustix::net::{AddressFamily, SocketType, socket};
use rustix::process::Pid;

use crate::{answer_to_question, cloud_hypervisor, firecracker};

/// The environment variable that says which VMM it pretends to be to `--version`: `firecracker`, or else Cloud Hypervisor.
pub const AS: &str = "OFFSHOOT_PRYING_AS";
/// The one with the paths that it tries to read and to write, separated by colons.
pub const PATHS: &str = "OFFSHOOT_PRYING_PATHS";
/// The one with the processes that it tries to find, separated by colons.
pub const PROCESSES: &str = "OFFSHOOT_PRYING_PROCESSES";
/// The one with the abstract Unix socket that it tries to connect to.
pub const SOCKET: &str = "OFFSHOOT_PRYING_SOCKET";

/// The whole program.
pub fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let answer = if args == ["--version"] {
        let name = std::env::var(AS).unwrap_or_default();
        Some(match name.as_str() {
            "firecracker" => firecracker::VERSION,
            _ => cloud_hypervisor::VERSION,
        })
    } else {
        answer_to_question(&args)
    };
    let said = match answer {
        Some(answer) => io::stdout().write_all(answer.as_bytes()),
        None => io::stderr().write_all(pry().join("\n").as_bytes()),
    };
    said.map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS)
}

fn attempt<T, E: std::fmt::Display>(lines: &mut Vec<String>, what: &str, result: Result<T, E>) -> Option<T> {
    lines.push(match &result {
        Ok(_) => format!("yes {what}"),
        Err(error) => format!("no {what}: {error}"),
    });
    result.ok()
}

fn names(folder: &Path) -> String {
    let Ok(entries) = fs::read_dir(folder) else {
        return "(closed)".into();
    };
    let mut names: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .collect();
    names.sort();
    names.join(" ")
}

fn listed(variable: &str) -> Vec<String> {
    let text = std::env::var(variable).unwrap_or_default();
    let words = text.split(':').filter(|word| !word.is_empty());
    words.map(str::to_owned).collect()
}

fn pry() -> Vec<String> {
    let mut lines = Vec::new();
    files(&mut lines);
    privileges(&mut lines);
    processes(&mut lines);
    network(&mut lines);
    lines
}

fn files(lines: &mut Vec<String>) {
    for folder in ["/", "/dev", "/proc"] {
        lines.push(format!("is {folder}: {}", names(Path::new(folder))));
    }
    for path in listed(PATHS) {
        let path = PathBuf::from(path);
        if path.is_dir() {
            attempt(lines, &format!("list {}", path.display()), fs::read_dir(&path));
            let new = path.join("new");
            attempt(
                lines,
                &format!("create in {}", path.display()),
                File::create(&new),
            );
            continue;
        }
        attempt(lines, &format!("read {}", path.display()), File::open(&path));
        let write = OpenOptions::new().append(true).open(&path);
        attempt(lines, &format!("write {}", path.display()), write);
    }
    attempt(lines, "create in the root", File::create("/new"));
    attempt(lines, "create in /usr", File::create("/usr/new"));
    attempt(lines, "create in /dev", File::create("/dev/new"));
    // What a descriptor leads to, too.
    let mut open: Vec<u32> = names(Path::new("/proc/self/fd"))
        .split(' ')
        .filter_map(|name| name.parse().ok())
        .collect();
    open.sort_unstable();
    for number in open {
        let target = fs::read_link(format!("/proc/self/fd/{number}"));
        let target = target.map_or_else(|_| "gone".into(), |path| path.display().to_string());
        lines.push(format!("is descriptor {number}: {target}"));
    }
}

fn privileges(lines: &mut Vec<String>) {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let wanted = ["Uid", "Gid", "Groups", "Cap", "NoNewPrivs", "Seccomp", "NSpid"];
    for line in status.lines() {
        if wanted.iter().any(|name| line.starts_with(name)) {
            let words: Vec<_> = line.split_ascii_whitespace().collect();
            lines.push(format!("is {}", words.join(" ")));
        }
    }
    let root = rustix::process::Uid::ROOT;
    attempt(
        lines,
        "become root",
        rustix::thread::set_thread_res_uid(root, root, root),
    );
    #[expect(
        deprecated,
        reason = "this program shares nothing with other threads that could break"
    )]
    let made = rustix::thread::unshare(rustix::thread::UnshareFlags::NEWUSER);
    attempt(lines, "make a user namespace", made);
    let flags = rustix::mount::MountFlags::empty();
    let mounted = rustix::mount::mount("none", "/proc", "tmpfs", flags, None);
    attempt(lines, "mount", mounted);
    attempt(lines, "change the root", std::os::unix::fs::chroot("/proc"));
    let kept = rustix::thread::set_no_new_privs(false);
    attempt(lines, "have new privileges", kept);
}

fn processes(lines: &mut Vec<String>) {
    for number in listed(PROCESSES) {
        let Some(pid) = number.parse().ok().and_then(Pid::from_raw) else {
            continue;
        };
        attempt(
            lines,
            &format!("find process {number}"),
            rustix::process::test_kill_process(pid),
        );
        let path = format!("/proc/{number}/status");
        attempt(lines, &format!("look at process {number}"), File::open(path));
    }
}

fn network(lines: &mut Vec<String>) {
    // Documentation/networking: /proc/net/dev has two lines of headings.
    let devices = fs::read_to_string("/proc/self/net/dev").unwrap_or_default();
    let mut devices: Vec<_> = devices
        .lines()
        .skip(2)
        .filter_map(|line| Some(line.split_once(':')?.0.trim()))
        .collect();
    devices.sort_unstable();
    lines.push(format!("is interfaces: {}", devices.join(" ")));
    for (name, family) in [
        ("IPv4", AddressFamily::INET),
        ("IPv6", AddressFamily::INET6),
        ("netlink", AddressFamily::NETLINK),
        ("packet", AddressFamily::PACKET),
        ("vsock", AddressFamily::VSOCK),
    ] {
        for kind in [SocketType::STREAM, SocketType::DGRAM, SocketType::RAW] {
            let made = socket(family, kind, None);
            // A kind that this family does not have says nothing.
            if kind == SocketType::STREAM || made.is_ok() {
                attempt(lines, &format!("make a socket of {name}"), made);
            }
        }
    }
    for name in listed(SOCKET) {
        let connected = SocketAddr::from_abstract_name(&name).and_then(|at| UnixStream::connect_addr(&at));
        attempt(lines, "connect to a socket of the host", connected);
    }
    let listening = UnixListener::bind("own.sock");
    attempt(lines, "listen in its folder", listening);
}
