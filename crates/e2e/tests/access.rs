//! Who may use the daemon: root, and one group. Everybody else is told how to become one of them.

use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

use offshoot_e2e::{Daemon, bin_dir, text};

const NOBODY: &str = "65534";

/// `offshoot ps` as nobody, in these groups.
fn ps_as_nobody(daemon: &Daemon, groups: &str) -> Output {
    // Wherever this project lies, somebody else may not be able to go there.
    let program = daemon.root().join("offshoot");
    if !program.exists() {
        // Not by this process: a child of another test would hold the copy open for writing, and it could not be executed.
        let copied = Command::new("cp")
            .arg(bin_dir().join("offshoot"))
            .arg(&program)
            .status();
        assert!(copied.expect("cp").success());
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    }
    Command::new("setpriv")
        .args(["--reuid", NOBODY, "--regid", NOBODY, "--groups", groups])
        .arg(program)
        .args(["ps", "--output", "json", "--socket"])
        .arg(daemon.socket())
        .output()
        .expect("setpriv (util-linux)")
}

#[test]
fn a_user_outside_the_group_is_told_which_one_it_is() {
    // Debian's group 100, with no members.
    let daemon = Daemon::start_empty_with("socket_group = \"users\"");
    let denied = ps_as_nobody(&daemon, NOBODY);
    let error = text(&denied.stderr);
    assert_eq!(denied.status.code(), Some(3), "{error}");
    assert!(error.starts_with("error: cannot reach the daemon at "), "{error}");
    assert!(error.contains("caused by: Permission denied"), "{error}");
    assert!(
        error.contains("hint: ") && error.contains("usermod -aG users"),
        "{error}"
    );

    let allowed = ps_as_nobody(&daemon, "100");
    assert!(allowed.status.success(), "{}", text(&allowed.stderr));
    assert_eq!(text(&allowed.stdout).trim(), "[]");
    daemon.finish();
}

#[test]
fn without_a_group_only_root_gets_in() {
    let daemon = Daemon::start_empty_with("socket_group = \"no-such-group-here\"");
    let denied = ps_as_nobody(&daemon, NOBODY);
    let error = text(&denied.stderr);
    assert_eq!(denied.status.code(), Some(3), "{error}");
    assert!(
        error.contains("hint: run this as root") && error.contains("socket_group"),
        "{error}"
    );
    assert_eq!(daemon.ok(["ps", "-q"]), "");
    daemon.finish();
}
