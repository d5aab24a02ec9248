//! The program that is PID 1 in a guest's initramfs and answers the host.
//!
//! ```text
//!   initramfs namespace                          the VM's own namespace (made by Configure)
//!   ┌──────────────────────────────┐             ┌──────────────────────────────────────┐
//!   │ PID 1   supervisor           │             │  main process, exec sessions:        │
//!   │   └── @offshoot-agent ───────┼── forks ───►│  children of the agent               │
//!   │        port or vsock, gRPC   │  (workload) │  orphans go to PID 1, which reaps    │
//!   └──────────────────────────────┘             └──────────────────────────────────────┘
//! ```
//!
//! PID 1 is a tiny program without threads from the first to the last instruction: it mounts `/proc`, `/sys` and
//! `/dev`, loads modules, starts the agent as its child, reaps orphans, and waits for orders. So a bug in the agent is
//! no kernel panic; the agent waits for its own children without anybody stealing their status; and `--init` is nothing
//! more than PID 1 executing the image's init, while the agent lives on with its connections. The agent's name starts
//! with `@`, which systemd leaves alone until the very end.
//!
//! The modules in the order in which a boot meets them: `supervisor`, `boot`, `modules`; `channel`, `vsock`, `fd`;
//! `service`, `guest`, `pid1`; `configure`, `workload`; `spawn`, `users`, `session`, `process`, `output_log`, `count`;
//! `files`; `ssh`, `sftp`; `shutdown`, `power`.

mod boot;
mod channel;
mod command_line;
mod configure;
mod count;
mod fd;
mod files;
mod guest;
mod log;
mod modules;
mod output_log;
mod pid1;
mod port;
mod power;
mod process;
mod service;
mod session;
mod sftp;
mod shutdown;
mod spawn;
mod ssh;
mod supervisor;
mod users;
mod vsock;
mod workload;

/// The first argument of the child that is the agent.
const AGENT_ARGUMENT: &str = "agent";

/// The first argument of a process that serves files to one SSH client.
const SFTP_ARGUMENT: &str = "sftp";

fn main() {
    if rustix::process::getpid().is_init() {
        supervisor::run();
    }
    match std::env::args().nth(1).as_deref() {
        Some(AGENT_ARGUMENT) => channel::run(),
        Some(SFTP_ARGUMENT) => std::process::exit(sftp::run()),
        _ => {
            log::fatal("this program is PID 1 of a virtual machine; it does nothing else");
            std::process::exit(2);
        }
    }
}
