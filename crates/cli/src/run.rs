//! `run`, `create`, `start` and `attach`: a VM from a command line, and its main process in the foreground.
//!
//! ```text
//! (pull, prepare) ─► create ─► attach ─► start ─► relay ─► status ─► (gone, with --rm)
//!      Ctrl-C: give up, remove      Ctrl-C: to the process
//! ```

use std::cell::OnceCell;
use std::time::{Duration, Instant};

use clap::Args;
use offshoot_api::client::Client;
use offshoot_api::operation::OperationsQuery;
use offshoot_api::vm::{AttachQuery, RemoveQuery, VmSummary};
use offshoot_model::{VmConfig, VmName};

use crate::decisions;
use crate::error::{Failure, report_and_go_on};
use crate::image::{prepare_image, pull_image, tell_of_missing_seeds};
use crate::output::{Output, aside, line, note};
use crate::session::{End, Relay, exit_code, relay, relay_timed};
use crate::signals::Signals;
use crate::terminal::check_tty;
use crate::timings::Stopwatch;
use crate::values::vm_ref;
use crate::vm_config::{Pull, VmArgs};

/// How long `run --rm` waits for the VM to be gone after its process ended: a shutdown, and then some.
const GONE_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Clone, Debug, Args)]
pub(crate) struct RunArgs {
    /// Run in the background and print the VM's id
    #[arg(short, long)]
    detach: bool,
    /// Draw on standard error where the time went, in this program and in the daemon; `json` writes the numbers
    #[arg(long, value_enum, value_name = "FORMAT", num_args = 0..=1, require_equals = true,
        default_missing_value = "table")]
    timings: Option<Output>,
    #[command(flatten)]
    making: Making,
    #[command(flatten)]
    vm: VmArgs,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct CreateArgs {
    #[command(flatten)]
    making: Making,
    #[command(flatten)]
    vm: VmArgs,
}

/// What is told while a VM is made.
#[derive(Clone, Copy, Debug, Args)]
struct Making {
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    /// Say which VMM and which root was chosen, and why
    // No short form: `-v` is a volume.
    #[arg(long)]
    verbose: bool,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct StartArgs {
    /// Show what the main process writes, and end with its status
    #[arg(short, long)]
    attach: bool,
    /// Pass on standard input as well
    #[arg(short, long, requires = "attach")]
    interactive: bool,
    /// Names or ids
    #[arg(required = true, value_name = "VM", value_parser = vm_ref)]
    vms: Vec<String>,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct AttachArgs {
    /// Do not pass on standard input
    #[arg(long)]
    no_stdin: bool,
    /// Name or id
    #[arg(value_parser = vm_ref)]
    vm: String,
}

pub(crate) async fn run(client: &Client, args: RunArgs) -> Result<u8, Failure> {
    let pull = args.vm.pull;
    let keys = args.vm.ssh_keys.lines()?;
    let mut config = args.vm.config()?;
    config.ssh.keys = keys;
    if !args.detach {
        check_tty(config.stdin, config.tty)?;
    }
    let mut signals = Signals::catch()?;
    let mut watch = Stopwatch::start();
    let vm = tokio::select! {
        vm = make(&mut watch, client, &config, pull, args.making.quiet) => vm?,
        () = signals.cancelled() => return Err(Failure::cancelled()),
    };
    let id = vm.id.as_str();
    if args.making.verbose {
        decisions::tell(client, id).await;
    }
    if args.detach {
        let begun = begin(client, id, &mut signals, &config);
        watch.stage("start", begun).await?;
        line(id)?;
        tell_timings(client, &vm, watch, None, args.timings).await;
        return Ok(0);
    }
    let query = AttachQuery {
        stdin: config.stdin,
        logs: false,
    };
    let session = match watch.stage("attach", client.attach(id, &query)).await {
        Ok(session) => session,
        Err(e) => {
            forget_if_asked(client, id, &config).await;
            return Err(e.into());
        }
    };
    watch
        .stage("start", begin(client, id, &mut signals, &config))
        .await?;
    let main = Relay {
        stdin: config.stdin,
        tty: config.tty,
        signals: &mut signals,
        main_of: Some((client, id)),
    };
    let first_output = OnceCell::new();
    let relayed = relay_timed(session, main, &first_output);
    let end = watch.stage("main", relayed).await?;
    if config.auto_remove && matches!(end, End::Status(_)) {
        let gone = async {
            tokio::select! {
                () = until_gone(client, id) => (),
                () = signals.cancelled() => (),
            }
        };
        watch.stage("removal", gone).await;
    }
    tell_timings(client, &vm, watch, first_output.into_inner(), args.timings).await;
    exit_code(end)
}

/// Shows where the time went, when somebody asked. That it cannot be told is no reason to fail.
async fn tell_timings(
    client: &Client,
    vm: &VmSummary,
    watch: Stopwatch,
    first_output: Option<Instant>,
    format: Option<Output>,
) {
    let Some(format) = format else { return };
    let query = OperationsQuery {
        vm: Some(VmName::from(&vm.id)),
        ..OperationsQuery::default()
    };
    // Taken before the daemon is asked: that is no part of it.
    let mut timings = watch.stop(first_output, Vec::new());
    match client.operations(&query).await {
        Ok(operations) => timings.operations = operations,
        Err(e) => return report_and_go_on(e.into()),
    }
    match format {
        Output::Table => aside(&timings.draw()),
        Output::Json => match serde_json::to_string_pretty(&timings) {
            Ok(text) => aside(&(text + "\n")),
            Err(e) => report_and_go_on(Failure::internal("cannot write the timings as JSON").caused_by(&e)),
        },
    }
}

pub(crate) async fn create(client: &Client, args: CreateArgs) -> Result<u8, Failure> {
    let pull = args.vm.pull;
    let keys = args.vm.ssh_keys.lines()?;
    let mut config = args.vm.config()?;
    config.ssh.keys = keys;
    let mut watch = Stopwatch::start();
    let vm = make(&mut watch, client, &config, pull, args.making.quiet).await?;
    if args.making.verbose {
        decisions::tell(client, vm.id.as_str()).await;
    }
    line(vm.id.as_str())?;
    Ok(0)
}

pub(crate) async fn start(client: &Client, args: &StartArgs) -> Result<u8, Failure> {
    if !args.attach {
        let all = crate::each::each(&args.vms, |vm| async move { client.start_vm(vm).await.map(drop) });
        return crate::vm::or_cancel(client, &args.vms, all).await;
    }
    let [vm] = args.vms.as_slice() else {
        return Err(
            Failure::invalid("cannot attach to several VMs at once").hint("start them one by one with `-a`")
        );
    };
    let details = client.vm(vm).await?;
    let id = details.summary.id.as_str();
    let (stdin, tty) = (args.interactive && details.config.stdin, details.config.tty);
    check_tty(stdin, tty)?;
    let mut signals = Signals::catch()?;
    let session = client.attach(id, &AttachQuery { stdin, logs: false }).await?;
    tokio::select! {
        started = client.start_vm(id) => drop(started?),
        () = signals.cancelled() => {
            client.cancel_vm(id).await?;
            return Err(Failure::cancelled());
        }
    }
    exit_code(
        relay(
            session,
            Relay {
                stdin,
                tty,
                signals: &mut signals,
                main_of: Some((client, id)),
            },
        )
        .await?,
    )
}

pub(crate) async fn attach(client: &Client, args: &AttachArgs) -> Result<u8, Failure> {
    let details = client.vm(&args.vm).await?;
    let id = details.summary.id.as_str();
    let (stdin, tty) = (details.config.stdin && !args.no_stdin, details.config.tty);
    check_tty(stdin, tty)?;
    let mut signals = Signals::catch()?;
    let session = client.attach(id, &AttachQuery { stdin, logs: false }).await?;
    exit_code(
        relay(
            session,
            Relay {
                stdin,
                tty,
                signals: &mut signals,
                main_of: Some((client, id)),
            },
        )
        .await?,
    )
}

/// Creates a VM, and before that pulls and prepares its image when it must: a create would do the latter without a word.
async fn make(
    watch: &mut Stopwatch,
    client: &Client,
    config: &VmConfig,
    pull: Pull,
    quiet: bool,
) -> Result<VmSummary, Failure> {
    watch
        .stage("image", find_or_fetch(client, config, pull, quiet))
        .await?;
    Ok(watch.stage("create", client.create_vm(config)).await?)
}

async fn find_or_fetch(client: &Client, config: &VmConfig, pull: Pull, quiet: bool) -> Result<(), Failure> {
    let image = &config.image;
    if pull == Pull::Always {
        pull_image(client, image, None, true, quiet).await?;
    } else {
        match client.find_image(image).await? {
            Some(found) if found.prepared => {
                tell_of_missing_seeds(&found, quiet);
            }
            Some(_) => drop(prepare_image(client, image, false, quiet).await?),
            None if pull == Pull::Missing => {
                if !quiet {
                    note(&format!(
                        "Unable to find image `{image}` in the store, pulling it"
                    ));
                }
                pull_image(client, image, None, true, quiet)
                    .await
                    .map_err(|e| e.hint("`offshoot image ls` lists the images in the store"))?;
            }
            // The daemon says it best, with what to do about it.
            None => {}
        }
    }
    Ok(())
}

/// Starts a VM that this program made. Ctrl-C gives it up; a failure leaves it as `create` did, or gone with `--rm`.
async fn begin(client: &Client, id: &str, signals: &mut Signals, config: &VmConfig) -> Result<(), Failure> {
    let started = tokio::select! {
        started = client.start_vm(id) => Some(started),
        () = signals.cancelled() => None,
    };
    match started {
        Some(Ok(_)) => Ok(()),
        Some(Err(e)) => {
            forget_if_asked(client, id, config).await;
            Err(e.into())
        }
        None => {
            forget(client, id).await;
            Err(Failure::cancelled())
        }
    }
}

async fn forget_if_asked(client: &Client, id: &str, config: &VmConfig) {
    if config.auto_remove {
        forget(client, id).await;
    }
}

async fn forget(client: &Client, id: &str) {
    match client.remove_vm(id, &RemoveQuery { force: true }).await {
        Ok(()) => (),
        Err(e) if e.is_not_found() => (),
        Err(e) => report_and_go_on(Failure::from(e).hint(format!("remove it with `offshoot rm -f {id}`"))),
    }
}

/// Waits until the daemon has removed a VM, so that its name is free and nothing of it is left.
async fn until_gone(client: &Client, id: &str) {
    let deadline = Instant::now() + GONE_TIMEOUT;
    let mut pause = Duration::from_millis(2);
    while client.vm(id).await.is_ok() && Instant::now() < deadline {
        tokio::time::sleep(pause).await;
        pause = (pause * 3 / 2).min(Duration::from_millis(50));
    }
}
