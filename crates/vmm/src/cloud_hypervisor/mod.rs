//! Cloud Hypervisor on x86-64: a machine that its command line describes and its API controls.
//!
//! ```text
//! us                                            Cloud Hypervisor (own session, unprivileged, its own seccomp)
//!  api.sock        listening, made by us  ─ fd 10 ─► its HTTP API: pause, power button, resize, shutdown
//!  events          a pipe of ours         ─ fd 12 ─► booted, shutdown, rebooting …
//!  console         a pipe of ours         ─ fd 1 ──► the guest's console
//!  vmm.log         memory of ours         ─ fd 2 ──► its own words
//!  own/agent.sock  made by it             ◄───────── vsock as a Unix socket
//!  memory          a saved guest's        ─ fd 14 ─► mapped privately (crate::saved)
//!  own/restore/    what else was saved    ◄───────── read when it starts
//! ```
//!
//! A flag that stands twice is an error or hides the first, so all devices of a kind follow ONE flag: a shared root and
//! two mounts are `--fs a b c`. [`CommandLine`] cannot be built otherwise. TAPs come by descriptors, which its API takes only
//! beside a request (`SCM_RIGHTS`) and its command line by number: so the machine is described there.
//!
//! It starts a guest again that asks for a reset. Nobody wants that here: it is ended when it says so.

mod args;
mod driver;
mod events;
mod machine;
mod options;
mod probe;
mod requests;
mod saved;

pub use args::{API_FD, EVENTS_FD, FIRST_TAP_FD, command_line};
pub use driver::{CloudHypervisorConfig, CloudHypervisorDriver};
pub use options::{CommandLine, Options, OptionsError};
pub use probe::CloudHypervisorFacts;
pub use requests::{ResizeDisk, Snapshot};
pub use saved::{CONFIG, MEMORY_COPY, STATE};
