//! The whole command line: global flags, the verbs, and who does them.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use offshoot_api::client::Client;

use crate::bench::{self, BenchCommand};
use crate::cp::{self, CpArgs};
use crate::doctor::{self, DoctorArgs};
use crate::error::Failure;
use crate::events::{self, EventsArgs};
use crate::exec::{self, ExecArgs};
use crate::image::{self, ImageCommand};
use crate::kernel::{self, KernelCommand};
use crate::logs::{self, LogsArgs};
use crate::net::{self, NetCommand};
use crate::output::OutputArgs;
use crate::ports::{self, PortArgs};
use crate::prune::{self, PruneArgs};
use crate::run::{self, AttachArgs, CreateArgs, RunArgs, StartArgs};
use crate::ssh::{self, KnownHostsArgs, ProxyArgs, SshArgs, SshConfigArgs};
use crate::stats::{self, StatsArgs};
use crate::system::{self, CompletionArgs, SystemCommand};
use crate::template::{self, TemplateCommand};
use crate::usage::{self, DfArgs};
use crate::vm::{self, InspectArgs, KillArgs, PsArgs, RenameArgs, ResetArgs, RmArgs, StopArgs, VmsArgs};

/// Virtual machines from OCI images, in the time a container takes
#[derive(Clone, Debug, Parser)]
#[command(
    name = "offshoot",
    version,
    max_term_width = 110,
    disable_help_subcommand = true
)]
#[command(after_help = "Exit status: 0, 1 error, 2 wrong usage, 3 daemon unreachable; \
    `run`, `exec`, `ssh`, `start -a`, `attach` and `wait` end with the status of the process.")]
pub(crate) struct Cli {
    /// Where the daemon listens
    #[arg(
        long,
        global = true,
        env = "OFFSHOOT_SOCKET",
        hide_env_values = true,
        value_name = "PATH",
        default_value = "/run/offshoot/api.sock",
        help_heading = "Global options"
    )]
    socket: PathBuf,
    #[command(subcommand)]
    command: Verb,
}

#[derive(Clone, Debug, Subcommand)]
enum Verb {
    /// Create a VM from an image and run a command in it
    #[command(override_usage = "offshoot run [OPTIONS] IMAGE [COMMAND] [ARG...]")]
    Run(Box<RunArgs>),
    /// Create a VM, but do not start it
    #[command(override_usage = "offshoot create [OPTIONS] IMAGE [COMMAND] [ARG...]")]
    Create(Box<CreateArgs>),
    /// Start VMs that do not run
    Start(StartArgs),
    /// Shut VMs down
    Stop(StopArgs),
    /// Stop VMs and start them again
    Restart(StopArgs),
    /// End VMs at once, or signal their main processes
    Kill(KillArgs),
    /// Let VMs stand still
    Pause(VmsArgs),
    /// Let paused VMs go on
    #[command(visible_alias = "unpause")]
    Resume(VmsArgs),
    /// Drop what VMs wrote to `/`, keep their work disks
    Reset(ResetArgs),
    /// Remove VMs
    #[command(visible_alias = "remove")]
    Rm(RmArgs),
    /// List VMs
    Ps(PsArgs),
    /// Show everything about a VM, as JSON
    Inspect(InspectArgs),
    /// Run a command in a running VM
    #[command(override_usage = "offshoot exec [OPTIONS] VM COMMAND [ARG...]")]
    Exec(Box<ExecArgs>),
    /// Open a shell or run a command in a running VM, over SSH
    #[command(override_usage = "offshoot ssh [OPTIONS] [USER@]VM [COMMAND] [ARG...]")]
    Ssh(Box<SshArgs>),
    /// Write what ssh, scp, rsync and their like need to reach VMs by name, as ssh_config(5)
    SshConfig(SshConfigArgs),
    /// Join standard input and output with a VM's SSH server
    #[command(hide = true)]
    SshProxy(ProxyArgs),
    /// Print a VM's SSH host key as a line of known_hosts
    #[command(hide = true)]
    SshKnownHosts(KnownHostsArgs),
    /// Copy files between a VM and this machine
    Cp(CpArgs),
    /// Show what a VM's main process wrote
    Logs(LogsArgs),
    /// Show what running VMs take, again and again
    Stats(StatsArgs),
    /// Connect to a VM's main process
    Attach(AttachArgs),
    /// Show what happens to VMs, and what happened
    Events(EventsArgs),
    /// Wait until VMs do not run any more, and print their exit statuses
    Wait(VmsArgs),
    /// Give a VM another name
    Rename(RenameArgs),
    /// Show which ports of the host lead to a VM
    Port(PortArgs),
    /// Work with images
    #[command(subcommand)]
    Image(ImageCommand),
    /// Work with kernels
    #[command(subcommand)]
    Kernel(KernelCommand),
    /// Work with templates: saved VMs that others are restored from
    #[command(subcommand)]
    Template(TemplateCommand),
    /// Work with networks
    #[command(subcommand, visible_alias = "network")]
    Net(NetCommand),
    /// Look at the daemon
    #[command(subcommand)]
    System(SystemCommand),
    /// Show what everything takes on disk, and VMs in memory
    Df(DfArgs),
    /// Delete what nothing needs any more
    Prune(PruneArgs),
    /// Check what this machine can do; status 1 when VMs cannot run
    Doctor(DoctorArgs),
    /// Measure how fast VMs come
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Write a completion script
    Completion(CompletionArgs),
    /// Show the versions of client and daemon
    Version(OutputArgs),
    /// Short for `image ls`
    #[command(hide = true)]
    Images(image::LsArgs),
    /// Short for `image rm`
    #[command(hide = true)]
    Rmi(image::RmArgs),
    /// Short for `image pull`
    #[command(hide = true)]
    Pull(image::PullArgs),
    /// Short for `system info`
    #[command(hide = true)]
    Info(OutputArgs),
}

impl Cli {
    /// Does what the words say and gives the exit status.
    pub(crate) async fn run(self) -> Result<u8, Failure> {
        let client = &Client::new(self.socket);
        match self.command {
            Verb::Run(args) => run::run(client, *args).await,
            Verb::Create(args) => run::create(client, *args).await,
            Verb::Start(args) => run::start(client, &args).await,
            Verb::Stop(args) => vm::stop(client, &args).await,
            Verb::Restart(args) => vm::restart(client, &args).await,
            Verb::Kill(args) => vm::kill(client, &args).await,
            Verb::Pause(args) => vm::pause(client, &args).await,
            Verb::Resume(args) => vm::resume(client, &args).await,
            Verb::Reset(args) => vm::reset(client, &args).await,
            Verb::Rm(args) => vm::rm(client, &args).await,
            Verb::Ps(args) => vm::ps(client, &args).await,
            Verb::Inspect(args) => vm::inspect(client, &args).await,
            Verb::Exec(args) => exec::exec(client, *args).await,
            Verb::Ssh(args) => ssh::ssh(client, *args).await,
            Verb::SshConfig(args) => ssh::ssh_config(client, &args).await,
            Verb::SshProxy(args) => ssh::proxy(client, &args).await,
            Verb::SshKnownHosts(args) => ssh::known_hosts(client, &args).await,
            Verb::Cp(args) => cp::cp(client, &args).await,
            Verb::Logs(args) => logs::logs(client, &args).await,
            Verb::Stats(args) => stats::stats(client, &args).await,
            Verb::Attach(args) => run::attach(client, &args).await,
            Verb::Events(args) => events::events(client, &args).await,
            Verb::Wait(args) => vm::wait(client, &args).await,
            Verb::Rename(args) => vm::rename(client, &args).await,
            Verb::Port(args) => ports::port(client, &args).await,
            Verb::Image(command) => image::image(client, command).await,
            Verb::Kernel(command) => kernel::kernel(client, command).await,
            Verb::Template(command) => template::template(client, command).await,
            Verb::Net(command) => net::net(client, command).await,
            Verb::System(SystemCommand::Info(args)) | Verb::Info(args) => system::info(client, args).await,
            Verb::System(SystemCommand::Timings(args)) => system::timings(client, args).await,
            Verb::System(SystemCommand::Shutdown(args)) => system::shut_down(client, &args).await,
            Verb::Df(args) => usage::df(client, &args).await,
            Verb::Prune(args) => prune::prune(client, &args).await,
            Verb::Doctor(args) => doctor::doctor(client, args).await,
            Verb::Bench(command) => bench::bench(client, command).await,
            Verb::Completion(args) => system::completion(&args),
            Verb::Version(args) => system::version(client, args).await,
            Verb::Images(args) => image::ls(client, &args).await,
            Verb::Rmi(args) => image::rm(client, args).await,
            Verb::Pull(args) => image::pull(client, args).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    fn help(path: &[&str]) -> String {
        let mut command = Cli::command().term_width(100);
        command.build();
        let mut at = &mut command;
        for name in path {
            at = at.find_subcommand_mut(name).unwrap();
        }
        at.render_help().to_string()
    }

    #[test]
    fn help_of_the_program() {
        insta::assert_snapshot!(help(&[]), @r#"
        Virtual machines from OCI images, in the time a container takes

        Usage: offshoot [OPTIONS] <COMMAND>

        Commands:
          run         Create a VM from an image and run a command in it
          create      Create a VM, but do not start it
          start       Start VMs that do not run
          stop        Shut VMs down
          restart     Stop VMs and start them again
          kill        End VMs at once, or signal their main processes
          pause       Let VMs stand still
          resume      Let paused VMs go on [alias: unpause]
          reset       Drop what VMs wrote to `/`, keep their work disks
          rm          Remove VMs [alias: remove]
          ps          List VMs
          inspect     Show everything about a VM, as JSON
          exec        Run a command in a running VM
          ssh         Open a shell or run a command in a running VM, over SSH
          ssh-config  Write what ssh, scp, rsync and their like need to reach VMs by name, as ssh_config(5)
          cp          Copy files between a VM and this machine
          logs        Show what a VM's main process wrote
          stats       Show what running VMs take, again and again
          attach      Connect to a VM's main process
          events      Show what happens to VMs, and what happened
          wait        Wait until VMs do not run any more, and print their exit statuses
          rename      Give a VM another name
          port        Show which ports of the host lead to a VM
          image       Work with images
          kernel      Work with kernels
          template    Work with templates: saved VMs that others are restored from
          net         Work with networks [alias: network]
          system      Look at the daemon
          df          Show what everything takes on disk, and VMs in memory
          prune       Delete what nothing needs any more
          doctor      Check what this machine can do; status 1 when VMs cannot run
          bench       Measure how fast VMs come
          completion  Write a completion script
          version     Show the versions of client and daemon

        Options:
          -h, --help     Print help
          -V, --version  Print version

        Global options:
              --socket <PATH>  Where the daemon listens [env: OFFSHOOT_SOCKET] [default:
                               /run/offshoot/api.sock]

        Exit status: 0, 1 error, 2 wrong usage, 3 daemon unreachable; `run`, `exec`, `ssh`, `start -a`,
        `attach` and `wait` end with the status of the process.
        "#);
    }

    #[test]
    fn help_of_run() {
        insta::assert_snapshot!(help(&["run"]), @r#"
        Create a VM from an image and run a command in it

        Usage: offshoot run [OPTIONS] IMAGE [COMMAND] [ARG...]

        Options:
          -d, --detach                    Run in the background and print the VM's id
              --timings[=<FORMAT>]        Draw on standard error where the time went, in this program and in
                                          the daemon; `json` writes the numbers [possible values: table,
                                          json]
          -q, --quiet                     Show no progress
              --verbose                   Say which VMM and which root was chosen, and why
              --name <NAME>               Name of the VM [default: made up]
          -i, --interactive               Keep standard input open
          -t, --tty                       Give the main process a terminal
              --rm                        Remove the VM when it stops
          -e, --env <NAME[=VALUE]>        Set an environment variable; NAME alone passes on its value
              --env-file <FILE>           Read environment variables from a file
          -w, --workdir <DIR>             Working directory in the guest
          -u, --user <USER>               User (name or uid), and group after a colon
              --entrypoint <COMMAND>      Replace the image's entrypoint; empty clears it
              --cpus <N>                  Number of vCPUs [default: 1]
          -m, --memory <SIZE>             Memory, such as 512m or 2g [default: 512m]
              --disk <SIZE>               Limit of what the VM can write to `/` [default: 10g]
              --work <SIZE>               Limit of the work disk at `/root` [default: 10g]
          -v, --volume <HOST:GUEST[:ro]>  Share a folder of the host
          -p, --publish <HOST:GUEST>      Let a port of the host lead into it: `[ADDR:]HOST:GUEST[/udp]`, or
                                          GUEST for any free port
              --network <NAME>            Network to be on, or `none` [default: the network `default`]
              --nat                       Let it reach what lies beyond the host, by the host's address, as
                                          it does by default
              --no-nat                    Let it reach nothing beyond the host
              --isolate                   Keep it and the other VMs of its network from each other
              --allow <WHAT>              Let it reach the host's own services, or the cloud's metadata
                                          service [possible values: host, metadata]
              --ip <ADDRESS>              IPv4 address to have on its network [default: a free one]
              --ssh-port <PORT>           TCP port of its SSH server, 0 for none [default: 22, or none
                                          beside an image's own]
              --init                      Hand PID 1 to the image's own init
              --restart <POLICY>          When to start it again by itself [default: no] [possible values:
                                          no, on-failure, always, unless-stopped]
              --root <ROOT>               How the guest sees its root [default: auto] [possible values:
                                          auto, pmem, block, virtiofs, copy]
              --vmm <VMM>                 Which VMM runs it [default: auto] [possible values: auto, qemu,
                                          cloud-hypervisor, firecracker]
              --kernel <KERNEL>           Which kernel it boots [default: the one that `kernel ls` marks]
              --boot <BOOT>               Whether to boot it or restore a template [default: auto] [possible
                                          values: auto, cold, template]
              --ssh-key <FILE|KEY>        Public key that opens the VM over SSH, or a file with some,
                                          besides `~/.ssh/*.pub` and a key of Offshoot's
              --no-ssh-keys               No SSH keys but those given by `--ssh-key`
              --pull <WHEN>               When to pull the image [default: missing] [possible values:
                                          missing, always, never]
          -h, --help                      Print help (see more with '--help')

        Global options:
              --socket <PATH>  Where the daemon listens [env: OFFSHOOT_SOCKET] [default:
                               /run/offshoot/api.sock]
        "#);
    }

    #[test]
    fn help_of_exec() {
        insta::assert_snapshot!(help(&["exec"]), @r#"
        Run a command in a running VM

        Usage: offshoot exec [OPTIONS] VM COMMAND [ARG...]

        Options:
          -d, --detach              Start it and do not wait for it
          -i, --interactive         Pass on standard input
          -t, --tty                 Give it a terminal
          -e, --env <NAME[=VALUE]>  Set an environment variable; NAME alone passes on its value
              --env-file <FILE>     Read environment variables from a file
          -w, --workdir <DIR>       Working directory in the guest
          -u, --user <USER>         User (name or uid), and group after a colon
          -h, --help                Print help

        Global options:
              --socket <PATH>  Where the daemon listens [env: OFFSHOOT_SOCKET] [default:
                               /run/offshoot/api.sock]
        "#);
    }

    #[test]
    fn help_of_image_import() {
        insta::assert_snapshot!(help(&["image", "import"]), @r#"
        Take an image from an archive: docker save, OCI layout, or a root file system's tar

        Usage: offshoot image import [OPTIONS] <PATH>

        Arguments:
          <PATH>  Archive, folder with an OCI layout, or `-` for standard input

        Options:
              --name <REF>          Reference to give it; needed where the archive names none
              --prepare[=<yes|no>]  Make it ready to start VMs from as well [default: yes]
          -q, --quiet               Show no progress
              --output <FORMAT>     How to show the result [default: table] [possible values: table, json]
          -h, --help                Print help (see more with '--help')

        Global options:
              --socket <PATH>  Where the daemon listens [env: OFFSHOOT_SOCKET] [default:
                               /run/offshoot/api.sock]
        "#);
    }

    #[test]
    fn help_of_prune() {
        insta::assert_snapshot!(help(&["prune"]), @r#"
        Delete what nothing needs any more

        Usage: offshoot prune [OPTIONS]

        Options:
          -f, --force             Do not ask
          -a, --all               Also the bases of images that no VM uses; they are made again when they
                                  are needed
              --grace <DURATION>  Keep what was made or used so short a time ago, such as 30m or 0s
                                  [default: the daemon's setting, 1h]
              --output <FORMAT>   How to show the result [default: table] [possible values: table, json]
          -h, --help              Print help (see more with '--help')

        Global options:
              --socket <PATH>  Where the daemon listens [env: OFFSHOOT_SOCKET] [default:
                               /run/offshoot/api.sock]
        "#);
    }

    #[test]
    fn help_of_reset() {
        insta::assert_snapshot!(help(&["reset"]), @r#"
        Drop what VMs wrote to `/`, keep their work disks

        Usage: offshoot reset [OPTIONS] <VM>...

        Arguments:
          <VM>...  Names or ids

        Options:
          -f, --force  Kill a VM that runs
          -h, --help   Print help

        Global options:
              --socket <PATH>  Where the daemon listens [env: OFFSHOOT_SOCKET] [default:
                               /run/offshoot/api.sock]
        "#);
    }

    #[test]
    fn help_of_kernel_add() {
        insta::assert_snapshot!(help(&["kernel", "add"]), @r#"
        Make a kernel bundle

        Usage: offshoot kernel add [OPTIONS]

        Options:
              --distro           From the distribution's own cloud kernel package, which is not installed
              --package <NAME>   Package to take [default: the newest cloud kernel]
              --vmlinux <FILE>   From a kernel of your own
              --modules <DIR>    Its modules: a folder like /lib/modules/RELEASE
          -q, --quiet            Show no progress
              --output <FORMAT>  How to show the result [default: table] [possible values: table, json]
          -h, --help             Print help (see more with '--help')

        Global options:
              --socket <PATH>  Where the daemon listens [env: OFFSHOOT_SOCKET] [default:
                               /run/offshoot/api.sock]
        "#);
    }

    #[test]
    fn help_of_kernel_build() {
        insta::assert_snapshot!(help(&["kernel", "build"]), @r#"
        Compile a kernel for guests, with all drivers built in

        Usage: offshoot kernel build [OPTIONS]

        Options:
          -j, --jobs <N>                Compilers at once [default: as many as there are processors]
              --config-fragment <FILE>  Options to add or to change: lines like CONFIG_KVM=y
              --source <FILE>           Tarball of Linux [default: the distribution's package
                                        linux-source-6.12, which is not installed]
          -q, --quiet                   Show no progress
              --output <FORMAT>         How to show the result [default: table] [possible values: table,
                                        json]
          -h, --help                    Print help (see more with '--help')

        Global options:
              --socket <PATH>  Where the daemon listens [env: OFFSHOOT_SOCKET] [default:
                               /run/offshoot/api.sock]
        "#);
    }

    #[test]
    fn dockers_words_are_known() {
        for words in [
            &["images"][..],
            &["images", "-q"],
            &["rmi", "-f", "a", "b"],
            &["pull", "debian"],
            &["info"],
            &["image", "list"],
            &["image", "remove", "x"],
            &["kernel", "list"],
            &["unpause", "x"],
            &["stop", "-t", "3", "x"],
            &["stop", "--timeout", "3", "x"],
            &["exec", "-it", "x", "ls", "-l", "--color"],
            &["logs", "-f", "-n", "10", "-t", "x"],
            &["logs", "--tail", "all", "x"],
            &["start", "-ai", "x"],
            &[
                "image",
                "bootstrap",
                "debian:bookworm",
                "--include",
                "a,b",
                "--prepare=no",
            ],
            &["image", "import", "--name", "x", "-"],
            &["kernel", "add", "--distro"],
            &["kernel", "add", "--vmlinux", "f", "--modules", "d"],
            &[
                "kernel",
                "build",
                "-j",
                "4",
                "--config-fragment",
                "f",
                "--source",
                "s",
                "--output",
                "json",
            ],
            &["ps", "-aq", "--output", "json"],
            &["cp", "x:/a", "-"],
            &["run", "--rm", "x", "--socket", "y"],
            &["run", "--verbose", "-v", "/a:/b", "x"],
            &["reset", "-f", "a", "b"],
            &["df", "-v", "--output", "json"],
            &["prune", "-fa", "--grace", "90m"],
            &["prune", "--grace", "0s", "--output", "json"],
            &["image", "verify", "x", "--output", "json"],
            &["image", "prepare", "--force", "x"],
            &[
                "run",
                "-d",
                "-p",
                "8080:80",
                "-p",
                "53:53/udp",
                "--network",
                "none",
                "x",
            ],
            &["port", "x"],
            &["port", "x", "80/tcp"],
            &["network", "create", "--subnet", "10.9.0.0/24", "lab"],
            &["net", "list", "-q"],
            &["net", "inspect", "lab"],
            &["net", "remove", "a", "b"],
            &[
                "ssh", "-tt", "-A", "-L", "1:h:2", "-R", "3:h:4", "-o", "A=b", "me@x", "ls", "-q",
            ],
            &["ssh-config", "--install"],
        ] {
            Cli::try_parse_from([&["offshoot"], words].concat()).unwrap_or_else(|e| panic!("{words:?}: {e}"));
        }
        for words in [
            &[][..],
            &["frobnicate"],
            &["exec", "x"],
            &["stop"],
            &["stop", "-t", "soon", "x"],
            &["kernel", "add"],
            &["kernel", "add", "--distro", "--vmlinux", "f"],
            &["kernel", "add", "--modules", "d", "--distro"],
            &["kernel", "build", "--jobs", "0"],
            &["ps", "--output", "yaml"],
            &["inspect", ""],
            &["start", "-i", "x"],
            &["image", "pull", "--prepare=maybe", "x"],
            &["prune", "--grace", "soon"],
            &["prune", "x"],
            &["port"],
            &["port", "x", "http"],
            &["net", "create"],
            &["net", "create", "--subnet", "10.9.0.0", "lab"],
            &["net", "rm"],
            &["run", "--nat", "--no-nat=yes", "x"],
            &["reset"],
            &["ssh"],
            &["ssh-config", "--install", "--uninstall"],
        ] {
            assert!(
                Cli::try_parse_from([&["offshoot"], words].concat()).is_err(),
                "{words:?}"
            );
        }
    }

    #[test]
    fn words_of_the_command_are_not_ours() {
        let cli = Cli::try_parse_from([
            "offshoot", "--socket", "/s", "exec", "x", "ls", "--socket", "/t", "-e",
        ])
        .unwrap();
        assert_eq!(cli.socket, PathBuf::from("/s"));
    }
}
