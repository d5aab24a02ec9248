//! The verbs that need no session: `ps`, `inspect`, `stop`, `rm` and their like.

use clap::Args;
use futures::{StreamExt, stream};
use offshoot_api::client::Client;
use offshoot_api::operation::OperationsQuery;
use offshoot_api::vm::{KillQuery, ListQuery, RemoveQuery, ResetQuery, Sessions, StopQuery, VmSummary};
use offshoot_model::VmName;

use crate::age;
use crate::each::each;
use crate::error::{Failure, report_and_go_on};
use crate::output::{Output, OutputArgs, json, line, now_ms, shorten, table};
use crate::ports;
use crate::signals::Signals;
use crate::timings;
use crate::values::vm_ref;

/// How much of a command `ps` shows, as Docker does.
const COMMAND_WIDTH: usize = 20;

#[derive(Clone, Debug, Args)]
pub(crate) struct PsArgs {
    /// Also VMs that do not run
    #[arg(short, long)]
    all: bool,
    /// Only ids
    #[arg(short, long)]
    quiet: bool,
    /// Show whole commands
    #[arg(long)]
    no_trunc: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct InspectArgs {
    /// Draw how long each stage of its last operations took
    #[arg(long)]
    timings: bool,
    /// How to show the timings; everything else is always JSON
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Output,
    /// Name or id
    #[arg(value_parser = vm_ref)]
    vm: String,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct StopArgs {
    /// Seconds to wait before the VM is killed [default: 10]
    #[arg(short = 't', long, visible_alias = "timeout", value_name = "SECONDS")]
    time: Option<u32>,
    /// Names or ids
    #[arg(required = true, value_name = "VM", value_parser = vm_ref)]
    vms: Vec<String>,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct KillArgs {
    /// Signal for the main process, by name or number; KILL ends the VM itself
    #[arg(short, long, value_name = "SIGNAL")]
    signal: Option<String>,
    /// Names or ids
    #[arg(required = true, value_name = "VM", value_parser = vm_ref)]
    vms: Vec<String>,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct RmArgs {
    /// Kill a VM that runs
    #[arg(short, long)]
    force: bool,
    /// Names or ids
    #[arg(required = true, value_name = "VM", value_parser = vm_ref)]
    vms: Vec<String>,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct ResetArgs {
    /// Kill a VM that runs
    #[arg(short, long)]
    force: bool,
    /// Names or ids
    #[arg(required = true, value_name = "VM", value_parser = vm_ref)]
    vms: Vec<String>,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct VmsArgs {
    /// Names or ids
    #[arg(required = true, value_name = "VM", value_parser = vm_ref)]
    vms: Vec<String>,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct RenameArgs {
    /// Name or id
    #[arg(value_parser = vm_ref)]
    vm: String,
    /// The new name
    name: String,
}

pub(crate) async fn ps(client: &Client, args: &PsArgs) -> Result<u8, Failure> {
    let vms = client.vms(&ListQuery { all: args.all }).await?;
    if args.output.output == Output::Json {
        json(&vms)?;
    } else if args.quiet {
        line(&vms.iter().map(|vm| format!("{}\n", vm.id)).collect::<String>())?;
    } else {
        line(&ps_table(&vms, now_ms(), args.no_trunc))?;
    }
    Ok(0)
}

fn ps_table(vms: &[VmSummary], now_ms: u64, whole: bool) -> String {
    let rows = vms.iter().map(|vm| {
        let command = if whole {
            vm.command.clone()
        } else {
            shorten(&vm.command, COMMAND_WIDTH)
        };
        vec![
            vm.name.to_string(),
            vm.id.to_string(),
            vm.image.clone(),
            format!("\"{command}\""),
            age::ago(vm.created_ms, now_ms),
            age::status(vm, now_ms),
            address(vm),
            ports::summary(&vm.ports),
            sessions(vm.sessions),
        ]
    });
    table(
        &[
            "NAME", "ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "ADDRESS", "PORTS", "SESSIONS",
        ],
        rows,
    )
}

fn address(vm: &VmSummary) -> String {
    vm.network
        .as_ref()
        .map_or_else(String::new, |network| network.ipv4.to_string())
}

/// Who is in a VM, in words; nothing when nobody is.
fn sessions(open: Sessions) -> String {
    let kinds = [("ssh", open.ssh), ("exec", open.exec)];
    let kinds = kinds.iter().filter(|(_, count)| *count > 0);
    let words: Vec<_> = kinds.map(|(kind, count)| format!("{count} {kind}")).collect();
    words.join(", ")
}

pub(crate) async fn inspect(client: &Client, args: &InspectArgs) -> Result<u8, Failure> {
    let details = client.vm(&args.vm).await?;
    if !args.timings {
        json(&details)?;
        return Ok(0);
    }
    let query = OperationsQuery {
        vm: Some(VmName::from(&details.summary.id)),
        ..OperationsQuery::default()
    };
    let operations = client.operations(&query).await?;
    match args.output {
        Output::Table => line(&timings::draw(&operations))?,
        Output::Json => json(&operations)?,
    }
    Ok(0)
}

pub(crate) async fn stop(client: &Client, args: &StopArgs) -> Result<u8, Failure> {
    let query = &StopQuery { time_s: args.time };
    each(&args.vms, |vm| async move {
        client.stop_vm(vm, query).await.map(drop)
    })
    .await
}

pub(crate) async fn restart(client: &Client, args: &StopArgs) -> Result<u8, Failure> {
    let query = &StopQuery { time_s: args.time };
    let all = each(&args.vms, |vm| async move {
        client.restart_vm(vm, query).await.map(drop)
    });
    or_cancel(client, &args.vms, all).await
}

/// Waits for starts. Ctrl-C undoes those that are under way before this program ends.
pub(crate) async fn or_cancel(
    client: &Client,
    vms: &[String],
    starts: impl Future<Output = Result<u8, Failure>>,
) -> Result<u8, Failure> {
    let mut signals = Signals::catch()?;
    tokio::select! {
        done = starts => done,
        () = signals.cancelled() => {
            for vm in vms {
                if let Err(error) = client.cancel_vm(vm).await {
                    report_and_go_on(error.into());
                }
            }
            Err(Failure::cancelled())
        }
    }
}

pub(crate) async fn kill(client: &Client, args: &KillArgs) -> Result<u8, Failure> {
    let query = &KillQuery {
        signal: args.signal.clone(),
    };
    each(&args.vms, |vm| async move {
        client.kill_vm(vm, query).await.map(drop)
    })
    .await
}

pub(crate) async fn rm(client: &Client, args: &RmArgs) -> Result<u8, Failure> {
    let query = &RemoveQuery { force: args.force };
    each(&args.vms, |vm| async move { client.remove_vm(vm, query).await }).await
}

pub(crate) async fn reset(client: &Client, args: &ResetArgs) -> Result<u8, Failure> {
    let query = &ResetQuery { force: args.force };
    each(&args.vms, |vm| async move {
        client.reset_vm(vm, query).await.map(drop)
    })
    .await
}

pub(crate) async fn pause(client: &Client, args: &VmsArgs) -> Result<u8, Failure> {
    each(&args.vms, |vm| async move { client.pause_vm(vm).await.map(drop) }).await
}

pub(crate) async fn resume(client: &Client, args: &VmsArgs) -> Result<u8, Failure> {
    each(
        &args.vms,
        |vm| async move { client.resume_vm(vm).await.map(drop) },
    )
    .await
}

pub(crate) async fn rename(client: &Client, args: &RenameArgs) -> Result<u8, Failure> {
    client.rename_vm(&args.vm, &args.name).await?;
    Ok(0)
}

/// Prints the status of each VM; its own is 0 when all could be asked, as `docker wait`.
pub(crate) async fn wait(client: &Client, args: &VmsArgs) -> Result<u8, Failure> {
    let mut answers = stream::iter(&args.vms)
        .map(|vm| client.wait_vm(vm))
        .buffered(args.vms.len());
    while let Some(answer) = answers.next().await {
        line(&answer?.exit.map_or(0, |exit| exit.code).to_string())?;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use offshoot_api::network::VmNetwork;
    use offshoot_model::{ExitReason, ExitStatus, PublishedPort, VmId, VmState};

    #[test]
    fn ps_looks_like_dockers() {
        let now = 1_000_000_000;
        let vm = |id: u8, name: &str, command: &str, state, exit| VmSummary {
            id: VmId::from_bytes(&[id; 6]),
            name: name.parse().unwrap(),
            image: "debian:bookworm".into(),
            command: command.into(),
            state,
            created_ms: now - 3_600_000,
            started_ms: Some(now - 180_000),
            finished_ms: Some(now - 5_000),
            exit,
            degraded: Vec::new(),
            network: None,
            ports: Vec::new(),
            sessions: Sessions {
                ssh: u32::from(name == "web") * 2,
                exec: u32::from(name == "web"),
            },
        };
        let exit = ExitStatus {
            code: 7,
            reason: ExitReason::MainExited,
        };
        let web = VmSummary {
            network: Some(VmNetwork {
                name: "default".parse().unwrap(),
                ipv4: [10, 87, 0, 2].into(),
                ipv6: "fd00::2".parse().unwrap(),
                mac: "02:00:0a:57:00:02".parse().unwrap(),
            }),
            ports: PublishedPort::parse_all("8080:80").unwrap(),
            ..vm(0xab, "web", "sleep infinity", VmState::Running, None)
        };
        let vms = [
            web,
            vm(
                0x12,
                "clever-otter",
                "sh -c 'echo a long command'",
                VmState::Stopped,
                Some(exit),
            ),
            vm(0x13, "sys", "", VmState::Created, None),
        ];
        insta::assert_snapshot!(ps_table(&vms, now, false), @r#"
        NAME           ID             IMAGE             COMMAND                  CREATED             STATUS                     ADDRESS     PORTS                  SESSIONS
        web            abababababab   debian:bookworm   "sleep infinity"         About an hour ago   Up 3 minutes               10.87.0.2   0.0.0.0:8080->80/tcp   2 ssh, 1 exec
        clever-otter   121212121212   debian:bookworm   "sh -c 'echo a long …"   About an hour ago   Exited (7) 5 seconds ago
        sys            131313131313   debian:bookworm   ""                       About an hour ago   Created
        "#);
        insta::assert_snapshot!(ps_table(&vms[1..2], now, true), @r#"
        NAME           ID             IMAGE             COMMAND                         CREATED             STATUS                     ADDRESS   PORTS   SESSIONS
        clever-otter   121212121212   debian:bookworm   "sh -c 'echo a long command'"   About an hour ago   Exited (7) 5 seconds ago
        "#);
        insta::assert_snapshot!(ps_table(&[], now, false), @r#"
        NAME   ID   IMAGE   COMMAND   CREATED   STATUS   ADDRESS   PORTS   SESSIONS
        "#);
    }
}
