//! What a VM is asked to be.

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{ByteSize, KernelId, NetworkConfig, NetworkConfigError, SshConfig, VmName};

/// How the root should be shown to the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RootRequest {
    /// The policy chooses.
    #[default]
    Auto,
    /// `root.erofs` as virtio-pmem, mounted with DAX.
    Pmem,
    /// `root.erofs` as a read-only virtio-blk disk.
    Block,
    /// The prepared tree shared by virtiofsd.
    Virtiofs,
    /// A private ext4 with the whole tree.
    Copy,
}

/// Which VMM should run the VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VmmRequest {
    /// The policy chooses.
    #[default]
    Auto,
    /// QEMU.
    Qemu,
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// Firecracker.
    Firecracker,
}

/// Whether to boot the kernel or restore a template.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Boot {
    /// Restore where a template fits, else boot.
    #[default]
    Auto,
    /// Always boot.
    Cold,
    /// Restore, or fail.
    Template,
}

/// When the daemon starts a VM again by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// Never.
    #[default]
    No,
    /// When its main process ended with a status other than 0, or it died.
    OnFailure,
    /// Always, also after the daemon starts.
    Always,
    /// Always, unless it was stopped by hand.
    UnlessStopped,
}

/// One environment variable, `NAME=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EnvVar {
    name: String,
    value: String,
}

/// Why a text is not an environment variable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not an environment variable: write NAME=VALUE")]
pub struct EnvVarError {
    /// The refused text, shortened.
    pub text: String,
}

impl EnvVar {
    /// The part before the first `=`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The part after the first `=`.
    pub fn value(&self) -> &str {
        &self.value
    }
}

impl FromStr for EnvVar {
    type Err = EnvVarError;

    fn from_str(text: &str) -> Result<Self, EnvVarError> {
        match text.split_once('=') {
            Some((name, value)) if !name.is_empty() && !text.contains('\0') => Ok(Self {
                name: name.to_owned(),
                value: value.to_owned(),
            }),
            _ => Err(EnvVarError {
                text: text.chars().take(40).flat_map(char::escape_debug).collect(),
            }),
        }
    }
}

impl TryFrom<String> for EnvVar {
    type Error = EnvVarError;

    fn try_from(text: String) -> Result<Self, EnvVarError> {
        text.parse()
    }
}

impl From<EnvVar> for String {
    fn from(var: EnvVar) -> String {
        var.to_string()
    }
}

impl fmt::Display for EnvVar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name, self.value)
    }
}

/// A folder of the host shown in the guest, `-v HOST:GUEST[:ro]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Mount {
    /// Absolute path of an existing folder on the host.
    #[schema(value_type = String)]
    pub source: PathBuf,
    /// Absolute path in the guest, made if it is missing.
    #[schema(value_type = String)]
    pub target: PathBuf,
    /// Whether the guest may only read.
    pub read_only: bool,
}

impl Mount {
    /// The target without doubled and trailing slashes and `.` components; nothing where it leads up or is relative.
    pub fn plain_target(&self) -> Option<PathBuf> {
        use std::path::Component;
        let mut plain = PathBuf::from("/");
        for component in self.target.is_absolute().then(|| self.target.components())? {
            match component {
                Component::RootDir | Component::CurDir => {}
                Component::Normal(name) => plain.push(name),
                Component::ParentDir | Component::Prefix(_) => return None,
            }
        }
        Some(plain)
    }

    fn validate(&self) -> Result<PathBuf, ConfigError> {
        let refuse = |what: &'static str| {
            Err(ConfigError::Mount {
                mount: format!("{}:{}", self.source.display(), self.target.display())
                    .chars()
                    .take(200)
                    .flat_map(char::escape_debug)
                    .collect(),
                what,
            })
        };
        if [&self.source, &self.target]
            .iter()
            .any(|path| path.as_os_str().len() > MAX_PATH)
        {
            return refuse("a path is longer than Linux takes");
        }
        let odd = |path: &PathBuf| path.to_str().is_none_or(|text| text.contains(char::is_control));
        if odd(&self.source) || odd(&self.target) {
            return refuse("a path holds control characters, or is no UTF-8");
        }
        if !self.source.is_absolute() {
            return refuse("the folder of the host is not an absolute path");
        }
        if !self.target.is_absolute() {
            return refuse("the target in the guest is not an absolute path");
        }
        let Some(target) = self.plain_target() else {
            return refuse("the target in the guest has a `..` in it");
        };
        if target == Path::new("/") {
            return refuse("the target in the guest is its root");
        }
        if ["/proc", "/sys", "/dev"]
            .iter()
            .any(|kernels| target.starts_with(kernels))
        {
            return refuse("the target in the guest belongs to its kernel");
        }
        Ok(target)
    }
}

/// What to run, as the image's config says it (OCI image-spec, config.md, "config").
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct ImageConfig {
    /// `Entrypoint`.
    pub entrypoint: Vec<String>,
    /// `Cmd`.
    pub cmd: Vec<String>,
    /// `Env`, in order, `NAME=VALUE`.
    #[schema(value_type = Vec<String>)]
    pub env: Vec<EnvVar>,
    /// `WorkingDir`; empty means `/`.
    pub working_dir: String,
    /// `User`: `user`, `uid`, `user:group`, `uid:gid`; empty means root.
    pub user: String,
    /// `StopSignal`; empty means SIGTERM.
    pub stop_signal: String,
}

/// One process to run in a guest, with everything decided.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct ProcessConfig {
    /// Program and arguments; the program is looked up in the process's own `PATH`.
    pub argv: Vec<String>,
    /// Environment, `NAME=VALUE`, later ones win.
    #[schema(value_type = Vec<String>)]
    pub env: Vec<EnvVar>,
    /// Working directory; empty means `/`. Made if it is missing, as Docker does.
    pub working_dir: String,
    /// `user[:group]` by name or number; empty means root.
    pub user: String,
    /// Whether it gets a terminal.
    pub tty: bool,
    /// Whether its standard input stays open and is fed by a client.
    pub stdin: bool,
}

/// What a VM is asked to be: the client's whole request, kept with the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmConfig {
    /// Its name; the daemon makes one up where there is none.
    #[schema(value_type = Option<String>)]
    #[serde(default)]
    pub name: Option<VmName>,
    /// The image, as the user wrote it.
    pub image: String,
    /// Replaces the image's `Cmd`.
    #[serde(default)]
    pub cmd: Vec<String>,
    /// Replaces the image's `Entrypoint` (and drops its `Cmd`), as `docker run --entrypoint`. `Some([])` clears it.
    #[serde(default)]
    pub entrypoint: Option<Vec<String>>,
    /// Added to the image's environment.
    #[schema(value_type = Vec<String>)]
    #[serde(default)]
    pub env: Vec<EnvVar>,
    /// Replaces the image's working directory.
    #[serde(default)]
    pub working_dir: Option<String>,
    /// Replaces the image's user.
    #[serde(default)]
    pub user: Option<String>,
    /// Whether the main process gets a terminal.
    #[serde(default)]
    pub tty: bool,
    /// Whether the main process's standard input stays open.
    #[serde(default)]
    pub stdin: bool,
    /// Hand PID 1 to the image's own init instead of running a main process.
    #[serde(default)]
    pub init: bool,
    /// vCPUs.
    #[serde(default = "default_cpus")]
    pub cpus: u32,
    /// Guest memory, bytes.
    #[schema(value_type = u64)]
    #[serde(default = "default_memory")]
    pub memory: ByteSize,
    /// Limit of the overlay disk, bytes (thin).
    #[schema(value_type = u64)]
    #[serde(default = "default_disk")]
    pub disk: ByteSize,
    /// Limit of the work disk, bytes (thin).
    #[schema(value_type = u64)]
    #[serde(default = "default_disk")]
    pub work: ByteSize,
    /// How the root is shown.
    #[serde(default)]
    pub root: RootRequest,
    /// Which VMM.
    #[serde(default)]
    pub vmm: VmmRequest,
    /// The kernel bundle it boots; the default one when absent.
    #[schema(value_type = Option<String>)]
    #[serde(default)]
    pub kernel: Option<KernelId>,
    /// Boot or restore.
    #[serde(default)]
    pub boot: Boot,
    /// Shared folders.
    #[serde(default)]
    pub mounts: Vec<Mount>,
    /// Remove the VM when it stops.
    #[serde(default)]
    pub auto_remove: bool,
    /// Start it again by itself.
    #[serde(default)]
    pub restart: RestartPolicy,
    /// Its place on a network.
    #[serde(default)]
    pub network: NetworkConfig,
    /// The agent's own SSH server.
    #[serde(default)]
    pub ssh: SshConfig,
}

/// The smallest guest memory the agent and a stock kernel boot in.
const MIN_MEMORY: ByteSize = ByteSize::from_mib(64);
/// The smallest overlay or work disk: an ext4 with a journal and room for a few files.
const MIN_DISK: ByteSize = ByteSize::from_mib(64);
/// The largest disk that ext4 with 4 KiB blocks takes without special care.
const MAX_DISK: ByteSize = ByteSize::from_mib(16 << 20);

fn default_cpus() -> u32 {
    1
}

fn default_memory() -> ByteSize {
    ByteSize::from_mib(512)
}

/// What a VM gets as its overlay and as its work disk when it asks for nothing else: more than most need, and it is thin.
pub const DEFAULT_DISK: ByteSize = ByteSize::from_mib(10 << 10);

fn default_disk() -> ByteSize {
    DEFAULT_DISK
}

/// Why a request cannot be a VM on any host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Too little memory.
    #[error("memory of {given} is too little for a VM: the least is {least}")]
    Memory {
        /// What was asked for.
        given: ByteSize,
        /// The least that works.
        least: ByteSize,
    },
    /// No or too many vCPUs.
    #[error("{given} vCPUs is not possible: a VM has 1 to {most}")]
    Cpus {
        /// What was asked for.
        given: u32,
        /// The most.
        most: u32,
    },
    /// A disk size out of range.
    #[error("a {disk} disk of {given} is not possible: it has {least} to {most}")]
    Disk {
        /// `overlay` or `work`.
        disk: &'static str,
        /// What was asked for.
        given: ByteSize,
        /// The least.
        least: ByteSize,
        /// The most.
        most: ByteSize,
    },
    /// A working directory that is not absolute.
    #[error("working directory `{path}` is not an absolute path")]
    WorkingDir {
        /// What was asked for.
        path: String,
    },
    /// `--init` together with a command or a terminal.
    #[error("a VM that runs its image's own init takes no command, entrypoint, user or terminal of its own")]
    InitWithCommand,
    /// Nothing to run.
    #[error("nothing to run: the image names no command, and none was given")]
    NoCommand,
    /// A shared folder that cannot be one.
    #[error("cannot share `{mount}`: {what}")]
    Mount {
        /// What was asked for, shortened.
        mount: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Two shared folders on one target.
    #[error("two shared folders have the target `{}`", target.display())]
    MountTwice {
        /// The target.
        target: PathBuf,
    },
    /// More shared folders than a machine has room for.
    #[error("{given} shared folders are too many for one VM: at most {most}")]
    Mounts {
        /// What was asked for.
        given: usize,
        /// The most.
        most: usize,
    },
    /// A place on a network that no VM can have.
    #[error(transparent)]
    Network(#[from] NetworkConfigError),
    /// An argument or environment holds a NUL byte.
    #[error("an argument holds a NUL byte")]
    Nul,
    /// More of something than a process can have.
    #[error("{given} {what} are too many for one VM: at most {most}")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// What was asked for.
        given: usize,
        /// The most.
        most: usize,
    },
    /// A text that no guest could take.
    #[error("{what} of {given} bytes is too long: at most {most}")]
    TooLong {
        /// What is too long.
        what: &'static str,
        /// What was asked for, bytes.
        given: usize,
        /// The most, bytes.
        most: usize,
    },
}

/// The most arguments, and the most environment variables: more is a list of files that belongs into a file.
const MAX_WORDS: usize = 4096;
/// One argument or variable, as Linux limits it (execve(2), `MAX_ARG_STRLEN`), without its NUL.
const MAX_WORD: usize = (128 << 10) - 1;
/// All arguments and variables together. They travel to the guest in one message of 1 MiB with those of the image.
const MAX_WORDS_TOGETHER: usize = 512 << 10;
/// A path (`PATH_MAX`), without its NUL.
const MAX_PATH: usize = 4095;
/// A user and a group: Linux takes 32 characters for each, directories of users take more.
const MAX_USER: usize = 512;
/// An image as it was written: a reference is shorter.
const MAX_IMAGE: usize = 1024;

/// Refuses what is longer than `most` bytes.
fn within(what: &'static str, text: &str, most: usize) -> Result<(), ConfigError> {
    match text.len() {
        given if given > most => Err(ConfigError::TooLong { what, given, most }),
        _ => Ok(()),
    }
}

impl VmConfig {
    /// The most vCPUs: QEMU's `microvm` and `q35` both take 255, and more than that is a typing error.
    pub const MAX_CPUS: u32 = 255;

    /// The most shared folders: a machine has 24 slots for devices, some of them for disks and networks.
    pub const MAX_MOUNTS: usize = 16;

    /// A request with every default, for `image`.
    pub fn new(image: impl Into<String>) -> Self {
        Self {
            name: None,
            image: image.into(),
            cmd: Vec::new(),
            entrypoint: None,
            env: Vec::new(),
            working_dir: None,
            user: None,
            tty: false,
            stdin: false,
            init: false,
            cpus: default_cpus(),
            memory: default_memory(),
            disk: default_disk(),
            work: default_disk(),
            root: RootRequest::Auto,
            vmm: VmmRequest::Auto,
            kernel: None,
            boot: Boot::Auto,
            mounts: Vec::new(),
            auto_remove: false,
            restart: RestartPolicy::No,
            network: NetworkConfig::default(),
            ssh: SshConfig::default(),
        }
    }

    /// Refuses what no host can do. Pure; the engine asks it first.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.memory < MIN_MEMORY {
            return Err(ConfigError::Memory {
                given: self.memory,
                least: MIN_MEMORY,
            });
        }
        if self.cpus == 0 || self.cpus > Self::MAX_CPUS {
            return Err(ConfigError::Cpus {
                given: self.cpus,
                most: Self::MAX_CPUS,
            });
        }
        for (disk, given) in [("overlay", self.disk), ("work", self.work)] {
            if given < MIN_DISK || given > MAX_DISK {
                return Err(ConfigError::Disk {
                    disk,
                    given,
                    least: MIN_DISK,
                    most: MAX_DISK,
                });
            }
        }
        self.validate_lengths()?;
        if let Some(path) = &self.working_dir
            && !path.starts_with('/')
        {
            return Err(ConfigError::WorkingDir {
                path: path.chars().take(200).flat_map(char::escape_debug).collect(),
            });
        }
        if self.init
            && (!self.cmd.is_empty()
                || self.entrypoint.is_some()
                || self.user.is_some()
                || self.tty
                || self.stdin)
        {
            return Err(ConfigError::InitWithCommand);
        }
        if self.mounts.len() > Self::MAX_MOUNTS {
            return Err(ConfigError::Mounts {
                given: self.mounts.len(),
                most: Self::MAX_MOUNTS,
            });
        }
        let mut targets = HashSet::new();
        for mount in &self.mounts {
            let target = mount.validate()?;
            if !targets.insert(target.clone()) {
                return Err(ConfigError::MountTwice { target });
            }
        }
        let arguments = self.cmd.iter().chain(self.entrypoint.iter().flatten());
        if arguments
            .chain(&self.working_dir)
            .chain(&self.user)
            .any(|text| text.contains('\0'))
        {
            return Err(ConfigError::Nul);
        }
        self.network.validate()?;
        Ok(())
    }

    /// Nothing that goes to the guest is longer than the guest, or the message that carries it, can take.
    fn validate_lengths(&self) -> Result<(), ConfigError> {
        within("an image name", &self.image, MAX_IMAGE)?;
        within(
            "a working directory",
            self.working_dir.as_deref().unwrap_or_default(),
            MAX_PATH,
        )?;
        within("a user", self.user.as_deref().unwrap_or_default(), MAX_USER)?;
        let entrypoint = self.entrypoint.as_deref().unwrap_or_default();
        for (what, given) in [
            ("arguments", self.cmd.len() + entrypoint.len()),
            ("environment variables", self.env.len()),
        ] {
            if given > MAX_WORDS {
                return Err(ConfigError::TooMany {
                    what,
                    given,
                    most: MAX_WORDS,
                });
            }
        }
        let mut together = 0;
        for argument in self.cmd.iter().chain(entrypoint) {
            within("an argument", argument, MAX_WORD)?;
            together += argument.len() + 1;
        }
        for variable in &self.env {
            let length = variable.name().len() + 1 + variable.value().len();
            if length > MAX_WORD {
                return Err(ConfigError::TooLong {
                    what: "an environment variable",
                    given: length,
                    most: MAX_WORD,
                });
            }
            together += length + 1;
        }
        if together > MAX_WORDS_TOGETHER {
            return Err(ConfigError::TooLong {
                what: "a command line with its environment",
                given: together,
                most: MAX_WORDS_TOGETHER,
            });
        }
        Ok(())
    }

    /// The main process: the request over the image's config, as Docker combines them.
    ///
    /// An entrypoint in the request drops the image's `Cmd`; a command in the request replaces it.
    pub fn main_process(&self, image: &ImageConfig) -> Result<ProcessConfig, ConfigError> {
        let (entrypoint, image_cmd) = match &self.entrypoint {
            Some(entrypoint) => (entrypoint.as_slice(), &[][..]),
            None => (image.entrypoint.as_slice(), image.cmd.as_slice()),
        };
        let cmd = if self.cmd.is_empty() {
            image_cmd
        } else {
            self.cmd.as_slice()
        };
        let argv: Vec<String> = entrypoint.iter().chain(cmd).cloned().collect();
        if argv.first().is_none_or(String::is_empty) {
            return Err(ConfigError::NoCommand);
        }
        Ok(ProcessConfig {
            argv,
            env: image.env.iter().chain(&self.env).cloned().collect(),
            working_dir: self
                .working_dir
                .clone()
                .unwrap_or_else(|| image.working_dir.clone()),
            user: self.user.clone().unwrap_or_else(|| image.user.clone()),
            tty: self.tty,
            stdin: self.stdin,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_command_line_goes_over_the_image_as_docker_does_it() {
        let image = ImageConfig {
            entrypoint: strings(&["/e"]),
            cmd: strings(&["a"]),
            ..ImageConfig::default()
        };
        let check = |entrypoint: Option<&[&str]>, cmd: &[&str], expected: Result<&[&str], ConfigError>| {
            let mut config = VmConfig::new("x");
            config.entrypoint = entrypoint.map(strings);
            config.cmd = strings(cmd);
            assert_eq!(config.main_process(&image).map(|p| p.argv), expected.map(strings));
        };
        check(None, &[], Ok(&["/e", "a"]));
        check(None, &["b", "c"], Ok(&["/e", "b", "c"]));
        check(Some(&["/f"]), &[], Ok(&["/f"]));
        check(Some(&["/f"]), &["b"], Ok(&["/f", "b"]));
        check(Some(&[]), &["b"], Ok(&["b"]));
        check(Some(&[]), &[], Err(ConfigError::NoCommand));
    }

    #[test]
    fn impossible_requests_are_refused() {
        let refuse = |change: fn(&mut VmConfig)| {
            let mut config = VmConfig::new("x");
            config.validate().unwrap();
            change(&mut config);
            config.validate().unwrap_err()
        };
        assert!(matches!(
            refuse(|c| c.memory = ByteSize::from_bytes(0)),
            ConfigError::Memory { .. }
        ));
        assert!(matches!(refuse(|c| c.cpus = 0), ConfigError::Cpus { .. }));
        assert!(matches!(refuse(|c| c.cpus = 256), ConfigError::Cpus { .. }));
        assert!(matches!(
            refuse(|c| c.disk = ByteSize::from_bytes(1)),
            ConfigError::Disk { disk: "overlay", .. }
        ));
        assert!(matches!(
            refuse(|c| c.work = ByteSize::from_mib(1 << 40)),
            ConfigError::Disk { disk: "work", .. }
        ));
        assert!(matches!(
            refuse(|c| c.working_dir = Some("x".into())),
            ConfigError::WorkingDir { .. }
        ));
        assert!(matches!(refuse(|c| c.cmd = vec!["\0".into()]), ConfigError::Nul));
        assert!(matches!(
            refuse(|c| (c.init, c.tty) = (true, true)),
            ConfigError::InitWithCommand
        ));
    }

    #[test]
    fn nothing_is_longer_than_a_guest_takes() {
        let check = |change: &dyn Fn(&mut VmConfig), expected: Option<&str>| {
            let mut config = VmConfig::new("x");
            change(&mut config);
            match (config.validate(), expected) {
                (Ok(()), None) => {}
                (Err(error), Some(what)) if error.to_string().contains(what) => {}
                (found, _) => panic!("{found:?}, not {expected:?}"),
            }
        };
        let word = |length: usize| "a".repeat(length);
        let variable = |length: usize| format!("A={}", word(length)).parse::<EnvVar>().unwrap();
        check(&|c| c.cmd = vec![word(1); 4096], None);
        check(&|c| c.cmd = vec![word(1); 4097], Some("4097 arguments"));
        check(
            &|c| (c.cmd, c.entrypoint) = (vec![word(1); 4000], Some(vec![word(1); 97])),
            Some("4097 arguments"),
        );
        check(
            &|c| c.env = vec![variable(1); 4097],
            Some("4097 environment variables"),
        );
        check(&|c| c.cmd = vec![word((128 << 10) - 1)], None);
        check(
            &|c| c.cmd = vec![word(128 << 10)],
            Some("an argument of 131072 bytes"),
        );
        check(
            &|c| c.env = vec![variable(128 << 10)],
            Some("an environment variable"),
        );
        check(
            &|c| c.cmd = vec![word(100 << 10); 6],
            Some("a command line with its environment"),
        );
        check(
            &|c| (c.cmd, c.env) = (vec![word(100 << 10); 3], vec![variable(100 << 10); 3]),
            Some("a command line with its environment"),
        );
        check(&|c| c.working_dir = Some(format!("/{}", word(4094))), None);
        check(
            &|c| c.working_dir = Some(format!("/{}", word(4095))),
            Some("a working directory"),
        );
        check(&|c| c.user = Some(word(513)), Some("a user"));
        check(&|c| c.image = word(1025), Some("an image name"));
    }

    #[test]
    fn shared_folders_must_make_sense() {
        let check = |mounts: &[(&str, &str)], expected: Option<&str>| {
            let mut config = VmConfig::new("x");
            config.mounts = mounts
                .iter()
                .map(|(source, target)| Mount {
                    source: source.into(),
                    target: target.into(),
                    read_only: false,
                })
                .collect();
            match (config.validate(), expected) {
                (Ok(()), None) => {}
                (Err(error), Some(what)) if error.to_string().contains(what) => {}
                (found, _) => panic!("{mounts:?}: {found:?}, not {expected:?}"),
            }
        };
        check(&[("/a", "/b"), ("/a", "/b/c"), ("/x, =y", "/-d")], None);
        check(&[("a", "/b")], Some("not an absolute path"));
        check(&[("", "/b")], Some("not an absolute path"));
        check(&[("/a", "b")], Some("not an absolute path"));
        check(&[("/a", "/")], Some("its root"));
        check(&[("/a", "//./")], Some("its root"));
        check(&[("/a", "/b/../c")], Some("`..`"));
        check(&[("/a", "/proc/x")], Some("its kernel"));
        check(&[("/a\nb", "/b")], Some("control characters"));
        check(
            &[("/a", &format!("/{}", "b".repeat(4095)))],
            Some("longer than Linux takes"),
        );
        check(&[("/a", "/b"), ("/c", "/b/")], Some("target `/b`"));
        check(&[("/a", "/b"), ("/c", "//b/.")], Some("target `/b`"));
        check(&[("/a", "/b"); 17], Some("too many"));
    }
}
