//! `exec`: one more process in a running VM.

use std::path::PathBuf;

use clap::Args;
use offshoot_api::channel::ExecStart;
use offshoot_api::client::Client;
use offshoot_model::ProcessConfig;

use crate::error::Failure;
use crate::session::{Relay, exit_code, relay};
use crate::signals::Signals;
use crate::terminal::{check_tty, window_size};
use crate::values::{env_arg, environment, vm_ref};

#[derive(Clone, Debug, Args)]
pub(crate) struct ExecArgs {
    /// Start it and do not wait for it
    #[arg(short, long)]
    detach: bool,
    /// Pass on standard input
    #[arg(short, long)]
    interactive: bool,
    /// Give it a terminal
    #[arg(short, long)]
    tty: bool,
    /// Set an environment variable; NAME alone passes on its value
    #[arg(short, long, value_name = "NAME[=VALUE]", value_parser = env_arg)]
    env: Vec<String>,
    /// Read environment variables from a file
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// Working directory in the guest
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// User (name or uid), and group after a colon
    #[arg(short, long)]
    user: Option<String>,
    // The usage line shows it better than clap does.
    #[arg(required = true, num_args = 2.., trailing_var_arg = true, value_names = ["VM", "COMMAND"], hide = true)]
    vm_and_command: Vec<String>,
}

pub(crate) async fn exec(client: &Client, args: ExecArgs) -> Result<u8, Failure> {
    let (stdin, tty) = (args.interactive && !args.detach, args.tty);
    check_tty(stdin, tty)?;
    let mut words = args.vm_and_command.into_iter();
    let vm = vm_ref(&words.next().unwrap_or_default()).map_err(Failure::usage)?;
    let process = ProcessConfig {
        argv: words.collect(),
        env: environment(&args.env_file, &args.env, |name| std::env::var(name).ok())?,
        working_dir: args.workdir.unwrap_or_default(),
        user: args.user.unwrap_or_default(),
        tty,
        stdin,
    };
    let window = if tty { window_size() } else { None };
    let mut signals = Signals::catch()?;
    let start = ExecStart {
        process,
        window,
        detach: args.detach,
    };
    let session = tokio::select! {
        session = client.exec(&vm, &start) => session?,
        () = signals.cancelled() => return Err(Failure::cancelled()),
    };
    exit_code(
        relay(
            session,
            Relay {
                stdin,
                tty,
                signals: &mut signals,
                main_of: None,
            },
        )
        .await?,
    )
}
