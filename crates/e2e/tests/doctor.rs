//! `doctor` on hosts that are well and on hosts that are not. No VM runs here.

use std::fs::Permissions;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use offshoot_e2e::{Daemon, IMAGE, agent, names, text};
use serde_json::Value;

/// Every id that there is.
const DOCUMENT: &str = include_str!("../../../docs/doctor.md");

/// Runs `doctor --output json` with more words; gives its exit status and what it printed.
fn doctor(daemon: &Daemon, words: &[&str]) -> (i32, Value) {
    let words = [&["doctor", "--output", "json"], words].concat();
    let output = daemon.cli(words).run();
    let report = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}{}", text(&output.stdout), text(&output.stderr)));
    (output.status.code().expect("an exit status"), report)
}

/// The findings of a report with this id.
fn found<'a>(report: &'a Value, id: &str) -> Vec<&'a Value> {
    let findings = report["findings"].as_array().expect("findings");
    findings.iter().filter(|found| found["id"] == id).collect()
}

/// The one finding with this id, which must be this bad.
fn one<'a>(report: &'a Value, id: &str, severity: &str) -> &'a Value {
    let found = found(report, id);
    assert_eq!(found.len(), 1, "{id}: {report:#}");
    assert_eq!(found[0]["severity"], severity, "{:#}", found[0]);
    found[0]
}

/// Every finding is whole: it has an id, and where it is not well, a cost and a hint.
fn whole(report: &Value) {
    let findings = report["findings"].as_array().expect("findings");
    assert!(findings.len() > 10, "{report:#}");
    for found in findings {
        let says = |key: &str| !found[key].as_str().unwrap_or_default().is_empty();
        assert!(says("id") && says("capability") && says("message"), "{found:#}");
        let id = found["id"].as_str().unwrap_or_default();
        let kebab = id
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
        assert!(kebab, "{id} is not kebab-case");
        assert!(
            DOCUMENT.contains(&format!("`{id}`")),
            "docs/doctor.md does not know {id}"
        );
        if found["severity"] != "ok" {
            assert!(says("cost") && says("hint"), "{found:#}");
        }
    }
}

fn failures(report: &Value) -> Vec<&Value> {
    let findings = report["findings"].as_array().expect("findings");
    findings
        .iter()
        .filter(|found| found["severity"] == "failure")
        .collect()
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().mode() & 0o777
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

#[test]
fn a_host_that_is_well() {
    let daemon = Daemon::start();
    let (status, report) = doctor(&daemon, &[]);
    whole(&report);
    assert_eq!(failures(&report), [&Value::Null; 0], "{report:#}");
    assert_eq!(status, 0);
    for id in [
        "disk-room",
        "bases-whole",
        "kernel",
        "qemu-found",
        "database",
        "modes",
        "leftovers-none",
    ] {
        one(&report, id, "ok");
    }
    // Each part of the host is looked at, whatever it says.
    for part in [
        "folders", "root", "overlay", "work", "mounts", "kernel", "vmm", "agent", "clock", "network", "tools",
    ] {
        let findings = report["findings"].as_array().unwrap();
        assert!(
            findings.iter().any(|found| found["capability"] == part),
            "{part}: {report:#}"
        );
    }
    // The table says the same, and a fix of nothing does nothing.
    let table = daemon.ok(["doctor"]);
    assert!(
        table.contains("\n  ok       ") && table.contains("0 failures, "),
        "{table}"
    );
    let (status, report) = doctor(&daemon, &["--fix"]);
    assert_eq!(
        (status, &report["fixes"]),
        (0, &Value::Array(Vec::new())),
        "{report:#}"
    );
    whole(&report);
    assert!(daemon.ok(["doctor", "--fix"]).starts_with("Nothing was mended\n"));
    daemon.finish();
}

#[test]
fn a_daemon_with_nothing_in_it() {
    let daemon = Daemon::start_empty();
    let (status, report) = doctor(&daemon, &[]);
    whole(&report);
    let kernel = one(&report, "kernel-missing", "failure");
    assert!(
        kernel["hint"]
            .as_str()
            .unwrap()
            .contains("offshoot kernel add --distro"),
        "{kernel:#}"
    );
    assert_eq!(status, 1);
    daemon.finish();
}

#[test]
fn a_wrong_qemu_and_no_virtiofsd() {
    let settings = "qemu = \"/no/such/qemu\"\nvirtiofsd = \"/no/such/virtiofsd\"";
    let daemon = Daemon::start_with(settings);
    let (status, report) = doctor(&daemon, &[]);
    whole(&report);
    let vmm = one(&report, "vmm-missing", "failure");
    assert!(
        vmm["message"].as_str().unwrap().contains("/no/such/qemu"),
        "{vmm:#}"
    );
    one(&report, "virtiofsd-missing", "warning");
    assert_eq!(status, 1);
    let table = daemon.cli(["doctor"]).run();
    let table = text(&table.stdout);
    assert!(
        table.contains("  FAILURE  `/no/such/qemu` is not installed [vmm-missing]\n"),
        "{table}"
    );
    daemon.finish();
}

#[test]
fn a_base_without_its_work_seed_is_made_again() {
    let daemon = Daemon::start();
    let bases = daemon.data().join("bases");
    let base = bases.join(&names(&bases)[0]);
    std::fs::remove_file(base.join("work-seed.ext4")).unwrap();
    daemon.ok(["create", "--name", "late", IMAGE, "true"]);
    // Whoever creates a VM makes the base again; the second damage finds a VM that needs it.
    one(&doctor(&daemon, &[]).1, "bases-whole", "ok");
    std::fs::remove_file(base.join("work-seed.ext4")).unwrap();
    let (status, report) = doctor(&daemon, &[]);
    whole(&report);
    let damaged = one(&report, "base-damaged", "warning");
    assert!(
        damaged["cost"]
            .as_str()
            .unwrap()
            .contains("`late` cannot be started"),
        "{damaged:#}"
    );
    assert_eq!(status, 0, "other VMs run: {report:#}");
    let (status, report) = doctor(&daemon, &["--fix"]);
    assert_eq!(status, 0, "{report:#}");
    assert_eq!(report["fixes"][0]["fix"], "prepare-bases", "{report:#}");
    assert_eq!(
        report["fixes"][0]["done"].as_array().unwrap().len(),
        1,
        "{report:#}"
    );
    assert!(base.join("work-seed.ext4").exists());
    let (_, report) = doctor(&daemon, &[]);
    assert_eq!(found(&report, "base-damaged").len(), 0, "{report:#}");
    daemon.ok(["image", "verify", IMAGE]);
    daemon.finish();
}

#[test]
fn a_base_that_cannot_be_made_again() {
    let daemon = Daemon::start();
    let (bases, blobs) = (daemon.data().join("bases"), daemon.data().join("blobs/sha256"));
    std::fs::remove_file(bases.join(&names(&bases)[0]).join("work-seed.ext4")).unwrap();
    let layer = names(&blobs).into_iter().map(|name| blobs.join(name));
    let layer = layer
        .max_by_key(|blob| std::fs::metadata(blob).unwrap().len())
        .unwrap();
    std::fs::remove_file(layer).unwrap();
    let output = daemon.cli(["doctor", "--fix"]).run();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(
        text(&output.stderr).starts_with("error: cannot prepare image "),
        "{output:?}"
    );
    assert!(
        text(&output.stdout).starts_with("Nothing was mended\n"),
        "{output:?}"
    );
    one(&doctor(&daemon, &[]).1, "base-damaged", "warning");
    daemon.finish();
}

#[test]
fn a_base_that_a_vm_needs_and_is_gone() {
    let daemon = Daemon::start();
    daemon.ok(["create", "--name", "orphan", IMAGE, "true"]);
    daemon.forget_bases();
    let (_, report) = doctor(&daemon, &[]);
    let missing = one(&report, "base-missing", "warning");
    assert!(
        missing["hint"]
            .as_str()
            .unwrap()
            .contains(&format!("--force {IMAGE}")),
        "{missing:#}"
    );
    // The start says the same.
    let error = daemon.cli(["start", "orphan"]).fails(1);
    assert!(
        error.contains(&format!(
            "hint: make it again with `offshoot image prepare --force {IMAGE}`"
        )),
        "{error}"
    );
    doctor(&daemon, &["--fix"]);
    assert_eq!(found(&doctor(&daemon, &[]).1, "base-missing").len(), 0);
    daemon.finish();
}

/// A VM that could be started, then the host breaks: the start fails, and `doctor` has the finding that explains it, by the
/// capability that fails or one before it.
#[test]
fn what_fails_a_start_is_what_doctor_says() {
    let folder = tempfile::tempdir().unwrap();
    set_mode(folder.path(), 0o755);
    let link = |name: &str, program: &str| {
        let link = folder.path().join(name);
        std::os::unix::fs::symlink(program, &link).unwrap();
        link
    };
    let (qemu, virtiofsd) = (
        link("qemu", "/usr/bin/qemu-system-x86_64"),
        link("virtiofsd", virtiofsd()),
    );
    let settings = format!("qemu = {qemu:?}\nvirtiofsd = {virtiofsd:?}");
    let daemon = Daemon::start_with(&settings);
    let shared = format!("{}:/shared", folder.path().display());
    daemon.ok(["create", "--name", "plain", IMAGE, "true"]);
    daemon.ok(["create", "--name", "sharing", "-v", &shared, IMAGE, "true"]);
    let kernels = daemon.data().join("kernels");
    let away = |path: &Path| {
        let hidden = path.with_extension("away");
        std::fs::rename(path, &hidden).unwrap();
        let path = path.to_owned();
        move || std::fs::rename(&hidden, &path).unwrap()
    };
    let check = |vm: &str, id: &str, severity: &str| {
        let mut error = daemon.cli(["start", vm]).fails(1);
        let (_, report) = doctor(&daemon, &[]);
        whole(&report);
        let found = one(&report, id, severity);
        // A warning explains the start that failed; a failure that was seen refuses the next one.
        if severity == "failure" {
            error = daemon.cli(["start", vm]).fails(1);
        }
        let message = found["message"].as_str().unwrap();
        assert!(error.contains(message), "{message}: {error}");
    };
    let back = away(&virtiofsd);
    check("sharing", "virtiofsd-missing", "warning");
    back();
    let back = away(&qemu);
    check("plain", "vmm-missing", "failure");
    back();
    // There are two when the image's own kernel had the agent of another version.
    let bundles = names(&kernels).into_iter().filter(|name| name != "default");
    let back: Vec<_> = bundles.map(|name| away(&kernels.join(name))).collect();
    check("plain", "kernel-missing", "failure");
    one(&doctor(&daemon, &[]).1, "vm-kernel-unusable", "warning");
    back.into_iter().for_each(|back| back());
    // All is well again.
    let (status, report) = doctor(&daemon, &[]);
    assert_eq!((status, failures(&report).len()), (0, 0), "{report:#}");
    daemon.finish();
}

/// Where this machine has it.
fn virtiofsd() -> &'static str {
    let places = [
        "/usr/libexec/virtiofsd",
        "/usr/lib/qemu/virtiofsd",
        "/usr/lib/virtiofsd",
    ];
    let found = places.into_iter().find(|place| Path::new(place).exists());
    found.expect("a virtiofsd is installed")
}

#[test]
fn files_that_others_can_reach_are_closed_again() {
    let daemon = Daemon::start();
    let (database, blobs, socket) = (
        daemon.data().join("offshoot.db"),
        daemon.data().join("blobs"),
        daemon.socket(),
    );
    set_mode(&database, 0o644);
    set_mode(&blobs, 0o755);
    set_mode(&socket, 0o666);
    let (status, report) = doctor(&daemon, &[]);
    whole(&report);
    assert_eq!(found(&report, "mode-unsafe").len(), 3, "{report:#}");
    assert_eq!(status, 1);
    let told = daemon.cli(["doctor"]).run();
    assert!(
        text(&told.stdout).contains("`offshoot doctor --fix` mends 3 of them"),
        "{told:?}"
    );
    let told = daemon.ok(["doctor", "--fix"]);
    assert_eq!(told.matches("mended: changed the mode of ").count(), 3, "{told}");
    assert_eq!(
        [&database, &blobs, &socket].map(|path| mode(path)),
        [0o600, 0o700, 0o660]
    );
    let (status, report) = doctor(&daemon, &[]);
    one(&report, "modes", "ok");
    assert_eq!(status, 0);
    daemon.finish();
}

#[test]
fn a_closed_folder_on_the_way_closes_nothing() {
    let daemon = Daemon::start();
    // VMMs see their own files in a root of their own, wherever these lie.
    set_mode(daemon.root(), 0o700);
    let shared = daemon.root().join("shared");
    std::fs::create_dir(&shared).unwrap();
    let mount = format!("{}:/shared", shared.display());
    daemon.ok(["run", "--rm", IMAGE, "true"]);
    daemon.ok(["run", "--rm", "-v", &mount, IMAGE, "touch", "/shared/x"]);
    assert_eq!(failures(&doctor(&daemon, &[]).1).len(), 0);
    set_mode(daemon.root(), 0o711);
    daemon.finish();
}

#[test]
fn a_disk_that_is_full() {
    let daemon = Daemon::start_on_small_disk(96);
    let (_, report) = doctor(&daemon, &[]);
    one(&report, "disk-low", "warning");
    let ballast = daemon.data().join("ballast");
    std::fs::write(&ballast, vec![1; 92 << 20]).unwrap();
    let (status, report) = doctor(&daemon, &[]);
    whole(&report);
    // The data directory's disk is every capability's; it is told once.
    one(&report, "disk-full", "failure");
    assert_eq!(status, 1);
    std::fs::remove_file(&ballast).unwrap();
    assert_eq!(found(&doctor(&daemon, &[]).1, "disk-full").len(), 0);
    daemon.finish();
}

#[test]
fn leftovers_and_a_long_log_go() {
    let daemon = Daemon::start();
    daemon.ok(["create", "--name", "kept", IMAGE, "true"]);
    let left = [
        daemon.data().join("vms/0123456789abcdef"),
        daemon.root().join("run/vms/0123456789abcdef"),
    ];
    for folder in &left {
        std::fs::create_dir(folder).unwrap();
        std::fs::write(folder.join("overlay.ext4"), "x").unwrap();
    }
    // What SQLite does not know of behind its log is no more than length.
    let log = daemon.data().join("offshoot.db-wal");
    let file = std::fs::File::options().write(true).open(&log).unwrap();
    file.set_len(65 << 20).unwrap();
    let (status, report) = doctor(&daemon, &[]);
    whole(&report);
    let leftovers = one(&report, "leftovers", "warning");
    assert!(
        leftovers["message"]
            .as_str()
            .unwrap()
            .contains("0123456789abcdef"),
        "{leftovers:#}"
    );
    one(&report, "database-log-long", "warning");
    assert_eq!(status, 0, "warnings do not count: {report:#}");
    let (status, report) = doctor(&daemon, &["--fix"]);
    assert_eq!(status, 0, "{report:#}");
    one(&report, "leftovers-none", "ok");
    one(&report, "database-log", "ok");
    one(&report, "database", "ok");
    assert!(left.iter().all(|folder| !folder.exists()));
    assert!(std::fs::metadata(&log).map_or(0, |meta| meta.len()) < 1 << 20);
    assert_eq!(daemon.state("kept"), "created");
    daemon.finish();
}

#[test]
fn a_kernel_with_an_old_agent_is_refreshed() {
    let folder = tempfile::tempdir().unwrap();
    let own = folder.path().join("offshoot-agent");
    std::fs::copy(agent(), &own).unwrap();
    let daemon = Daemon::start_with(&format!("agent = {:?}", own.display().to_string()));
    assert_eq!(found(&doctor(&daemon, &[]).1, "kernel-agent-old").len(), 0);
    // As an update of the package does it, with the daemon still running. A byte behind a program does not harm it.
    let mut bytes = std::fs::read(&own).unwrap();
    bytes.push(0);
    std::fs::write(&own, bytes).unwrap();
    let (status, report) = doctor(&daemon, &[]);
    whole(&report);
    one(&report, "kernel-agent-old", "warning");
    assert_eq!(status, 0);
    let kernels = names(&daemon.data().join("kernels")).len();
    let (status, report) = doctor(&daemon, &["--fix"]);
    assert_eq!(
        (status, &report["fixes"][0]["fix"]),
        (0, &Value::from("refresh-kernel")),
        "{report:#}"
    );
    assert_eq!(found(&report, "kernel-agent-old").len(), 0, "{report:#}");
    assert_eq!(
        names(&daemon.data().join("kernels")).len(),
        kernels + 1,
        "the old one stays for VMs"
    );
    daemon.finish();
}

#[test]
fn a_database_that_is_damaged() {
    let mut daemon = Daemon::start();
    // What the migration of the golden database wrote is in the log until the daemon closes it.
    daemon.terminate();
    daemon.start_again();
    // Behind the first page, which the daemon has read; the tables are there.
    let database = daemon.data().join("offshoot.db");
    let pages = std::fs::metadata(&database).unwrap().len() / 4096;
    assert!(pages > 2, "{pages}");
    let file = std::fs::File::options().write(true).open(&database).unwrap();
    for page in 1..pages {
        file.write_all_at(&[0xff; 2048], page * 4096).unwrap();
    }
    let (status, report) = doctor(&daemon, &[]);
    let damaged = one(&report, "database-damaged", "failure");
    assert!(
        damaged["hint"].as_str().unwrap().contains("offshoot.db"),
        "{damaged:#}"
    );
    assert_eq!(status, 1);
    // It cannot say what is left any more: it is only ended.
    drop(daemon);
}
