//! `offshootd`: images, kernels and VMs behind an HTTP API on a Unix socket.
//!
//! The only place that names concrete back ends ([`app`]). VMs outlive it: stopping or killing it leaves them running,
//! and the next one finds them again.

mod app;
mod bases;
mod blocking;
mod choose;
mod config;
mod error;
mod extract;
mod images;
mod long_work;
mod prune;
mod routes;
mod socket;
mod sweep;
mod time;
mod usage;
mod verify;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use tracing_subscriber::EnvFilter;

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
    /// Log lines as JSON
    #[arg(long)]
    log_json: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_env("OFFSHOOT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    if arguments.log_json {
        log.json().init();
    } else {
        log.with_target(false).init();
    }
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
    let config = DaemonConfig::load(arguments.config.as_deref())?;
    let socket = arguments
        .socket
        .unwrap_or_else(|| arguments.run_dir.join("api.sock"));
    let runtime = tokio::runtime::Runtime::new().context("cannot start the async runtime")?;
    runtime.block_on(async {
        let app = App::start(&arguments.data_dir, &arguments.run_dir, &socket, config).await?;
        let listener = socket::listen(&socket, &app.config.socket_group)?;
        tracing::info!(socket = %socket.display(), data = %arguments.data_dir.display(), "ready");
        let router = routes::router(app);
        axum::serve(listener, router)
            .with_graceful_shutdown(shutdown_asked())
            .await
            .context("the API server stopped")?;
        let _ = std::fs::remove_file(&socket);
        tracing::info!("stopped; VMs run on");
        Ok(())
    })
    // Tasks of VMs and open sessions end with the runtime; the VMs do not.
}

/// Returns on SIGTERM or SIGINT. Open sessions do not hold the end up: two seconds later the process ends anyway.
async fn shutdown_asked() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tokio::spawn(async {
        tokio::time::sleep(std::time::Duration::from_secs(2)).await;
        tracing::info!("stopped with open sessions; VMs run on");
        std::process::exit(0);
    });
}
