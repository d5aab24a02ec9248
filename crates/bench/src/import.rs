//! An archive to a root image: ours against `skopeo copy`, `umoci unpack` and `mkfs.erofs`.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use crate::daemon::Daemon;
use crate::samples::{Samples, compare};

/// Imports the same docker-save archive in both ways, by turns.
pub(crate) fn against_the_usual_tools(daemon: &Daemon, runs: usize) -> Result<()> {
    let scratch = daemon.scratch().to_owned();
    let archive = scratch.join("image.tar");
    save(daemon, &archive)?;
    let size = std::fs::metadata(&archive)?.len() >> 20;
    let path = archive.to_str().context("a path in UTF-8")?;
    let (mut ours, mut theirs) = (Samples::new(), Samples::new());
    for n in 0..=runs {
        let began = Instant::now();
        daemon.ok(&["image", "import", "--name", "bench:import", path])?;
        let our_time = began.elapsed();
        daemon.ok(&["image", "rm", "bench:import"])?;

        let work = scratch.join("usual");
        let _ = std::fs::remove_dir_all(&work);
        std::fs::create_dir(&work)?;
        let began = Instant::now();
        usual(path, &work)?;
        let their_time = began.elapsed();
        // The first of each warms the caches.
        if n > 0 {
            ours.push(our_time);
            theirs.push(their_time);
        }
    }
    println!("import and prepare of a docker-save archive of {size} MiB");
    compare(
        "offshoot image import",
        &ours,
        "skopeo + umoci + mkfs.erofs",
        &theirs,
    );
    println!("  aim: faster\n");
    Ok(())
}

/// The golden image as `docker save` would give it, made of a plain tar by skopeo and umoci.
fn save(daemon: &Daemon, archive: &Path) -> Result<()> {
    let scratch = daemon.scratch();
    let rootfs = scratch.join("rootfs.tar");
    // A root file system imported as it is keeps its tar as the one layer: the largest blob.
    let blobs = daemon.data().join("blobs/sha256");
    let mut largest = (0, None);
    for entry in std::fs::read_dir(&blobs)? {
        let entry = entry?;
        let size = entry.metadata()?.len();
        if size > largest.0 {
            largest = (size, Some(entry.path()));
        }
    }
    std::fs::copy(largest.1.context("no layer")?, &rootfs)?;
    let layout = scratch.join("saved");
    shell(&format!(
        "umoci init --layout {layout} && umoci new --image {layout}:x && umoci raw add-layer --image {layout}:x {rootfs} && skopeo --insecure-policy copy -q oci:{layout}:x docker-archive:{archive}:bench:import",
        layout = layout.display(),
        rootfs = rootfs.display(),
        archive = archive.display(),
    ))
}

fn usual(archive: &str, work: &Path) -> Result<()> {
    let work = work.display();
    shell(&format!(
        "skopeo --insecure-policy copy -q docker-archive:{archive} oci:{work}/layout:x && umoci unpack --image {work}/layout:x {work}/bundle && mkfs.erofs -E noinline_data {work}/root.erofs {work}/bundle/rootfs && sync -f {work}/root.erofs"
    ))
}

fn shell(script: &str) -> Result<()> {
    let output = Command::new("sh")
        .args(["-ec", script])
        .stdin(Stdio::null())
        .output()?;
    if !output.status.success() {
        bail!("{script}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
