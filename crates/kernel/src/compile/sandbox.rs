//! Runs a source's own programs with no rights: make, the compiler, and whatever a Makefile runs.
//!
//! ```text
//! unshare ─► sh: bind the build's folder on /tmp ─► setpriv: a user of nobody's, no capabilities ─► make
//!  (own mount, PID, network and IPC namespaces)              │
//!                                                            └─ watcher: reads standard input, which we hold open
//! ```
//!
//! To what runs, the build's folder is `/tmp`; it sees no process but its own and no network, and may write nowhere else
//! but where everybody may. When make ends, or the one child that we know is killed, the namespace takes all the others
//! along; when we die, the watcher sees the end of its input and kills them. The pipe that they write to ends when the
//! last of them is gone.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use offshoot_sys::durable::StagingDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};

/// How many of the last lines an error shows: the compiler's complaint comes before those of make.
const TAIL_LINES: usize = 24;
/// The longest line that is kept.
const LINE_MAX: u64 = 400;
/// How long killed processes may take to be gone before their folder is removed anyway.
const GONE_WITHIN: Duration = Duration::from_secs(10);
/// Runs as root: `$1` is the build's folder, `$2` the user.
const ENTER: &str = "\
mount --bind \"$1\" /tmp
cd /tmp/linux
u=$2
shift 2
ulimit -c 0
ulimit -f 8388608
exec nice -n 10 setpriv --reuid=\"$u\" --regid=\"$u\" --clear-groups --pdeathsig=KILL --no-new-privs --inh-caps=-all \
    --bounding-set=-all -- sh -c \"$WATCH\" sh \"$@\"";
/// Runs as the user. Standard input of what runs is empty.
const WATCH: &str = "\
exec 3<&0 </dev/null
{ cat <&3 >/dev/null 2>&1; kill -KILL -1; } &
exec 3<&-
exec \"$@\"";

/// How what ran has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    /// The last lines it wrote, to standard output and error together.
    pub(crate) tail: Vec<String>,
}

/// A folder that is built in, and what runs in it. Dropped, both are gone soon after.
pub(crate) struct Sandbox {
    staging: Option<StagingDir>,
    /// The folder in it that is `/tmp` to what runs, and belongs to it.
    work: PathBuf,
    /// The user and group that everything in it runs as.
    user: u32,
    running: Option<(Child, BufReader<pipe::Receiver>)>,
}

impl Sandbox {
    /// Builds in the folder `work` of `staging`.
    pub(crate) fn new(staging: StagingDir, work: &str, user: u32) -> Self {
        Self {
            work: staging.path().join(work),
            staging: Some(staging),
            user,
            running: None,
        }
    }

    /// Runs `arguments` (the first is the program) in the folder `linux` below `/tmp`, with nothing but `env` and `PATH`
    /// in its environment, and hands each line that it writes to `said`.
    ///
    /// Dropping the future leaves it running; dropping the sandbox kills it.
    pub(crate) async fn run(
        &mut self,
        arguments: &[&str],
        env: &[(&str, String)],
        mut said: impl FnMut(&str),
    ) -> io::Result<Ended> {
        let (child, lines) = self.running.insert(spawn(&self.work, self.user, arguments, env)?);
        let tail = follow(lines, &mut said).await?;
        let status = child.wait().await?;
        self.running = None;
        Ok(Ended { status, tail })
    }

    /// The folder, when nothing runs in it any more.
    pub(crate) fn into_folder(mut self) -> Option<StagingDir> {
        match self.running {
            Some(_) => None,
            None => self.staging.take(),
        }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let (Some(staging), Ok(runtime)) = (self.staging.take(), tokio::runtime::Handle::try_current())
        else {
            return;
        };
        let running = self.running.take();
        // A tree of Linux is no work for a moment.
        runtime.spawn(async move {
            if let Some((mut child, mut lines)) = running {
                // What the watcher reads.
                drop(child.stdin.take());
                // An error means that it has ended already.
                let _ = child.kill().await;
                let mut rest = Vec::new();
                let gone = async {
                    while matches!((&mut lines).take(LINE_MAX).read_to_end(&mut rest).await, Ok(1..)) {
                        rest.clear();
                    }
                };
                let _ = tokio::time::timeout(GONE_WITHIN, gone).await;
            }
            // Fails only when the runtime ends; then the next start sweeps the folder.
            let _ = tokio::task::spawn_blocking(move || drop(staging)).await;
        });
    }
}

fn spawn(
    dir: &Path,
    user: u32,
    arguments: &[&str],
    env: &[(&str, String)],
) -> io::Result<(Child, BufReader<pipe::Receiver>)> {
    let (reader, writer) = io::pipe()?;
    let mut command = Command::new("unshare");
    command
        .args([
            "--fork",
            "--pid",
            "--mount",
            "--net",
            "--ipc",
            "--mount-proc",
            "--kill-child=SIGKILL",
        ])
        .args(["--", "sh", "-ec", ENTER, "sh"])
        .arg(dir)
        .arg(user.to_string())
        .args(arguments)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("WATCH", WATCH)
        .envs(env.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::piped())
        .stdout(Stdio::from(writer.try_clone()?))
        .stderr(Stdio::from(writer))
        .kill_on_drop(true);
    let child = command.spawn()?;
    // The ends of the pipe that the command holds.
    drop(command);
    let reader = pipe::Receiver::from_owned_fd(OwnedFd::from(reader))?;
    Ok((child, BufReader::new(reader)))
}

/// Hands on each line, and gives the last ones.
async fn follow(
    lines: &mut BufReader<pipe::Receiver>,
    said: &mut impl FnMut(&str),
) -> io::Result<Vec<String>> {
    let mut tail = VecDeque::with_capacity(TAIL_LINES);
    loop {
        let mut line = Vec::new();
        if (&mut *lines).take(LINE_MAX).read_until(b'\n', &mut line).await? == 0 {
            return Ok(tail.into());
        }
        let text = String::from_utf8_lossy(&line);
        let text: String = text
            .trim_end()
            .chars()
            .map(|c| if c == '\t' { ' ' } else { c })
            .filter(|c| !c.is_control())
            .collect();
        if text.is_empty() {
            continue;
        }
        said(&text);
        if tail.len() == TAIL_LINES {
            tail.pop_front();
        }
        tail.push_back(text);
    }
}
