//! Cloud Hypervisor on x86-64: its command line, from the same plan as every VMM's. There is no driver yet; starting it
//! and talking to its API socket come with it.
//!
//! ```text
//! us                                            Cloud Hypervisor
//!  api.sock    listening, made by us  ─ fd 10 ─► its HTTP API
//!  agent.sock  made by it             ◄───────── vsock as a Unix socket
//!  tty.sock    made by it             ◄───────── the guest's console
//! ```
//!
//! A flag that stands twice is an error or hides the first, so all devices of a kind follow ONE flag: a shared root and
//! two mounts are `--fs a b c`. [`CommandLine`] cannot be built otherwise.
//!
//! The console goes to a socket and not to a file, which would be the guest's to fill.

mod args;
mod options;
mod probe;

pub use args::{API_FD, FIRST_TAP_FD, command_line};
pub use options::{CommandLine, Options, OptionsError};
pub use probe::CloudHypervisorFacts;
