//! The other VMMs, with real VMs: the same life as on QEMU.
//!
//! Each is taken from `OFFSHOOT_CLOUD_HYPERVISOR`, `OFFSHOOT_FIRECRACKER` or `PATH`; one that is not there is skipped and
//! named. `OFFSHOOT_KVM_KERNEL` names a `vmlinux` with everything built in, for hosts whose KVM cannot run a distribution's.

use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use offshoot_e2e::{Daemon, IMAGE, tell, text, wait_until};

/// A guest whose kernel is interpreted takes minutes to boot.
const SETTINGS: &str = "boot_timeout_s = 1200";

fn installed(variable: &str, name: &str) -> Option<PathBuf> {
    let named = std::env::var_os(variable).filter(|path| !path.is_empty());
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = || {
        std::env::split_paths(&paths)
            .map(|folder| folder.join(name))
            .find(|path| path.is_file())
    };
    named.map(PathBuf::from).or_else(found)
}

/// Whether a device is open to everybody, or to a group that is not root's own.
fn is_open(device: &str) -> bool {
    std::fs::metadata(device)
        .is_ok_and(|meta| meta.mode() & 0o006 == 0o006 || meta.mode() & 0o060 == 0o060 && meta.gid() != 0)
}

/// A daemon that has the VMM, and the kernel to try it with; `None`, and a word about it, where it cannot be tried.
fn daemon_with(variable: &str, name: &str) -> Option<Daemon> {
    let Some(program) = installed(variable, name) else {
        tell(&format!("SKIPPED: {name} is not installed; {variable} names one"));
        return None;
    };
    if !is_open("/dev/kvm") {
        tell(&format!(
            "SKIPPED: {name} needs a /dev/kvm that is open to unprivileged VMMs"
        ));
        return None;
    }
    let key = name.replace('-', "_");
    let daemon = Daemon::start_with(&format!(
        "{SETTINGS}\n{key} = {:?}",
        program.display().to_string()
    ));
    if let Some(kernel) = std::env::var_os("OFFSHOOT_KVM_KERNEL").and_then(|path| path.into_string().ok()) {
        daemon.ok(["kernel", "add", "--vmlinux", &kernel]);
    }
    let info = daemon.ok(["system", "info"]);
    assert!(info.contains(&format!("{name} ")), "{info}");
    Some(daemon)
}

/// One VM's whole life.
fn lives(daemon: &mut Daemon, vmm: &str, root: &str, network: &str) {
    let vm = format!("{vmm}-{root}");
    let run = [
        "run",
        "-d",
        "--vmm",
        vmm,
        "--root",
        root,
        "--network",
        network,
        "--memory",
        "256m",
        "--name",
    ];
    daemon.ok(run.into_iter().chain([vm.as_str(), IMAGE, "sleep", "100000"]));
    let details = daemon.inspect(&vm);
    assert_eq!(details["vmm"]["chosen"], vmm, "{details}");
    assert_eq!(details["root"]["chosen"], root, "{details}");
    assert_eq!(
        daemon.ok(["exec", &vm, "sh", "-c", "echo in; echo $((6*7))"]),
        "in\n42"
    );
    daemon.cli(["exec", &vm, "sh", "-c", "exit 9"]).fails(9);

    let (there, back) = (daemon.root().join("there"), daemon.root().join("back"));
    let sent: Vec<u8> = (0..200_000u32).flat_map(u32::to_le_bytes).collect();
    std::fs::write(&there, &sent).unwrap();
    daemon.ok(["cp", there.to_str().unwrap(), &format!("{vm}:/root/there")]);
    daemon.ok(["cp", &format!("{vm}:/root/there"), back.to_str().unwrap()]);
    assert!(
        std::fs::read(&back).unwrap() == sent,
        "what comes back is what was sent"
    );
    std::fs::remove_file(&back).unwrap();
    if network != "none" {
        let addresses = daemon.ok(["exec", &vm, "cat", "/proc/net/dev"]);
        assert!(addresses.contains("eth0"), "{addresses}");
    }

    daemon.ok(["pause", &vm]);
    assert_eq!(daemon.state(&vm), "paused");
    daemon.ok(["resume", &vm]);

    // Another daemon goes on with it.
    let pid = details["pid"].clone();
    daemon.kill();
    daemon.start_again();
    assert_eq!(daemon.inspect(&vm)["pid"], pid, "the same process");
    wait_until("the agent to be found again", || {
        daemon.cli(["exec", &vm, "true"]).run().status.success()
    });
    let console = daemon.cli(["logs", "--console", &vm]).run();
    assert!(console.status.success(), "{}", text(&console.stderr));

    daemon.ok(["stop", "-t", "60", &vm]);
    assert_eq!(daemon.state(&vm), "stopped");
    let exit = daemon.inspect(&vm)["exit"].clone();
    assert_eq!(exit["reason"], "stopped", "{exit}");
    daemon.ok(["rm", &vm]);
}

#[test]
fn a_life_on_cloud_hypervisor() {
    let Some(mut daemon) = daemon_with("OFFSHOOT_CLOUD_HYPERVISOR", "cloud-hypervisor") else {
        return;
    };
    lives(&mut daemon, "cloud-hypervisor", "pmem", "default");
    lives(&mut daemon, "cloud-hypervisor", "block", "none");
    daemon.finish();
}

#[test]
fn a_life_on_firecracker() {
    let Some(mut daemon) = daemon_with("OFFSHOOT_FIRECRACKER", "firecracker") else {
        return;
    };
    let network = if is_open("/dev/net/tun") {
        "default"
    } else {
        "none"
    };
    lives(&mut daemon, "firecracker", "pmem", network);
    lives(&mut daemon, "firecracker", "block", "none");
    daemon.finish();
}

#[test]
fn what_a_vmm_cannot_do_is_refused_before_anything_is_made() {
    let daemon = Daemon::start_with("firecracker = \"/nonexistent/firecracker\"");
    let refuse = |arguments: &[&str], words: &[&str]| {
        let error = daemon.cli(arguments.iter().copied()).fails(1);
        for word in words {
            assert!(error.contains(word), "{error:?} does not say {word:?}");
        }
    };
    refuse(
        &["create", "--vmm", "firecracker", IMAGE, "true"],
        &[
            "firecracker",
            "/nonexistent/firecracker",
            "not installed",
            "docs/config.md",
        ],
    );
    assert_eq!(daemon.ok(["ps", "-aq"]), "");
    // Asked for by nobody, it is passed over, and that is told.
    daemon.ok(["create", "--name", "chosen", IMAGE, "true"]);
    let vmm = daemon.inspect("chosen")["vmm"].clone();
    assert_eq!(vmm["chosen"], "qemu");
    let passed_over = vmm["passed_over"].as_array().unwrap();
    let firecracker = passed_over.iter().find(|other| other["name"] == "firecracker");
    let reason = firecracker.unwrap()["reason"].as_str().unwrap();
    assert!(reason.contains("not installed"), "{reason}");
    daemon.ok(["rm", "chosen"]);
    daemon.finish();
}
