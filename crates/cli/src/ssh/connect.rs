//! `ssh`: the user's OpenSSH client with everything that it needs to know of a VM.

use std::io::{self, IsTerminal as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::PathBuf;
use std::process::{Command, ExitStatus};

use offshoot_api::client::Client;
use offshoot_api::ssh::{SshHost, SshHostsQuery};
use offshoot_model::{ErrorKind, VmState};
use tokio::signal::unix::{SignalKind, signal};

use super::command::{Programs, SshArgs, words};
use super::keys::{OwnKey, Places, own_key};
use super::reminder::Reminder;
use crate::error::{Failure, low_byte};

/// This program, as configurations and commands name it.
pub(super) fn this_program() -> Result<PathBuf, Failure> {
    std::env::current_exe().map_err(|e| Failure::io("cannot tell where this program is", &e))
}

/// Where the daemon listens, from wherever one looks.
pub(super) fn socket(client: &Client) -> Result<PathBuf, Failure> {
    std::path::absolute(client.socket()).map_err(|e| Failure::io("cannot tell where the daemon listens", &e))
}

/// Runs ssh(1), and ends with its status.
pub(crate) async fn ssh(client: &Client, args: SshArgs) -> Result<u8, Failure> {
    let target = args.target()?;
    let query = SshHostsQuery {
        vm: Some(target.vm.to_owned()),
    };
    let hosts = client.ssh_hosts(&query).await?;
    let host = hosts.vms.first().ok_or_else(|| {
        Failure::new(ErrorKind::NotFound, format!("no VM `{}`", target.vm))
            .hint("`offshoot ps -a` lists the VMs")
    })?;
    let host_key = reachable(host)?;
    let OwnKey { path: identity, .. } = own_key(&Places::of_this_user())?;
    let (offshoot, socket) = (this_program()?, socket(client)?);
    let programs = Programs {
        offshoot: &offshoot,
        socket: &socket,
        identity: &identity,
    };
    let mut command = Command::new("ssh");
    command.args(words(&args, &target, host, host_key, programs)?);

    if args.quiet || !io::stderr().is_terminal() {
        // It becomes ssh: signals, terminal and status are its own.
        return Err(cannot_run(&command.exec(), host));
    }
    let reminder = Reminder::before(client, host.id.as_str()).await?;
    let status = run(command, host).await?;
    reminder.show(client).await;
    Ok(status_of(status))
}

/// The VM's key, when the VM runs.
fn reachable(host: &SshHost) -> Result<&str, Failure> {
    let name = &host.name;
    let verb = match host.state {
        VmState::Running => {
            return host.host_key.as_deref().ok_or_else(|| {
                Failure::new(
                    ErrorKind::NotPossible,
                    format!("VM `{name}` was started without an SSH server"),
                )
                .hint(format!("start it again: `offshoot restart {name}`"))
            });
        }
        VmState::Paused => "resume",
        _ => "start",
    };
    Err(Failure::new(
        ErrorKind::WrongState,
        format!("VM `{name}` does not run: it is {}", host.state.as_str()),
    )
    .hint(format!("`offshoot {verb} {name}`")))
}

fn cannot_run(error: &io::Error, host: &SshHost) -> Failure {
    let failure = Failure::io("cannot run OpenSSH's client, `ssh`", error);
    if error.kind() == io::ErrorKind::NotFound {
        return failure
            .hint("install it: `apt-get install openssh-client`")
            .hint(format!("`offshoot exec -it {} sh` needs none", host.name));
    }
    failure
}

/// Runs it in the foreground. Signals that the terminal sends are for ssh, which has them as well; others are passed on.
async fn run(command: Command, host: &SshHost) -> Result<ExitStatus, Failure> {
    let catch = |kind| signal(kind).map_err(|e| Failure::io("cannot catch signals", &e));
    let (mut interrupt, mut quit) = (catch(SignalKind::interrupt())?, catch(SignalKind::quit())?);
    let (mut terminate, mut hangup) = (catch(SignalKind::terminate())?, catch(SignalKind::hangup())?);
    let mut child = tokio::process::Command::from(command)
        .spawn()
        .map_err(|e| cannot_run(&e, host))?;
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
    let pid = pid.and_then(rustix::process::Pid::from_raw);
    let pass_on = |signal| {
        if let Some(pid) = pid {
            // Not waited for yet, so the number is still its own.
            let _ = rustix::process::kill_process(pid, signal);
        }
    };
    loop {
        tokio::select! {
            status = child.wait() => return status.map_err(|e| Failure::io("cannot wait for ssh", &e)),
            _ = interrupt.recv() => {}
            _ = quit.recv() => {}
            _ = terminate.recv() => pass_on(rustix::process::Signal::TERM),
            _ = hangup.recv() => pass_on(rustix::process::Signal::HUP),
        }
    }
}

/// Its status as a shell counts it.
fn status_of(status: ExitStatus) -> u8 {
    let signal = status.signal().map(|signal| 128 + signal);
    low_byte(status.code().or(signal).unwrap_or(255))
}

#[cfg(test)]
mod tests {
    use super::*;
    use offshoot_model::VmId;

    #[test]
    fn a_vm_that_cannot_be_entered_says_what_to_do() {
        let mut host = SshHost {
            id: VmId::from_bytes(&[0xab; 6]),
            name: "web".parse().unwrap(),
            domain_name: "web.vm.internal".into(),
            state: VmState::Running,
            ipv4: None,
            ipv6: None,
            port: None,
            host_key: Some("ssh-ed25519 AAAA".into()),
        };
        assert_eq!(reachable(&host).unwrap(), "ssh-ed25519 AAAA");
        for (state, key, hint) in [
            (VmState::Paused, true, "offshoot resume web"),
            (VmState::Stopped, true, "offshoot start web"),
            (VmState::Created, false, "offshoot start web"),
            (VmState::Running, false, "offshoot restart web"),
        ] {
            host.state = state;
            host.host_key = key.then(|| "ssh-ed25519 AAAA".into());
            let failure = format!("{:?}", reachable(&host).unwrap_err());
            assert!(failure.contains(hint), "{failure}");
        }
    }

    #[test]
    fn the_status_is_ssh_s_own() {
        for (raw, expected) in [(0, 0), (7 << 8, 7), (255 << 8, 255), (15, 143)] {
            assert_eq!(status_of(ExitStatus::from_raw(raw)), expected);
        }
    }
}
