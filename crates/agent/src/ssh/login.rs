//! What runs for somebody who logged in: their shell, a command in it, or the file server.
//!
//! An image without a shell (one static binary) still runs commands: they are split into words as a shell would, and
//! that is all that is done with them.

use std::path::{Path, PathBuf};

use offshoot_agent_proto::v1;

use crate::spawn::{self, NOT_FOUND, Program, Standard, failure};
use crate::users::Login;

/// Every image with a shell has this one.
const SHELL: &str = "/bin/sh";

/// What a client asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// A login shell.
    Shell,
    /// One command line.
    Command(String),
    /// The file server.
    Sftp,
}

/// A request and all that surrounds it.
pub(super) struct Order {
    /// What to run.
    pub(super) request: Request,
    /// For whom.
    pub(super) login: Login,
    /// NAME=VALUE of the VM and of the client, in this order.
    pub(super) environment: Vec<String>,
    /// `TERM` with a terminal.
    pub(super) terminal: Option<String>,
    /// What connects it.
    pub(super) standard: Standard,
    /// The program that speaks sftp.
    pub(super) sftp_program: PathBuf,
}

/// Decides what to start. Must be called where paths are the guest's.
pub(super) fn program(order: Order) -> Result<Program, v1::StartFailure> {
    let Order {
        request,
        login,
        mut environment,
        terminal,
        standard,
        sftp_program,
    } = order;
    let shell = shell_of(&login);
    let home = login.identity.home.clone();
    environment.extend([
        format!("HOME={home}"),
        format!("USER={}", login.name),
        format!("LOGNAME={}", login.name),
        format!("SHELL={}", shell.as_deref().unwrap_or(SHELL)),
    ]);
    let tty = terminal.is_some();
    environment.extend(
        terminal
            .filter(|term| !term.is_empty())
            .map(|term| format!("TERM={term}")),
    );
    let environment = spawn::environment(&environment, &home, &spawn::hostname(), tty);
    // A home that is not there keeps nobody out.
    let directory = Some(PathBuf::from(home))
        .filter(|home| home.is_absolute() && home.is_dir())
        .unwrap_or_else(|| PathBuf::from("/"));
    let (executable, name, arguments) = match (request, shell) {
        (Request::Sftp, _) => {
            let arguments = vec![crate::SFTP_ARGUMENT.to_owned()];
            (sftp_program, "sftp-server".to_owned(), arguments)
        }
        (Request::Shell, Some(shell)) => {
            let name = format!("-{}", base_name(&shell));
            (shell.into(), name, Vec::new())
        }
        (Request::Shell, None) => {
            return Err(failure(
                NOT_FOUND,
                "this image has no shell; commands run without one: ssh VM COMMAND [ARGUMENT...]",
            ));
        }
        (Request::Command(command), Some(shell)) => {
            let name = base_name(&shell).to_owned();
            (shell.into(), name, vec!["-c".to_owned(), command])
        }
        (Request::Command(command), None) => {
            let mut words = split(&command)?;
            let name = words.remove(0);
            let executable = spawn::resolve(&name, spawn::path_of(&environment), &directory)?;
            (executable, name, words)
        }
    };
    Ok(Program {
        executable,
        name,
        arguments,
        environment,
        directory,
        identity: login.identity,
        standard,
    })
}

/// The user's shell, else the one that every image with a shell has, else none.
fn shell_of(login: &Login) -> Option<String> {
    [&*login.shell, SHELL]
        .into_iter()
        .filter(|shell| shell.starts_with('/'))
        .find(|shell| spawn::resolve(shell, "", Path::new("/")).is_ok())
        .map(str::to_owned)
}

fn base_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// The words of a command line; at least one.
fn split(command: &str) -> Result<Vec<String>, v1::StartFailure> {
    let words = shlex::split(command).filter(|words| words.first().is_some_and(|word| !word.is_empty()));
    words.ok_or_else(|| {
        failure(
            NOT_FOUND,
            "this image has no shell, and the command cannot be split into words",
        )
    })
}

#[cfg(test)]
mod unit {
    use super::*;
    use crate::users::Identity;

    fn order(request: Request, shell: &str) -> Order {
        Order {
            request,
            login: Login {
                name: "bob".to_owned(),
                identity: Identity {
                    uid: 7,
                    gid: 7,
                    groups: vec![7],
                    home: "/nonexistent".to_owned(),
                },
                shell: shell.to_owned(),
            },
            environment: vec![
                "A=1".to_owned(),
                "HOME=/image".to_owned(),
                "USER=image".to_owned(),
            ],
            terminal: None,
            standard: Standard::Pipes { stdin: true },
            sftp_program: "/the/agent".into(),
        }
    }

    fn check(request: Request, shell: &str, executable: &str, argv: &[&str]) {
        let program = program(order(request, shell)).unwrap();
        let found: Vec<&str> = std::iter::once(&program.name)
            .chain(&program.arguments)
            .map(String::as_str)
            .collect();
        assert_eq!(
            (program.executable.to_str().unwrap(), &found[..]),
            (executable, argv)
        );
        let value = |name: &str| {
            let pair = program.environment.iter().find(|(known, _)| known == name);
            pair.map(|(_, value)| value.as_str())
        };
        assert_eq!(value("A"), Some("1"));
        assert_eq!(
            (value("HOME"), value("USER")),
            (Some("/nonexistent"), Some("bob"))
        );
        assert_eq!(program.directory, Path::new("/"));
    }

    #[test]
    fn a_login_gets_its_shell_or_the_usual_one() {
        let command = || Request::Command("echo 'a b'".to_owned());
        check(Request::Shell, "/bin/bash", "/bin/bash", &["-bash"]);
        check(Request::Shell, "/nonexistent/zsh", "/bin/sh", &["-sh"]);
        check(Request::Shell, "", "/bin/sh", &["-sh"]);
        check(command(), "/bin/bash", "/bin/bash", &["bash", "-c", "echo 'a b'"]);
        check(
            Request::Sftp,
            "/bin/bash",
            "/the/agent",
            &["sftp-server", crate::SFTP_ARGUMENT],
        );
    }

    #[test]
    fn words_are_split_as_a_shell_would() {
        assert_eq!(
            split("/app 'a b' \"c\" d\\ e").unwrap(),
            ["/app", "a b", "c", "d e"]
        );
        for nothing in ["", "  ", "'open", "'' x"] {
            assert_eq!(split(nothing).unwrap_err().status, NOT_FOUND, "{nothing:?}");
        }
    }
}
