//! `offshootd`: images, kernels and VMs behind an HTTP API on a Unix socket.
//!
//! The only place that names concrete back ends ([`app`]). VMs outlive it: stopping or killing it leaves them running,
//! and the next one finds them again.

mod app;
mod bases;
mod blocking;
mod body;
mod choose;
mod config;
mod doctor;
mod error;
mod extract;
mod images;
mod known_bases;
mod log;
mod long_work;
mod operations;
mod prometheus;
mod prune;
mod refusal;
mod routes;
mod serve;
mod service_manager;
mod socket;
mod stats;
mod sweep;
mod time;
mod usage;
mod verify;
mod warm;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use offshoot_engine::fail_point;
use offshoot_net::Namespace;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::app::App;
use crate::config::DaemonConfig;

/// The Offshoot daemon: turns OCI images into virtual machines.
#[derive(Debug, Parser)]
#[command(name = "offshootd", version)]
struct Arguments {
    /// Where images, bases, kernels and VMs are kept
    #[arg(
        long,
        value_name = "DIR",
        default_value = "/var/lib/offshoot",
        env = "OFFSHOOT_DATA_DIR"
    )]
    data_dir: PathBuf,
    /// Where sockets lie
    #[arg(
        long,
        value_name = "DIR",
        default_value = "/run/offshoot",
        env = "OFFSHOOT_RUN_DIR"
    )]
    run_dir: PathBuf,
    /// The API's socket [default: RUN_DIR/api.sock]
    #[arg(long, value_name = "PATH", env = "OFFSHOOT_SOCKET")]
    socket: Option<PathBuf>,
    /// A TOML file with settings; see docs/config.md
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The network namespace (`ip netns add NAME`) for bridges, filters, names and published ports [default: the host's]
    #[arg(long, value_name = "NAME")]
    netns: Option<String>,
    /// Log lines as JSON
    #[arg(long)]
    log_json: bool,
}

/// How long a thread that waits for a disk may hold up the end.
const DISK_PATIENCE: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    log::start(arguments.log_json);
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(
                "{}",
                error
                    .chain()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>()
                    .join(": ")
            );
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    if fail_point::arm()? {
        tracing::warn!(
            "this daemon will end itself at a chosen point: {} is set",
            fail_point::VARIABLE
        );
    }
    let config = DaemonConfig::load(arguments.config.as_deref())?;
    let namespace = match &arguments.netns {
        Some(name) => Namespace::named(name)?,
        None => Namespace::own(),
    };
    let socket = arguments
        .socket
        .unwrap_or_else(|| arguments.run_dir.join("api.sock"));
    let runtime = tokio::runtime::Runtime::new().context("cannot start the async runtime")?;
    runtime.block_on(async {
        let signals = Signals::catch().context("cannot catch signals")?;
        if let Err(error) = serve::raise_file_limit() {
            tracing::warn!(%error, "cannot raise the limit of open files");
        }
        let app = App::start(
            &arguments.data_dir,
            &arguments.run_dir,
            &socket,
            arguments.config.as_deref(),
            config,
            namespace,
        )
        .await?;
        if let Some(address) = app.config.metrics_listen {
            prometheus::listen(address, routes::metrics_alone(Arc::clone(&app))).await?;
        }
        let listener = socket::listen(&socket, &app.config.socket_group)?;
        tracing::info!(socket = %socket.display(), data = %arguments.data_dir.display(), "ready");
        let patience = app.config.patience();
        let operations = app.engine.operations().clone();
        let engine = app.engine.clone();
        warm::keep(&app);
        let end = app.end.clone();
        let asked = app.end.clone();
        let router = routes::router(app, patience);
        service_manager::tell_ready(&socket);
        serve::serve(listener, router, patience, signals.stop(asked)).await;
        end.cancel();
        engine.end_slots().await;
        if let Some(templates) = engine.templates() {
            templates.end().await;
        }
        drop(engine);
        let _ = std::fs::remove_file(&socket);
        operations.flush().await;
        tracing::info!("stopped; VMs run on");
        anyhow::Ok(())
    })?;
    // Tasks of VMs and open sessions end here; the VMs do not. A thread that waits for a disk holds nothing up.
    runtime.shutdown_timeout(DISK_PATIENCE);
    Ok(())
}

/// The signals that a daemon gets.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

impl Signals {
    /// From now on, none of them ends the process by itself.
    fn catch() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// Returns on SIGTERM or SIGINT, or when a client `asked` for it. SIGHUP changes nothing, and the log says so: a terminal that went away shall not
    /// take the daemon along, and settings are read at start only.
    async fn stop(mut self, asked: CancellationToken) {
        loop {
            tokio::select! {
                () = asked.cancelled() => break,
                _ = self.terminate.recv() => break,
                _ = self.interrupt.recv() => break,
                _ = self.hang_up.recv() => tracing::info!(
                    "SIGHUP: settings are read at start only; restart the daemon to change them, VMs run on meanwhile"
                ),
            }
        }
        tracing::info!("stopping");
        service_manager::tell_stopping();
    }
}
