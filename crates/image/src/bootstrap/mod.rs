//! Makes a Debian image from nothing but a Debian mirror, through mmdebstrap(1).
//!
//! ```text
//! unshare ─► mmdebstrap ─┬─ stdout: the tar ──► spool ──► layer, config, manifest (as an imported root file system)
//!  (own PID and mount    └─ stderr: lines ───► progress, and the end of them into the error
//!   namespaces)
//! ```
//!
//! The result is what people expect of Docker's `debian`: required packages, apt, time zones, no caches, nothing of the host.
//! mmdebstrap's children open sessions of their own, so a process group does not hold them; a PID namespace does: when the
//! one child that we know dies, all of them do, and its mounts go with its mount namespace.

mod plan;

use std::fs::File;
use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use offshoot_model::{Digest, ErrorKind, Explain, Progress};
use offshoot_store::blobs::BlobStore;
use offshoot_sys::durable::StagingDir;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::process::{Child, ChildStderr, ChildStdout, Command};
use tokio::task::spawn_blocking;

use self::plan::{Plan, Source, plan, read_sources};
use crate::archive::{DEFAULT_IMPORT_LIMIT, ImportError, Spool, default_config, from_spool};
use crate::platform::Platform;

/// How many of mmdebstrap's last lines an error shows: apt's own errors come in a few lines before its summary.
const TAIL_LINES: usize = 12;
/// The longest line that is kept.
const LINE_LENGTH: u64 = 400;
/// The most of a sources file that is read; a real one has a few hundred bytes.
const SOURCES_LIMIT: u64 = 256 << 10;

/// How often it is tried to remove what killed children may still have been writing to: for ten seconds in all.
const REMOVE_ATTEMPTS: u32 = 100;
const REMOVE_PAUSE: Duration = Duration::from_millis(100);

/// What mmdebstrap copies from the host, so that apt works while it builds, and must not leave there.
const REMOVE_HOST_FILES: &str = r#"--customize-hook=rm -f "$1/etc/resolv.conf" "$1/etc/hostname""#;

/// What a bootstrap is asked to do.
#[derive(Clone, Debug, Default)]
pub struct BootstrapOptions {
    /// `debian:bookworm`, `debian:12`, `debian`.
    pub suite: String,
    /// More packages.
    pub include: Vec<String>,
    /// The archive to take them from; the host's own mirrors where there is none.
    pub mirror: Option<String>,
    /// How much of Debian.
    pub variant: Variant,
}

/// How much of Debian an image has before anything is included: mmdebstrap(1), "VARIANTS".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Variant {
    /// Essential packages and apt.
    Apt,
    /// All packages of priority required, and apt: what Docker's `debian` has.
    #[default]
    Minbase,
    /// A system without graphics: priorities required and important.
    Important,
}

impl Variant {
    fn name(self) -> &'static str {
        match self {
            Self::Apt => "apt",
            Self::Minbase => "minbase",
            Self::Important => "important",
        }
    }
}

/// Why there is no new image. Nothing is left of it.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// Not Debian.
    #[error("cannot bootstrap `{name}`: only debian is known")]
    Distribution {
        /// What was asked for.
        name: String,
    },
    /// A suite that cannot be one.
    #[error("`{text}` names no Debian suite")]
    Suite {
        /// What was asked for.
        text: String,
    },
    /// A package that cannot be one.
    #[error("`{name}` is not the name of a package")]
    Package {
        /// What was asked for.
        name: String,
    },
    /// A mirror that cannot be one.
    #[error("`{text}` is not the address of a mirror")]
    Mirror {
        /// What was asked for.
        text: String,
    },
    /// The program is missing.
    #[error("cannot bootstrap an image without `{program}`")]
    NotInstalled {
        /// `mmdebstrap` or `unshare`.
        program: &'static str,
    },
    /// The program does not start, or its output does not arrive.
    #[error("cannot run mmdebstrap")]
    Run {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It gave up.
    #[error("mmdebstrap could not make {suite} ({status}):\n{}", tail.join("\n"))]
    Failed {
        /// Which suite.
        suite: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// Its last lines.
        tail: Vec<String>,
    },
    /// What it made is not taken.
    #[error("cannot make an image of what mmdebstrap made")]
    Import {
        /// Why.
        #[from]
        source: ImportError,
    },
}

impl Explain for BootstrapError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Distribution { .. } | Self::Suite { .. } | Self::Package { .. } | Self::Mirror { .. } => {
                ErrorKind::InvalidRequest
            }
            Self::NotInstalled { .. } => ErrorKind::NotPossible,
            Self::Run { .. } => ErrorKind::Internal,
            Self::Failed { .. } => ErrorKind::Upstream,
            Self::Import { source } => source.kind(),
        }
    }

    fn hints(&self) -> Vec<String> {
        let hint = match self {
            Self::Distribution { .. } | Self::Suite { .. } => {
                "write debian:SUITE, such as debian:bookworm; for others use `offshoot image pull`"
            }
            Self::Package { .. } => "give names as apt knows them: `--include curl,ca-certificates`",
            Self::Mirror { .. } => "write an address such as http://deb.debian.org/debian",
            Self::NotInstalled {
                program: "mmdebstrap",
            } => "run `apt-get install mmdebstrap`",
            Self::NotInstalled { .. } => "run `apt-get install util-linux`",
            Self::Failed { .. } => {
                "check that the suite and the packages exist and that the mirror answers: `apt-get update`"
            }
            Self::Run { .. } => return Vec::new(),
            Self::Import { source } => return source.hints(),
        };
        vec![hint.into()]
    }
}

/// Makes an image of a Debian suite; gives its manifest's digest. The same suite on the same day makes the same image, as
/// long as the mirror has the same packages.
///
/// Dropping the future kills mmdebstrap and all its children, and leaves nothing behind.
pub async fn bootstrap(
    store: &BlobStore,
    options: &BootstrapOptions,
    progress: &Progress,
) -> Result<Digest, BootstrapError> {
    let plan = plan(
        &options.suite,
        &options.include,
        options.mirror.as_deref(),
        &host_sources(),
    )?;
    // Where the tree is built while it is not yet a tar: on the data's file system, since /tmp may be small, and swept there.
    let staging = StagingDir::new(store.tmp_dir(), "bootstrap").map_err(run_error)?;
    let child = spawn(&plan, options.variant, staging.path())?;
    let mut build = Build {
        child: Some(child),
        staging: Some(staging),
    };
    let Some((child, stdout, stderr)) = build.pipes() else {
        return Err(run_error(io::ErrorKind::BrokenPipe.into()));
    };
    let stdout = File::from(stdout.into_owned_fd().map_err(run_error)?);
    let (thread_store, thread_progress) = (store.clone(), progress.clone());
    let spool =
        spawn_blocking(move || Spool::receive(&thread_store, stdout, DEFAULT_IMPORT_LIMIT, &thread_progress));
    let (spool, tail) = tokio::join!(spool, follow(stderr, progress));
    let status = child.wait().await.map_err(run_error)?;
    if !status.success() {
        return Err(BootstrapError::Failed {
            suite: plan.suite,
            status,
            tail,
        });
    }
    let spool = spool.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))?;
    let store = store.clone();
    let image =
        spawn_blocking(move || from_spool(&store, spool, &Platform::host(), default_config(&["bash"])));
    Ok(image
        .await
        .unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))?)
}

fn run_error(source: io::Error) -> BootstrapError {
    BootstrapError::Run { source }
}

/// A running mmdebstrap and the folder it builds in. Dropped, both are gone soon after.
struct Build {
    child: Option<Child>,
    staging: Option<StagingDir>,
}

impl Build {
    fn pipes(&mut self) -> Option<(&mut Child, ChildStdout, ChildStderr)> {
        let child = self.child.as_mut()?;
        let (stdout, stderr) = (child.stdout.take()?, child.stderr.take()?);
        Some((child, stdout, stderr))
    }
}

impl Drop for Build {
    fn drop(&mut self) {
        let (Some(mut child), Some(staging)) = (self.child.take(), self.staging.take()) else {
            return;
        };
        if matches!(child.try_wait(), Ok(Some(_))) {
            return;
        }
        // The rest of the namespace dies just after the child that we know, and until then may still write.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                // An error means that it has ended already.
                let _ = child.kill().await;
                let path = staging.path().to_owned();
                drop(staging);
                for _ in 0..REMOVE_ATTEMPTS {
                    match tokio::fs::remove_dir_all(&path).await {
                        Err(error) if error.kind() != io::ErrorKind::NotFound => {
                            tokio::time::sleep(REMOVE_PAUSE).await;
                        }
                        _ => return,
                    }
                }
            });
        }
    }
}

fn spawn(plan: &Plan, variant: Variant, tmp: &Path) -> Result<Child, BootstrapError> {
    for program in ["mmdebstrap", "unshare"] {
        if !is_installed(program) {
            return Err(BootstrapError::NotInstalled { program });
        }
    }
    Command::new("unshare")
        .args(["--fork", "--pid", "--mount", "--mount-proc", "--kill-child=SIGKILL", "--", "mmdebstrap"])
        .arg(format!("--variant={}", variant.name()))
        .arg(format!("--include={}", plan.include.join(",")))
        .args(["--mode=root", "--format=tar", REMOVE_HOST_FILES])
        .args([plan.suite.as_str(), "-"])
        .args(&plan.sources)
        .env("TMPDIR", tmp)
        .env("LC_ALL", "C.UTF-8")
        // Nothing in the image is younger than midnight, so that the same packages make the same bytes.
        .env("SOURCE_DATE_EPOCH", midnight().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(run_error)
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// Today's beginning (UTC), seconds since 1970.
fn midnight() -> u64 {
    const DAY: u64 = 24 * 60 * 60;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    now - now % DAY
}

/// Tells mmdebstrap's own lines as progress; gives the last of all lines.
async fn follow(stderr: impl AsyncRead + Unpin, progress: &Progress) -> Vec<String> {
    let mut lines = BufReader::new(stderr);
    let mut tail = std::collections::VecDeque::new();
    loop {
        let mut line = Vec::new();
        match (&mut lines).take(LINE_LENGTH).read_until(b'\n', &mut line).await {
            // A pipe that breaks has no more to say; how the child ended counts.
            Ok(0) | Err(_) => return tail.into(),
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line);
        let text: String = text.trim_end().chars().filter(|c| !c.is_control()).collect();
        if let Some(said) = text.strip_prefix("I: ") {
            progress.message(format!("mmdebstrap: {said}"));
        }
        if !text.is_empty() {
            if tail.len() == TAIL_LINES {
                tail.pop_front();
            }
            tail.push_back(text);
        }
    }
}

/// Where the host's apt gets its packages. What cannot be read is as good as absent: mmdebstrap has a default.
fn host_sources() -> Vec<Source> {
    let mut files = vec![Path::new("/etc/apt/sources.list").to_path_buf()];
    if let Ok(entries) = std::fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    files.retain(|path| {
        path.extension()
            .is_some_and(|extension| extension == "list" || extension == "sources")
    });
    files.sort();
    let read = |path| {
        let mut text = String::new();
        let file = File::open(path).ok()?;
        io::Read::read_to_string(&mut io::Read::take(file, SOURCES_LIMIT), &mut text).ok()?;
        Some(text)
    };
    files
        .iter()
        .filter_map(read)
        .flat_map(|text| read_sources(&text))
        .collect()
}

#[cfg(test)]
mod tests;
