//! `net dns --install`: what it writes on a host with systemd-resolved, and what it leaves alone on one without.

use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

use serde_json::json;

use crate::fake::{Fake, answer, not_found, text};

fn daemon() -> Fake {
    Fake::start(|line, _| match line {
        "GET /v1/dns" => answer(
            200,
            &json!({"domain": "vm.internal", "upstreams": ["9.9.9.9:53"], "upstream_source": "/etc/resolv.conf",
                "servers": [{"network": "default", "ipv4": "10.87.0.1", "ipv6": "fd00::1", "subnet": "10.87.0.0/24",
                    "reverse": ["0.87.10.in-addr.arpa"], "listening": true}]}),
        ),
        _ => not_found("nothing"),
    })
}

/// Runs it where `/etc` is a folder of the test and the only programs are the test's, which write down how they are called.
fn run(fake: &Fake, words: &[&str]) -> Output {
    let offshoot = fake.offshoot(words);
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--propagation", "private", "sh", "-c"])
        .arg("mount --bind etc /etc && PATH=$PWD/bin exec \"$@\"")
        .args(["sh".as_ref(), offshoot.get_program()])
        .args(offshoot.get_args())
        .current_dir(offshoot.get_current_dir().unwrap())
        .env("OFFSHOOT_SOCKET", fake.path("api.sock"));
    command.output().unwrap()
}

fn program(fake: &Fake, name: &str, status: u8) {
    let path = fake.path("bin").join(name);
    let calls = fake.path("calls");
    let script = format!(
        "#!/bin/sh\necho {name} \"$@\" >> {}\nexit {status}\n",
        calls.display()
    );
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
}

fn calls(fake: &Fake) -> String {
    std::fs::read_to_string(fake.path("calls")).unwrap_or_default()
}

fn host() -> Option<Fake> {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: net dns --install: needs root, to show it another /etc");
        return None;
    }
    let fake = daemon();
    std::fs::create_dir(fake.path("etc")).unwrap();
    std::fs::create_dir(fake.path("bin")).unwrap();
    Some(fake)
}

#[test]
fn systemd_resolved_is_wired_and_unwired() {
    let Some(fake) = host() else { return };
    program(&fake, "resolvectl", 0);
    program(&fake, "systemctl", 0);
    let file = fake.path("etc/systemd/resolved.conf.d/offshoot.conf");
    let done = run(&fake, &["net", "dns", "--install"]);
    assert_eq!(done.status.code(), Some(0), "{}", text(&done.stderr));
    let written = std::fs::read_to_string(&file).unwrap();
    assert!(
        written.ends_with("[Resolve]\nDNS=10.87.0.1\nDomains=~vm.internal ~0.87.10.in-addr.arpa\n"),
        "{written}"
    );
    assert!(calls(&fake).ends_with("systemctl reload-or-restart systemd-resolved\n"));
    let shown = run(&fake, &["net", "dns"]);
    let shown = text(&shown.stdout);
    assert!(
        shown.contains("This host:    systemd-resolved asks here\n"),
        "{shown}"
    );

    let done = run(&fake, &["net", "dns", "--uninstall"]);
    assert_eq!(done.status.code(), Some(0), "{}", text(&done.stderr));
    assert!(!file.exists());
    let again = run(&fake, &["net", "dns", "--uninstall"]);
    assert!(text(&again.stdout).contains("nothing was changed"));
    assert_eq!(again.status.code(), Some(0));
}

#[test]
fn a_reload_that_fails_is_told() {
    let Some(fake) = host() else { return };
    program(&fake, "resolvectl", 0);
    program(&fake, "systemctl", 1);
    let done = run(&fake, &["net", "dns", "--install"]);
    assert_eq!(done.status.code(), Some(1));
    let said = text(&done.stderr);
    assert!(
        said.contains("hint: run `systemctl reload-or-restart systemd-resolved`"),
        "{said}"
    );
}

#[test]
fn without_systemd_resolved_nothing_is_changed() {
    let Some(fake) = host() else { return };
    // Installed, and not running.
    program(&fake, "resolvectl", 1);
    let done = run(&fake, &["net", "dns", "--install"]);
    assert_eq!(done.status.code(), Some(0), "{}", text(&done.stderr));
    let said = text(&done.stdout);
    assert!(said.contains("server=/vm.internal/10.87.0.1\n"), "{said}");
    assert_eq!(std::fs::read_dir(fake.path("etc")).unwrap().count(), 0);
}
