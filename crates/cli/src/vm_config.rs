//! The flags that `run` and `create` share, and the request they make.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use offshoot_model::{Boot, ByteSize, KernelId, Mount, RestartPolicy, RootRequest, VmConfig, VmmRequest};

use crate::error::Failure;
use crate::network_args::NetworkArgs;
use crate::ssh::keys::SshKeyArgs;
use crate::values::{api_words, env_arg, environment, mount};

/// When to fetch the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Pull {
    /// When it is not in the store
    Missing,
    /// Always, first
    Always,
    /// Never
    Never,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct VmArgs {
    // One rule for names, and one error with a hint for all who break it, here and in the daemon: clap only passes it on.
    /// Name of the VM [default: made up]
    #[arg(long)]
    name: Option<String>,
    /// Keep standard input open
    #[arg(short, long)]
    interactive: bool,
    /// Give the main process a terminal
    #[arg(short, long)]
    tty: bool,
    /// Remove the VM when it stops
    #[arg(long = "rm")]
    auto_remove: bool,
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
    /// Replace the image's entrypoint; empty clears it
    #[arg(long, value_name = "COMMAND")]
    entrypoint: Option<String>,
    /// Number of vCPUs [default: 1]
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// Memory, such as 512m or 2g [default: 512m]
    #[arg(short, long, value_name = "SIZE")]
    memory: Option<ByteSize>,
    /// Limit of what the VM can write to `/` [default: 10g]
    #[arg(long, value_name = "SIZE")]
    disk: Option<ByteSize>,
    /// Limit of the work disk at `/root` [default: 10g]
    #[arg(long, value_name = "SIZE")]
    work: Option<ByteSize>,
    /// Share a folder of the host
    #[arg(short, long = "volume", value_name = "HOST:GUEST[:ro]", value_parser = mount)]
    volumes: Vec<Mount>,
    #[command(flatten)]
    network: NetworkArgs,
    /// Hand PID 1 to the image's own init
    #[arg(long)]
    init: bool,
    /// When to start it again by itself
    #[arg(long, value_name = "POLICY", default_value = "no",
        value_parser = api_words::<RestartPolicy>(&["no", "on-failure", "always", "unless-stopped"]))]
    restart: RestartPolicy,
    /// How the guest sees its root
    #[arg(long, default_value = "auto",
        value_parser = api_words::<RootRequest>(&["auto", "pmem", "block", "virtiofs", "copy"]))]
    root: RootRequest,
    /// Which VMM runs it
    #[arg(long, default_value = "auto",
        value_parser = api_words::<VmmRequest>(&["auto", "qemu", "cloud-hypervisor", "firecracker"]))]
    vmm: VmmRequest,
    /// Which kernel it boots [default: the one that `kernel ls` marks]
    #[arg(long, value_name = "KERNEL")]
    kernel: Option<KernelId>,
    /// Whether to boot it or restore a template
    #[arg(long, default_value = "auto", value_parser = api_words::<Boot>(&["auto", "cold", "template"]))]
    boot: Boot,
    #[command(flatten)]
    pub(crate) ssh_keys: SshKeyArgs,
    /// When to pull the image
    #[arg(long, value_enum, default_value = "missing", value_name = "WHEN")]
    pub(crate) pull: Pull,
    // The usage line shows it better than clap does.
    #[arg(required = true, trailing_var_arg = true, value_name = "IMAGE", hide = true)]
    image_and_command: Vec<String>,
}

impl VmArgs {
    /// The request that these flags make.
    pub(crate) fn config(self) -> Result<VmConfig, Failure> {
        let env = environment(&self.env_file, &self.env, |name| std::env::var(name).ok())?;
        let mut words = self.image_and_command.into_iter();
        let image = words.next().filter(|image| !image.is_empty());
        let image = image.ok_or_else(|| {
            Failure::invalid("cannot make a VM from an image without a name")
                .hint("`offshoot image ls` lists the images")
        })?;
        let mut config = VmConfig::new(image);
        config.cmd = words.collect();
        let name = self.name.map(|name| name.parse()).transpose();
        config.name = name.map_err(|error: offshoot_model::NameError| Failure::explained(&error))?;
        config.entrypoint = self
            .entrypoint
            .map(|word| if word.is_empty() { Vec::new() } else { vec![word] });
        config.env = env;
        config.working_dir = self.workdir;
        config.user = self.user;
        config.tty = self.tty;
        config.stdin = self.interactive;
        config.init = self.init;
        config.cpus = self.cpus.unwrap_or(config.cpus);
        config.memory = self.memory.unwrap_or(config.memory);
        config.disk = self.disk.unwrap_or(config.disk);
        config.work = self.work.unwrap_or(config.work);
        config.root = self.root;
        config.vmm = self.vmm;
        config.kernel = self.kernel;
        config.boot = self.boot;
        config.mounts = self.volumes;
        config.network = self.network.config();
        config.ssh = self.network.ssh();
        config.auto_remove = self.auto_remove;
        config.restart = self.restart;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use offshoot_model::{Allowed, NetworkConfig, PublishedPort};

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: VmArgs,
    }

    fn config(words: &[&str]) -> Result<VmConfig, clap::error::ErrorKind> {
        let line = Line::try_parse_from([&["run"], words].concat()).map_err(|e| e.kind())?;
        Ok(line.args.config().unwrap())
    }

    #[test]
    fn everything_after_the_image_is_the_command() {
        for words in [
            &["img", "ls", "-l"][..],
            &["--rm", "-it", "img", "--name", "x"],
            &["img", "--", "-e"],
            &["--", "img", "-e"],
        ] {
            let config = config(words).unwrap();
            assert_eq!(config.image, "img");
            let at = words.iter().position(|word| *word == "img").unwrap();
            assert_eq!(config.cmd, words[at + 1..].to_vec(), "{words:?}");
            assert!(config.name.is_none());
        }
    }

    #[test]
    fn flags_have_dockers_meaning() {
        assert_eq!(config(&["img"]).unwrap(), VmConfig::new("img"));
        let config = config(&[
            "-it",
            "--rm",
            "--name",
            "web",
            "-e",
            "A=1",
            "-e",
            "B=2",
            "-w",
            "/w",
            "-u",
            "1:2",
            "--entrypoint",
            "",
            "--cpus",
            "2",
            "-m",
            "1g",
            "--disk",
            "2g",
            "--work=3g",
            "-v",
            "/a:/b:ro",
            "-p",
            "127.0.0.1:8080:80",
            "--publish",
            "9000-9001:90-91/udp",
            "--network",
            "lab",
            "--no-nat",
            "--isolate",
            "--allow",
            "host,metadata",
            "--ip",
            "10.9.0.7",
            "--ssh-port",
            "2222",
            "--restart",
            "unless-stopped",
            "--root",
            "block",
            "--vmm",
            "cloud-hypervisor",
            "--kernel",
            "0123456789abcdef",
            "--boot",
            "cold",
            "img",
        ])
        .unwrap();
        let mut expected = VmConfig::new("img");
        expected.name = Some("web".parse().unwrap());
        expected.env = vec!["A=1".parse().unwrap(), "B=2".parse().unwrap()];
        expected.working_dir = Some("/w".into());
        expected.user = Some("1:2".into());
        expected.entrypoint = Some(Vec::new());
        (expected.tty, expected.stdin, expected.auto_remove) = (true, true, true);
        expected.cpus = 2;
        expected.memory = ByteSize::from_mib(1024);
        expected.disk = ByteSize::from_mib(2048);
        expected.work = ByteSize::from_mib(3072);
        expected.mounts = vec![Mount {
            source: "/a".into(),
            target: "/b".into(),
            read_only: true,
        }];
        expected.network = NetworkConfig {
            network: "lab".parse().unwrap(),
            nat: false,
            isolate: true,
            allow: vec![Allowed::Host, Allowed::Metadata],
            publish: ["127.0.0.1:8080:80", "9000-9001:90-91/udp"]
                .iter()
                .flat_map(|text| PublishedPort::parse_all(text).unwrap())
                .collect(),
            ipv4: Some([10, 9, 0, 7].into()),
        };
        expected.ssh.port = Some(2222);
        expected.restart = RestartPolicy::UnlessStopped;
        (expected.root, expected.vmm, expected.boot) =
            (RootRequest::Block, VmmRequest::CloudHypervisor, Boot::Cold);
        expected.kernel = Some("0123456789abcdef".parse().unwrap());
        assert_eq!(config, expected);
    }

    #[test]
    fn unknown_words_are_usage_errors() {
        use clap::error::ErrorKind::*;
        for (words, kind) in [
            (&[][..], MissingRequiredArgument),
            (&["--nmae", "x", "img"], UnknownArgument),
            (&["--root", "floppy", "img"], InvalidValue),
            (&["--memory", "lots", "img"], ValueValidation),
            (&["--cpus", "-1", "img"], UnknownArgument),
            (&["--name", "-x", "img"], UnknownArgument),
            (&["-e", "", "img"], ValueValidation),
            (&["-v", "data:/x", "img"], ValueValidation),
            (&["-p", "80:x", "img"], ValueValidation),
            (&["--network", "No", "img"], ValueValidation),
            (&["--allow", "everything", "img"], InvalidValue),
            (&["--ip", "::1", "img"], ValueValidation),
            (&["--pull", "sometimes", "img"], InvalidValue),
            (&["--kernel", "6.12", "img"], ValueValidation),
        ] {
            assert_eq!(config(words).unwrap_err(), kind, "{words:?}");
        }
        // What no host can do is the daemon's to refuse, with a reason.
        assert_eq!(
            config(&["-m", "0", "--cpus", "0", "img"]).unwrap().memory,
            ByteSize::from_bytes(0)
        );
    }
}
