//! SSH into VMs with the user's own OpenSSH: the way there, the host's true key and a key of ours, and nothing else.
//!
//! ```text
//! offshoot ssh web ─► ssh(1) ─ ProxyCommand ─► offshoot ssh-proxy ─► daemon ─► agent's channel ─► its SSH server
//! ssh, scp, rsync … web.vm.internal ──┘ └─ KnownHostsCommand ─► offshoot ssh-known-hosts   (by `offshoot ssh-config`)
//! ```
//!
//! It needs no network, so it works with `--network none` and where the host has no route to the VM.

mod command;
mod config;
mod connect;
mod install;
pub(crate) mod keys;
mod proxy;
mod quote;
mod reminder;

pub(crate) use command::SshArgs;
pub(crate) use config::{SshConfigArgs, ssh_config};
pub(crate) use connect::ssh;
pub(crate) use proxy::{KnownHostsArgs, ProxyArgs, known_hosts, proxy};
