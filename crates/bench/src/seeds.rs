//! A VM's work disk of 20 GiB, in the data directory's own file system and on one that shares blocks: a clone of the seed that is
//! made longer, beside what e2fsprogs' users do.
//!
//! ```text
//! ours      clone of the seed, made longer                                 the guest grows ext4 when it mounts it
//! copied    cp --reflink=auto of the same seed, truncate, resize2fs        grown in the file
//! made      mke2fs -d with the image's /root                               made anew for each VM
//! ```

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use offshoot_model::ByteSize;
use offshoot_rootfs::seed::{DiskOrigin, clone_work_seed};
use offshoot_sys::clone::CloneKind;

use crate::daemon::{Daemon, IMAGE};
use crate::samples::{Samples, Unit, compare};

/// Disks of each kind on each file system.
const DISKS: usize = 200;
/// VMs of each size.
const VMS: usize = 5;
const GROWN: ByteSize = ByteSize::from_mib(20 << 10);
/// The file system of one's own, MiB: 200 disks that e2fsprogs made fit.
const LOOP_MIB: u64 = 4 << 10;

/// Prints it all.
pub(crate) fn of_work_disks(daemon: &Daemon) -> Result<()> {
    let seed = seed_of(daemon)?;
    let home = daemon.scratch().join("home");
    std::fs::create_dir(&home)?;
    shell("debugfs -R \"rdump / $1\" \"$0\" 2>/dev/null", &[&seed, &home])?;
    let own = daemon.scratch().join("disks");
    std::fs::create_dir(&own)?;
    on(&own, &seed, &home)?;
    let xfs = OnLoop::xfs(&daemon.scratch().join("xfs"))?;
    on(&xfs.0, &seed, &home)?;
    in_guests(daemon)
}

fn seed_of(daemon: &Daemon) -> Result<PathBuf> {
    let image: serde_json::Value = serde_json::from_str(&daemon.ok(&["image", "inspect", IMAGE])?)?;
    let base = image["base"]["id"].as_str().context("no base")?;
    Ok(daemon.data().join("bases").join(base).join("work-seed.ext4"))
}

/// One way to make a disk: times, and what a disk takes.
struct Way {
    name: &'static str,
    times: Samples,
    taken: Samples,
}

impl Way {
    fn new(name: &'static str) -> Self {
        Self {
            name,
            times: Samples::new(),
            taken: Samples::of(Unit::KiB),
        }
    }
}

fn on(dir: &Path, seed: &Path, home: &Path) -> Result<()> {
    let own_seed = dir.join("seed");
    shell("cp --sparse=always \"$0\" \"$1\"", &[seed, &own_seed])?;
    let mut kind = CloneKind::SparseCopy;
    let mut ours = Way::new("offshoot: clone, made longer");
    let mut copied = Way::new("cp --reflink=auto + resize2fs");
    let mut made = Way::new("mke2fs -d /root");
    // The first of each warms the caches.
    for n in 0..=DISKS {
        let disk = |way: &str| dir.join(format!("{way}-{n}"));
        let mut clone = || {
            if let DiskOrigin::Cloned(how) = clone_work_seed(&own_seed, &disk("ours"), GROWN)? {
                kind = how;
            }
            Ok(())
        };
        one(&mut ours, n, &disk("ours"), &mut clone)?;
        let script = "cp --reflink=auto --sparse=always \"$0\" \"$1\" && truncate -s 20G \"$1\" && resize2fs -f \"$1\"";
        one(&mut copied, n, &disk("copied"), &mut || {
            shell(script, &[&own_seed, &disk("copied")])
        })?;
        let script = "truncate -s 20G \"$1\" && mke2fs -q -t ext4 -d \"$0\" \"$1\"";
        one(&mut made, n, &disk("made"), &mut || {
            shell(script, &[home, &disk("made")])
        })?;
    }
    let how = match kind {
        CloneKind::Reflink => "shares blocks (reflink)",
        CloneKind::SparseCopy => "copies (sparse)",
    };
    println!("a work disk of 20 GiB, where the file system {how}");
    for other in [&copied, &made] {
        compare(ours.name, &ours.times, other.name, &other.times);
    }
    println!(" what each takes on disk and does not share");
    for way in [&ours, &copied, &made] {
        way.taken.print(way.name);
    }
    println!("  aim: p50 under 10 ms, under 1 MiB\n");
    std::fs::remove_file(own_seed)?;
    Ok(())
}

/// Makes one disk, and removes it when it is measured.
fn one(way: &mut Way, n: usize, disk: &Path, make: &mut dyn FnMut() -> Result<()>) -> Result<()> {
    let began = Instant::now();
    make()?;
    let took = began.elapsed();
    if n > 0 {
        way.times.push(took);
        way.taken.push_bytes(unshared(disk)?);
    }
    std::fs::remove_file(disk)?;
    Ok(())
}

/// The bytes on disk of a file that no other file shares, by its map (`FIEMAP`); all of its blocks where there is none.
fn unshared(disk: &Path) -> Result<u64> {
    // What is not written yet has no place.
    std::fs::File::open(disk)?.sync_all()?;
    let all = std::fs::metadata(disk)?.blocks() * 512;
    let output = Command::new("filefrag").arg("-v").arg(disk).output()?;
    if !output.status.success() {
        return Ok(all);
    }
    // `   0:        0..     511:       2144..      2655:    512:             last,shared,eof`, in blocks of 4 KiB.
    let shared: u64 = String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter(|line| line.contains("shared"))
        .filter_map(|line| line.split(':').nth(3)?.trim().parse::<u64>().ok())
        .sum();
    Ok(all.saturating_sub(shared * 4096))
}

/// What the growth costs in the guest, which ours leaves to it: a VM whose work disk has the seed's size beside one of 20 GiB.
fn in_guests(daemon: &Daemon) -> Result<()> {
    let mut sizes = [
        ("10g", Samples::new(), Samples::new()),
        ("20g", Samples::new(), Samples::new()),
    ];
    let mut taken = Samples::of(Unit::KiB);
    for n in 0..VMS {
        for (size, host, guest) in &mut sizes {
            let name = format!("seeds-{size}-{n}");
            daemon.ok(&[
                "run", "--name", &name, "--memory", "256m", "--work", size, IMAGE, "true",
            ])?;
            let details = daemon.inspect(&name)?;
            host.push(stage(&details, "work.prepare")?);
            guest.push(stage(&details, "guest.work-disk")?);
            if *size == "20g" {
                let directory = details["directory"].as_str().context("no directory")?;
                taken.push_bytes(unshared(&Path::new(directory).join("work.ext4"))?);
            }
            daemon.ok(&["rm", &name])?;
        }
    }
    println!("the work disk in the life of a VM that ran `true`");
    for (size, host, guest) in &sizes {
        host.print(&format!("{size}: on the host"));
        guest.print(&format!("{size}: mounted and grown in the guest"));
    }
    taken.print("20g: what it takes afterwards");
    println!();
    Ok(())
}

fn stage(details: &serde_json::Value, name: &str) -> Result<Duration> {
    let stages = details["timings"].as_array().context("no timings")?;
    let found = stages.iter().find(|stage| stage["stage"] == name);
    let us = found.and_then(|stage| stage["duration_us"].as_u64());
    Ok(Duration::from_micros(
        us.with_context(|| format!("no stage {name}"))?,
    ))
}

/// A file system on a loop file; unmounted when dropped.
struct OnLoop(PathBuf);

impl OnLoop {
    fn xfs(dir: &Path) -> Result<Self> {
        let file = dir.with_extension("img");
        std::fs::create_dir(dir)?;
        let script = format!(
            "truncate -s {LOOP_MIB}M \"$0\" && mkfs.xfs -q -m reflink=1 \"$0\" && mount -o loop \"$0\" \"$1\""
        );
        shell(&script, &[&file, dir])?;
        Ok(Self(dir.to_owned()))
    }
}

impl Drop for OnLoop {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// Runs a script whose `$0` and `$1` are these.
fn shell(script: &str, paths: &[&Path]) -> Result<()> {
    let output = Command::new("sh")
        .args(["-ec", script])
        .args(paths)
        .stdin(Stdio::null())
        .output()?;
    if !output.status.success() {
        bail!("{script}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
