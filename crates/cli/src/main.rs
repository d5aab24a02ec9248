//! `offshoot`: the command line. It turns words into requests and answers into text; the daemon does the rest.
//!
//! ```text
//! args ─► run │ exec │ vm │ logs │ cp │ image │ kernel │ net │ prune │ events │ bench │ system ─► api::client ─► offshootd
//!          └─ session (relay) ─ terminal, detach, signals        ssh ─► the user's ssh(1) ─► ssh-proxy ─┘
//! ```

mod age;
mod args;
mod bench;
mod cp;
mod credentials;
mod decisions;
mod detach;
mod doctor;
mod each;
mod error;
mod events;
mod exec;
mod image;
mod kernel;
mod logs;
mod net;
mod net_dns;
mod network_args;
mod output;
mod packing;
mod ports;
mod progress;
mod prune;
mod run;
mod session;
mod signals;
mod ssh;
mod stats;
mod system;
mod template;
mod terminal;
mod timings;
mod usage;
mod values;
mod verify;
mod vm;
mod vm_config;

use std::process::ExitCode;

use clap::Parser;

use args::Cli;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => return error::Failure::io("cannot start", &e).report(),
    };
    let outcome = runtime.block_on(cli.run());
    // A thread may still wait for standard input; nobody needs it any more.
    runtime.shutdown_background();
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(failure) => failure.report(),
    }
}
