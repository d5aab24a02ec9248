//! A guest's kernel, compiled from the distribution's source of Linux.
//!
//! ```text
//! linux-source-6.12 ─apt─► .deb ─► tarball ─┐
//! the user's tarball ───────────────────────┴─ unpack ─► tree ─┐
//! guest.config ─┬─ merge ─► fragment ──────────────────────────┴─ make allnoconfig ─► .config: all there? ─┐
//! the user's ───┘                                                                                          │
//!                                                 bundle ◄─ vmlinux ◄─ make vmlinux ◄──────────────────────┘
//! ```
//!
//! Everything that comes out of the tree runs in a [`Sandbox`]. The same source, fragment and compiler make the same bytes:
//! nothing of this host, its users or the time of day goes in.

mod config;
mod sandbox;
mod source;
mod tools;

use std::io;
use std::os::unix::fs::{PermissionsExt, lchown};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use offshoot_model::{ByteSize, Digest, ErrorKind, Explain, Progress, ProgressUnit};
use offshoot_sys::durable::StagingDir;
use sha2::{Digest as _, Sha256};

pub use self::config::{FRAGMENT_MAX, FragmentError};
use self::sandbox::{Ended, Sandbox};
use self::source::{SourceError, TREE, is_plain_file};
use self::tools::Missing;
use crate::distro::{self, DistroError, Package};
use crate::manifest::KernelSource;
use crate::module_tree::read_limited;
use crate::vmlinux::VMLINUX_MAX;

/// What a build takes at most: the tarball, the tree, and what it is compiled to.
const ROOM: ByteSize = ByteSize::from_mib(4096);
/// How many steps make tells of for our fragment and Linux 6.12: only how far a bar goes depends on it.
const STEPS: u64 = 3_000;
/// The largest configuration that Kconfig may write: Debian's has 280 KiB.
const CONFIG_MAX: u64 = 4 << 20;
/// How many options an error lists.
const LOST_SHOWN: usize = 20;

/// What to compile, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CompileOptions {
    /// A tarball of Linux; the distribution's source package where there is none.
    pub source: Option<PathBuf>,
    /// A fragment of the user's, which wins over ours.
    pub fragment: String,
    /// Compilers at once; as many as there are processors where there is none.
    pub jobs: Option<u32>,
    /// The user and group that the source's own programs run as: nobody else's.
    pub user: u32,
}

/// Why a kernel cannot be compiled. Nothing is left of it.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// Programs or libraries are missing.
    #[error("this host lacks {}", names(missing))]
    NotInstalled {
        /// Which.
        missing: Vec<Missing>,
    },
    /// The user's fragment is not understood.
    #[error(transparent)]
    Fragment(#[from] FragmentError),
    /// The distribution's source cannot be had.
    #[error("cannot get Linux's source")]
    Package {
        /// Why not.
        #[source]
        source: DistroError,
    },
    /// The disk has too little room.
    #[error("compiling takes {needed} of disk, and {} has {available} left", path.display())]
    NoRoom {
        /// Where it is compiled.
        path: PathBuf,
        /// What it takes.
        needed: ByteSize,
        /// What there is.
        available: ByteSize,
    },
    /// The tarball gives no source.
    #[error("the tarball gives no source of Linux")]
    Source {
        /// Why not.
        #[source]
        source: SourceError,
    },
    /// A program cannot be run.
    #[error("cannot run {what}")]
    Run {
        /// What was to be run.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// make gave up.
    #[error("{stage} Linux {version} failed ({status}):\n{}", tail.join("\n"))]
    Failed {
        /// `configuring`, `compiling`.
        stage: &'static str,
        /// Which Linux.
        version: String,
        /// How make ended.
        status: ExitStatus,
        /// Its last lines.
        tail: Vec<String>,
    },
    /// Linux's configuration dropped options.
    #[error("Linux {version} does not take {} of the options:\n{}", options.len(), shown(options))]
    Lost {
        /// Which Linux.
        version: String,
        /// The lines of the fragment that were dropped.
        options: Vec<String>,
    },
    /// make left something else than a kernel.
    #[error("make left no {what}")]
    NoResult {
        /// Which file.
        what: &'static str,
    },
    /// A file of ours cannot be used.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// `read`, `write`, `open up`.
        action: &'static str,
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn names(missing: &[Missing]) -> String {
    let names: Vec<_> = missing.iter().map(|missing| missing.name).collect();
    names.join(", ")
}

fn shown(options: &[String]) -> String {
    let mut lines: Vec<_> = options
        .iter()
        .take(LOST_SHOWN)
        .map(|line| format!("  {line}"))
        .collect();
    if let Some(more @ 1..) = options.len().checked_sub(LOST_SHOWN) {
        lines.push(format!("  and {more} more"));
    }
    lines.join("\n")
}

impl Explain for CompileError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NotInstalled { .. } => ErrorKind::NotPossible,
            Self::Fragment(_) => ErrorKind::InvalidRequest,
            Self::Package { source } => source.kind(),
            Self::NoRoom { .. } => ErrorKind::NoSpace,
            Self::Source { source } => match source {
                SourceError::Write { source, .. } => kind_of(source),
                _ => ErrorKind::BadContent,
            },
            Self::Failed { .. } | Self::Lost { .. } | Self::NoResult { .. } => ErrorKind::BadContent,
            Self::Run { source, .. } | Self::Io { source, .. } => kind_of(source),
        }
    }

    fn hints(&self) -> Vec<String> {
        let hint = match self {
            Self::NotInstalled { missing } => return vec![tools::remedy(missing)],
            Self::Fragment(_) => {
                "write lines like `CONFIG_KVM=y` and `# CONFIG_XFS_FS is not set`; `zcat /proc/config.gz` in a VM shows \
                 what it has"
            }
            Self::Package { .. } => {
                "`linux-source-6.12` is in Debian 13, and for Debian 12 in bookworm-backports and bookworm-security: run \
                 `apt-get update`, or give a tarball with `--source FILE`"
            }
            Self::NoRoom { .. } => {
                "make room, for example with `offshoot prune`; `offshoot df` shows what takes it"
            }
            Self::Source { .. } => {
                "give a tarball of Linux 6.12, such as /usr/src/linux-source-6.12.tar.xz of the package \
                 `linux-source-6.12`"
            }
            Self::Lost { .. } => {
                "an option that is lost does not exist in this Linux, or what it depends on is off: say that too, or leave \
                 it out of `--config-fragment`"
            }
            Self::Failed { .. } => {
                "check the fragment, or build without `--config-fragment` and `--source`; `--jobs 1` puts the compiler's \
                 complaint last"
            }
            Self::Run { .. } | Self::NoResult { .. } | Self::Io { .. } => return Vec::new(),
        };
        vec![hint.to_owned()]
    }
}

fn kind_of(error: &io::Error) -> ErrorKind {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
        _ => ErrorKind::Internal,
    }
}

/// What will be compiled: enough to find a bundle that was made of it before.
pub(crate) struct CompilePlan {
    package: Option<Package>,
    fragment: String,
    jobs: u32,
    pub(crate) source: KernelSource,
}

/// Looks at the request and at what this host has, and decides. Reads the user's tarball once.
pub(crate) async fn plan(options: &CompileOptions) -> Result<CompilePlan, CompileError> {
    let fragment = config::merge(config::GUEST, &options.fragment)?;
    let run = |source| CompileError::Run { what: "gcc", source };
    let missing = tools::missing().await.map_err(run)?;
    if !missing.is_empty() {
        return Err(CompileError::NotInstalled { missing });
    }
    let compiler = tools::compiler().await.map_err(run)?;
    let package = match &options.source {
        Some(_) => None,
        None => Some(
            distro::find_source()
                .await
                .map_err(|source| CompileError::Package { source })?,
        ),
    };
    let (of, version) = match (&package, &options.source) {
        (Some(package), _) => (package.name.clone(), package.version.clone()),
        (None, Some(tarball)) => ("tarball".to_owned(), digest_of(tarball).await?.to_string()),
        (None, None) => return Err(CompileError::NoResult { what: "source" }),
    };
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(CompilePlan {
        jobs: options
            .jobs
            .unwrap_or_else(|| u32::try_from(processors).unwrap_or(1))
            .max(1),
        source: KernelSource::Compiled {
            package: of,
            version,
            config: Digest::from_bytes(Sha256::digest(&fragment).into()),
            compiler,
        },
        package,
        fragment,
    })
}

async fn digest_of(path: &Path) -> Result<Digest, CompileError> {
    let path = path.to_owned();
    let digest = tokio::task::spawn_blocking(move || {
        let failed = |source| CompileError::Io {
            action: "read",
            path: path.clone(),
            source,
        };
        let mut hash = Sha256::new();
        let mut file = std::fs::File::open(&path).map_err(failed)?;
        let mut buffer = vec![0; 256 << 10];
        loop {
            let read = io::Read::read(&mut file, &mut buffer).map_err(failed)?;
            if read == 0 {
                break;
            }
            hash.update(&buffer[..read]);
        }
        Ok(Digest::from_bytes(hash.finalize().into()))
    });
    joined(digest.await)
}

fn joined<T>(result: Result<Result<T, CompileError>, tokio::task::JoinError>) -> Result<T, CompileError> {
    result.unwrap_or_else(|error| match error.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        Err(_) => Err(CompileError::Run {
            what: "a thread",
            source: io::ErrorKind::Interrupted.into(),
        }),
    })
}

/// Compiles in `staging`; gives the folder back, and the kernel in it.
///
/// Dropping the future kills what runs, and removes the folder soon after.
pub(crate) async fn compile(
    plan: &CompilePlan,
    options: &CompileOptions,
    staging: StagingDir,
    progress: &Progress,
) -> Result<(StagingDir, PathBuf), CompileError> {
    let dir = staging.path().to_owned();
    check_room(&dir)?;
    let tarball = match (&plan.package, &options.source) {
        (Some(package), _) => distro::fetch_source(package, &dir, progress)
            .await
            .map_err(|source| CompileError::Package { source })?,
        (None, Some(tarball)) => tarball.clone(),
        (None, None) => return Err(CompileError::NoResult { what: "source" }),
    };
    let work = dir.join("work");
    let (into, user, progress_there) = (work.clone(), options.user, progress.clone());
    let (staging, linux) = joined(
        tokio::task::spawn_blocking(move || {
            make_work(&into, user)?;
            let linux = source::unpack(&tarball, &into, user, &progress_there)
                .map_err(|source| CompileError::Source { source })?;
            Ok((staging, linux))
        })
        .await,
    )?;
    let fragment = work.join("fragment");
    std::fs::write(&fragment, &plan.fragment).map_err(|source| CompileError::Io {
        action: "write",
        path: fragment,
        source,
    })?;

    let mut sandbox = Sandbox::new(staging, "work", options.user);
    let version = linux.version;
    let failed = |stage, ended: Ended| CompileError::Failed {
        stage,
        version: version.clone(),
        status: ended.status,
        tail: ended.tail,
    };
    let run = |source| CompileError::Run { what: "make", source };
    let env = environment(linux.made);
    let task = progress.start(format!("configuring Linux {version}"), ProgressUnit::Items, None);
    let ended = sandbox
        .run(
            &["make", "KCONFIG_ALLCONFIG=/tmp/fragment", "allnoconfig"],
            &env,
            |_| (),
        )
        .await
        .map_err(run)?;
    if !ended.status.success() {
        return Err(failed("configuring", ended));
    }
    let config = result(&work, ".config", CONFIG_MAX)?;
    let options = config::lost(&plan.fragment, &String::from_utf8_lossy(&config));
    if !options.is_empty() {
        return Err(CompileError::Lost { version, options });
    }
    progress.finish(task);

    let task = progress.start(
        format!("compiling Linux {version}"),
        ProgressUnit::Items,
        Some(STEPS),
    );
    let mut steps = 0;
    let count = |line: &str| {
        if is_step(line) {
            steps += 1;
            progress.moved(task, steps.min(STEPS));
        }
    };
    let jobs = format!("-j{}", plan.jobs);
    let ended = sandbox
        .run(&["make", &jobs, "vmlinux"], &env, count)
        .await
        .map_err(run)?;
    if !ended.status.success() {
        return Err(failed("compiling", ended));
    }
    progress.finish(task);
    let vmlinux = work.join(TREE).join("vmlinux");
    let is_ours = is_plain_file(&vmlinux)
        && std::fs::metadata(&vmlinux).is_ok_and(|metadata| metadata.len() <= VMLINUX_MAX as u64);
    let staging = sandbox.into_folder().filter(|_| is_ours);
    staging
        .map(|staging| (staging, vmlinux))
        .ok_or(CompileError::NoResult { what: "vmlinux" })
}

fn check_room(dir: &Path) -> Result<(), CompileError> {
    let available = offshoot_sys::space::available(dir).map_err(|source| CompileError::Io {
        action: "read the room of",
        path: dir.to_owned(),
        source,
    })?;
    if available < ROOM.bytes() {
        return Err(CompileError::NoRoom {
            path: dir.to_owned(),
            needed: ROOM,
            available: ByteSize::from_bytes(available),
        });
    }
    Ok(())
}

/// The folder that is `/tmp` to what is run.
fn make_work(path: &Path, user: u32) -> Result<(), CompileError> {
    let failed = |action| {
        move |source| CompileError::Io {
            action,
            path: path.to_owned(),
            source,
        }
    };
    std::fs::create_dir(path).map_err(failed("make"))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).map_err(failed("open up"))?;
    lchown(path, Some(user), Some(user)).map_err(failed("give away"))
}

/// Reads what was made, which may be anything: what is at that path now stays, since all that ran is gone.
fn result(work: &Path, name: &'static str, limit: u64) -> Result<Vec<u8>, CompileError> {
    let path = work.join(TREE).join(name);
    if !source::is_plain_dir(&work.join(TREE)) || !is_plain_file(&path) {
        return Err(CompileError::NoResult { what: name });
    }
    read_limited(&path, limit).map_err(|source| CompileError::Io {
        action: "read",
        path,
        source,
    })
}

/// What make and all that it runs find in their environment: the same on every host (Linux's
/// Documentation/kbuild/reproducible-builds.rst).
fn environment(made: u64) -> Vec<(&'static str, String)> {
    [
        ("HOME", "/tmp"),
        ("TMPDIR", "/tmp"),
        ("LC_ALL", "C"),
        ("ARCH", "x86_64"),
        ("KBUILD_BUILD_USER", "offshoot"),
        ("KBUILD_BUILD_HOST", "offshoot"),
        ("KBUILD_BUILD_VERSION", "1"),
    ]
    .into_iter()
    .map(|(name, value)| (name, value.to_owned()))
    .chain([("KBUILD_BUILD_TIMESTAMP", date(made))])
    .collect()
}

/// `2026-11-14`: seconds since 1970 as a day (UTC), counted in eras of 400 years from the first of March of the year 0.
fn date(seconds: u64) -> String {
    const DAYS_TO_1970: u64 = 719_468;
    const DAYS_OF_ERA: u64 = 146_097;
    let days = seconds / 86_400 + DAYS_TO_1970;
    let (era, day) = (days / DAYS_OF_ERA, days % DAYS_OF_ERA);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    format!("{:04}-{month:02}-{day:02}", era * 400 + year + next)
}

/// Whether a line of make's tells of a step: `  CC      fs/ext4/inode.o`.
fn is_step(line: &str) -> bool {
    line.strip_prefix("  ")
        .and_then(|rest| rest.split_once(' '))
        .is_some_and(|(tool, _)| {
            !tool.is_empty() && tool.bytes().all(|b| b.is_ascii_uppercase() || b == b'_')
        })
}

#[cfg(test)]
mod tests;
