//! A bare QEMU: the arguments that a VM of ours was started with, and nothing of ours in the guest. It has the same network
//! device, which nobody sets up in it; what ours spends on its network counts against ours.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::daemon::{Daemon, IMAGE};

/// How to start it.
pub(crate) struct Bare {
    program: String,
    arguments: Vec<String>,
    /// The writable disks: what each is copied from, and where it lies.
    disks: Vec<(PathBuf, PathBuf)>,
}

/// The writable disks of a VM, and the seeds that they come from.
pub(crate) const DISKS: [(&str, &str); 2] = [
    ("overlay.ext4", "overlay-seed.ext4"),
    ("work.ext4", "work-seed.ext4"),
];

impl Bare {
    /// Takes the command line of a VM that runs, points it at copies of its own, and swaps the init.
    pub(crate) fn like_a_vm_of(daemon: &Daemon, init: &Path) -> Result<Self> {
        daemon.ok(&[
            "run", "-d", "--name", "model", "--boot", "cold", IMAGE, "sleep", "1000",
        ])?;
        let details = daemon.inspect("model")?;
        let pid = details["pid"].as_i64().context("no pid")?;
        let words = words_of(pid)?;
        daemon.ok(&["rm", "-f", "model"])?;
        let (program, rest) = words.split_first().context("an empty command line")?;

        let scratch = daemon.scratch();
        let base = first_below(&daemon.data().join("bases"))?;
        let disks = DISKS.map(|(disk, seed)| (base.join(seed), scratch.join(format!("bare-{disk}"))));
        let initramfs = scratch.join("bare-initramfs");
        let mut arguments: Vec<String> = Vec::new();
        for word in rest {
            let word = if word.ends_with("/initramfs") {
                with_init(Path::new(word), init, &initramfs)?;
                initramfs.display().to_string()
            } else if word.starts_with("socket,id=") {
                format!("null,{}", word.split(',').nth(1).unwrap_or_default())
            } else if word.starts_with("tap,id=") {
                // The same device for the guest, with nothing behind it: the TAP was that VM's alone.
                format!("hubport,{},hubid=0", word.split(',').nth(1).unwrap_or_default())
            } else if word.starts_with("ringbuf,id=console") {
                "stdio,id=console,signal=off".to_owned()
            } else {
                with_disk(word, &disks).unwrap_or_else(|| word.clone())
            };
            arguments.push(word);
        }
        Ok(Self {
            program: program.clone(),
            arguments,
            disks: disks.to_vec(),
        })
    }

    /// Boots, runs `true`, ends. Gives the time from the start of QEMU until its process is gone.
    pub(crate) fn run(&self) -> Result<Duration> {
        copy_seeds(&self.disks)?;
        let began = Instant::now();
        let mut child = Command::new(&self.program)
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .context("cannot start QEMU")?;
        let output = child.stdout.take().context("a pipe")?;
        let mut said = String::new();
        let mut done = false;
        for line in BufReader::new(output).lines() {
            let line = line.unwrap_or_default();
            if line.contains("done exit status: 0") {
                done = true;
                break;
            }
            said.push_str(&line);
            said.push('\n');
        }
        child.kill()?;
        child.wait()?;
        let wall = began.elapsed();
        if !done {
            bail!("the bare guest did not get there:\n{said}");
        }
        Ok(wall)
    }
}

/// A process's command line (proc_pid_cmdline(5)).
pub(crate) fn words_of(pid: i64) -> Result<Vec<String>> {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline"))?;
    let words = bytes.split(|byte| *byte == 0).map(String::from_utf8_lossy);
    // Each ends with a zero; QEMU takes an empty one as a value.
    let mut words: Vec<_> = words.map(std::borrow::Cow::into_owned).collect();
    words.pop();
    Ok(words)
}

/// New disks of the seeds.
pub(crate) fn copy_seeds(disks: &[(PathBuf, PathBuf)]) -> Result<()> {
    for (seed, disk) in disks {
        let _ = std::fs::remove_file(disk);
        copy_sparse(seed, disk)?;
    }
    Ok(())
}

/// A copy with the holes of the original.
pub(crate) fn copy_sparse(from: &Path, to: &Path) -> Result<()> {
    let mut cp = Command::new("cp");
    let copied = cp.arg("--sparse=always").args([from, to]).status()?;
    if !copied.success() {
        bail!("cannot copy {}", from.display());
    }
    Ok(())
}

/// The option of a writable disk, pointed at our copy; nothing where it is another option.
pub(crate) fn with_disk(word: &str, disks: &[(PathBuf, PathBuf)]) -> Option<String> {
    let at = word.find("file.filename=")?;
    let (path, options) = word[at..].split_once(',').unwrap_or((&word[at..], ""));
    let (n, _) = DISKS
        .iter()
        .enumerate()
        .find(|(_, (disk, _))| path.ends_with(&format!("/{disk}")))?;
    let ours = disks[n].1.display();
    Some(format!("{}file.filename={ours},{options}", &word[..at]))
}

pub(crate) fn first_below(folder: &Path) -> Result<PathBuf> {
    let entry = std::fs::read_dir(folder)?.next().context("an empty folder")?;
    Ok(entry?.path())
}

/// Archives may follow one another: a second `/init` takes the place of the first (Linux,
/// Documentation/driver-api/early-userspace/buffer-format.rst).
fn with_init(initramfs: &Path, init: &Path, into: &Path) -> Result<()> {
    let mut bytes = std::fs::read(initramfs)?;
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let program = std::fs::read(init).with_context(|| format!("cannot read {}", init.display()))?;
    let entry = cpio::newc::Builder::new("init").mode(0o100_755).ino(1).nlink(1);
    let mut writer = entry.write(&mut bytes, u32::try_from(program.len())?);
    writer.write_all(&program)?;
    writer.finish()?;
    cpio::newc::trailer(&mut bytes)?;
    std::fs::write(into, bytes)?;
    Ok(())
}
