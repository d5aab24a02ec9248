//! The disks that take a VM's writes: bounded, each for itself, and thin again when files go.

use std::path::PathBuf;

use offshoot_e2e::{Daemon, IMAGE, allocated, wait_until};

const MIB: u64 = 1 << 20;
/// The smallest disk there is, MiB.
const SIZE: u64 = 64;

/// Writes until nothing more goes in.
fn fill(path: &str) -> String {
    format!("dd if=/dev/urandom of={path} bs=64k")
}

#[test]
fn a_full_disk_is_full_for_its_vm_alone() {
    let daemon = Daemon::start();
    let size = format!("{SIZE}m");
    daemon.start_all(&[
        vec![
            "--name", "full", "--memory", "256m", "--disk", &size, "--work", &size, IMAGE, "sleep", "1000",
        ],
        vec!["--name", "neighbour", "--memory", "256m", IMAGE, "sleep", "1000"],
    ]);
    let own = PathBuf::from(daemon.inspect("full")["directory"].as_str().unwrap());
    let everything = allocated(&daemon.data());
    for file in ["/fill", "/root/fill"] {
        let mut filling = daemon.cli(["exec", "full", "sh", "-c", &fill(file)]).spawn();
        let mut answers = 0;
        while filling.try_wait().unwrap().is_none() {
            // The neighbour goes on.
            daemon.ok(["exec", "neighbour", "sh", "-c", "echo still here >>/root/log"]);
            answers += 1;
        }
        assert!(answers > 0, "{file} was filled too fast to look aside");
        let output = filling.wait_with_output().unwrap();
        let said = offshoot_e2e::text(&output.stderr);
        assert!(said.contains("No space left on device"), "{file}: {said}");
        // It is the disk's own size that ended it: `/` being full leaves `/root` as it was.
        let filled: u64 = daemon
            .ok(["exec", "full", "stat", "-c", "%s", file])
            .parse()
            .unwrap();
        assert!((SIZE / 2 * MIB..SIZE * MIB).contains(&filled), "{file}: {filled}");
    }
    daemon.ok(["exec", "full", "sync"]);
    for disk in ["overlay.ext4", "work.ext4"] {
        let taken = allocated(&own.join(disk));
        assert!(
            (SIZE / 2 * MIB..=SIZE * MIB + MIB).contains(&taken),
            "{disk} takes {taken}"
        );
    }
    let grown = allocated(&daemon.data()).saturating_sub(everything);
    assert!(grown < 2 * SIZE * MIB + 16 * MIB, "the host lost {grown} bytes");
    let details = daemon.inspect("full");
    let told = details["disk_bytes"].as_u64().unwrap();
    assert!(told.abs_diff(allocated(&own)) < 2 * MIB, "{told}");
    assert_eq!(daemon.ok(["exec", "full", "echo", "alive"]), "alive");

    // What is deleted in the guest the host has back.
    daemon.ok(["exec", "full", "sh", "-c", "rm /fill /root/fill; sync"]);
    wait_until("the blocks to come back", || {
        ["overlay.ext4", "work.ext4"]
            .iter()
            .all(|disk| allocated(&own.join(disk)) < 8 * MIB)
    });
    daemon.ok([
        "exec",
        "full",
        "sh",
        "-c",
        "echo room >/again; echo room >/root/again",
    ]);
    daemon.finish();
}

#[test]
fn a_copy_that_does_not_fit_is_refused() {
    let daemon = Daemon::start();
    let error = daemon
        .cli(["run", "--rm", "--root", "copy", "--disk", "64m", IMAGE, "true"])
        .fails(1);
    assert!(error.contains("hint: ") && error.contains("--disk"), "{error}");
    assert_eq!(daemon.ok(["ps", "-aq"]), "", "it left a VM");
    daemon.finish();
}
