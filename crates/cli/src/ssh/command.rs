//! The command line of `offshoot ssh`, and the one of ssh(1) that it becomes.

use std::ffi::OsString;
use std::path::Path;

use clap::{ArgAction, Args};
use offshoot_api::ssh::SshHost;

use super::quote;
use crate::error::Failure;

/// Who one is in a VM, when nobody says: every image has this user, whether or not it has a file of users.
pub(super) const USER: &str = "root";

#[derive(Clone, Debug, Args)]
pub(crate) struct SshArgs {
    /// User in the VM [default: root]
    #[arg(short, long = "login", value_name = "USER")]
    login: Option<String>,
    /// Say nothing but errors, and do not remind of the VM that runs on
    #[arg(short, long)]
    pub(super) quiet: bool,
    /// Forward the authentication agent
    #[arg(short = 'A')]
    agent: bool,
    /// Forward a port, or a socket, of this machine to the VM
    #[arg(short = 'L', value_name = "[ADDRESS:]PORT:HOST:PORT")]
    local: Vec<String>,
    /// Forward a port, or a socket, of the VM to this machine
    #[arg(short = 'R', value_name = "[ADDRESS:]PORT:HOST:PORT")]
    remote: Vec<String>,
    /// Offer a SOCKS proxy that leads out of the VM
    #[arg(short = 'D', value_name = "[ADDRESS:]PORT")]
    dynamic: Vec<String>,
    /// Run no command: forward only
    #[arg(short = 'N')]
    nothing: bool,
    /// Go into the background when connected
    #[arg(short = 'f')]
    fork: bool,
    /// Read nothing from standard input
    #[arg(short = 'n')]
    no_input: bool,
    /// Give the command a terminal; twice: also where there is none here
    #[arg(short = 't', action = ArgAction::Count)]
    tty: u8,
    /// Give it no terminal
    #[arg(short = 'T', conflicts_with = "tty")]
    no_tty: bool,
    /// Say what happens; up to three times
    #[arg(short = 'v', action = ArgAction::Count)]
    verbose: u8,
    /// One more key to try
    #[arg(short, value_name = "FILE")]
    identity: Vec<String>,
    /// Any other option of ssh_config(5), such as `Compression=yes`
    #[arg(short, value_name = "OPTION")]
    option: Vec<String>,
    // The usage line shows it better than clap does.
    #[arg(required = true, trailing_var_arg = true, value_name = "VM", hide = true)]
    vm_and_command: Vec<String>,
}

/// Where to, and as whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target<'a> {
    pub(super) vm: &'a str,
    pub(super) user: &'a str,
    pub(super) command: &'a [String],
}

impl SshArgs {
    /// What is meant by the words that are no options.
    pub(super) fn target(&self) -> Result<Target<'_>, Failure> {
        let (first, command) = self
            .vm_and_command
            .split_first()
            .ok_or_else(|| Failure::usage("a VM has a name or an id"))?;
        let (before, vm) = match first.rsplit_once('@') {
            Some((user, vm)) => (Some(user), vm),
            None => (None, first.as_str()),
        };
        // `web.vm.internal` is as good: names of VMs have no dots.
        let vm = vm.split('.').next().unwrap_or_default();
        let user = self.login.as_deref().or(before).unwrap_or(USER);
        if vm.is_empty() || user.is_empty() {
            return Err(Failure::usage("write VM or USER@VM"));
        }
        let command = match command {
            [dashes, rest @ ..] if dashes == "--" => rest,
            all => all,
        };
        Ok(Target { vm, user, command })
    }
}

/// What is the same for every call.
#[derive(Clone, Copy, Debug)]
pub(super) struct Programs<'a> {
    /// This program.
    pub(super) offshoot: &'a Path,
    /// Where the daemon listens.
    pub(super) socket: &'a Path,
    /// The private key of ours.
    pub(super) identity: &'a Path,
}

impl Programs<'_> {
    /// A command of this program inside of a configuration of ssh.
    pub(super) fn command(&self, verb: &str) -> Result<String, Failure> {
        Ok(format!(
            "{} --socket {} {verb}",
            quote::path(self.offshoot)?,
            quote::path(self.socket)?
        ))
    }
}

/// The words for ssh(1). Of two that say the same, it takes the first.
pub(super) fn words(
    args: &SshArgs,
    target: &Target<'_>,
    host: &SshHost,
    host_key: &str,
    programs: Programs<'_>,
) -> Result<Vec<OsString>, Failure> {
    let name = &host.domain_name;
    let mut words: Vec<OsString> = Vec::new();
    let mut option = |text: String| words.extend([OsString::from("-o"), text.into()]);
    // Where to, and how it is known that it is there. Nothing else may decide that.
    option(format!("HostName={name}"));
    option(format!("HostKeyAlias={name}"));
    option(format!(
        "ProxyCommand={} {}",
        programs.command("ssh-proxy")?,
        quote::word(host.id.as_str())?
    ));
    option(format!("KnownHostsCommand=/bin/echo {name} {host_key}"));
    for fixed in FIXED {
        option(fixed.to_owned());
    }
    // A connection that is shared by name could lead to a VM of another daemon.
    option("ControlPath=none".to_owned());

    for (given, letter) in [
        (&args.option, "-o"),
        (&args.identity, "-i"),
        (&args.local, "-L"),
        (&args.remote, "-R"),
        (&args.dynamic, "-D"),
    ] {
        for value in given {
            words.extend([letter.into(), value.into()]);
        }
    }
    words.extend(["-i".into(), programs.identity.into()]);
    words.extend(["-l".into(), target.user.into()]);
    for (given, letter) in [
        (args.agent, "-A"),
        (args.nothing, "-N"),
        (args.fork, "-f"),
        (args.no_input, "-n"),
        (args.no_tty, "-T"),
        (args.quiet, "-q"),
    ] {
        if given {
            words.push(letter.into());
        }
    }
    for (count, letter) in [(args.tty, "-t"), (args.verbose, "-v")] {
        words.extend(std::iter::repeat_n(OsString::from(letter), count.into()));
    }
    words.push("--".into());
    words.push(name.into());
    words.extend(target.command.iter().map(OsString::from));
    Ok(words)
}

/// The VM's true key or none, and our keys alone: no files of others, no questions.
pub(super) const FIXED: [&str; 6] = [
    "UserKnownHostsFile=/dev/null",
    "GlobalKnownHostsFile=/dev/null",
    "StrictHostKeyChecking=yes",
    "UpdateHostKeys=no",
    "IdentitiesOnly=yes",
    "PreferredAuthentications=publickey",
];

#[cfg(test)]
mod tests {
    use clap::Parser;
    use offshoot_model::{VmId, VmState};

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: SshArgs,
    }

    fn args(words: &[&str]) -> SshArgs {
        Line::try_parse_from([&["ssh"], words].concat()).unwrap().args
    }

    #[test]
    fn everything_after_the_vm_is_the_command() {
        for (words, vm, user, command) in [
            (&["web"][..], "web", "root", &[][..]),
            (&["app@web"], "web", "app", &[]),
            (&["-l", "me", "app@web.vm.internal", "ls"], "web", "me", &["ls"]),
            (&["web", "ls", "-l", "-t"], "web", "root", &["ls", "-l", "-t"]),
            (&["-tt", "web", "--", "-x"], "web", "root", &["-x"]),
        ] {
            let args = args(words);
            let target = args.target().unwrap();
            assert_eq!((target.vm, target.user), (vm, user), "{words:?}");
            assert_eq!(target.command, command, "{words:?}");
        }
        for bad in ["", "@web", "me@"] {
            args(&[bad]).target().unwrap_err();
        }
    }

    #[test]
    fn ssh_is_told_the_way_and_the_true_key() {
        let args = args(&[
            "-A",
            "-tt",
            "-L",
            "8080:localhost:80",
            "-o",
            "Compression=yes",
            "web",
            "id",
            "-u",
        ]);
        let host = SshHost {
            id: VmId::from_bytes(&[0xab; 6]),
            name: "web".parse().unwrap(),
            domain_name: "web.vm.internal".into(),
            state: VmState::Running,
            ipv4: None,
            ipv6: None,
            port: None,
            host_key: None,
        };
        let programs = Programs {
            offshoot: Path::new("/opt/my programs/offshoot"),
            socket: Path::new("/run/offshoot/api.sock"),
            identity: Path::new("/root/.config/offshoot/id_ed25519"),
        };
        let words = words(
            &args,
            &args.target().unwrap(),
            &host,
            "ssh-ed25519 AAAA",
            programs,
        )
        .unwrap();
        let words: Vec<_> = words.iter().map(|word| word.to_str().unwrap()).collect();
        insta::assert_snapshot!(words.join("\n").replace("-o\n", "-o "), @"
        -o HostName=web.vm.internal
        -o HostKeyAlias=web.vm.internal
        -o ProxyCommand='/opt/my programs/offshoot' --socket /run/offshoot/api.sock ssh-proxy abababababab
        -o KnownHostsCommand=/bin/echo web.vm.internal ssh-ed25519 AAAA
        -o UserKnownHostsFile=/dev/null
        -o GlobalKnownHostsFile=/dev/null
        -o StrictHostKeyChecking=yes
        -o UpdateHostKeys=no
        -o IdentitiesOnly=yes
        -o PreferredAuthentications=publickey
        -o ControlPath=none
        -o Compression=yes
        -L
        8080:localhost:80
        -i
        /root/.config/offshoot/id_ed25519
        -l
        root
        -A
        -t
        -t
        --
        web.vm.internal
        id
        -u
        ");
    }
}
