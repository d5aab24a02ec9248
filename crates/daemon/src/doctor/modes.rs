//! Who may reach the daemon's own files: nobody who is not meant to.
//!
//! Guests are kept in by their VMM, and a VMM that a guest broke out into by its user: it passes through the data
//! directory and must be able to list, read or write nothing but its own. See `docs/threat-model.md`.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use offshoot_model::{ErrorKind, Finding, Fix, Severity};

use super::database;
use super::fix::Mended;
use crate::app::App;
use crate::blocking::blocking;
use crate::error::{Answer, Failure};

const PART: &str = "files";

/// A file or folder, and the most that its mode may be.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    path: PathBuf,
    most: u32,
    /// What somebody could do who is not meant to.
    cost: &'static str,
}

const IN_FOLDER: &str = "other users, and VMMs that a guest broke out into, can reach what is not theirs";
const IN_DATABASE: &str =
    "other users, and VMMs that a guest broke out into, can read what VMs were told, passwords included";
const AT_SOCKET: &str = "users outside of the daemon's group can rule the daemon, and with it this host";

fn rules(data_dir: &Path, run_dir: &Path, socket: &Path) -> Vec<Rule> {
    let rule = |path: PathBuf, most, cost| Rule { path, most, cost };
    let mut rules = vec![
        rule(data_dir.to_owned(), 0o710, IN_FOLDER),
        rule(run_dir.to_owned(), 0o711, IN_FOLDER),
        rule(run_dir.join("vms"), 0o710, IN_FOLDER),
        rule(socket.to_owned(), 0o660, AT_SOCKET),
    ];
    for (names, most) in [
        (&["bases", "kernels", "vms"][..], 0o710),
        (&["blobs", "downloads", "tmp", "locks"], 0o700),
    ] {
        rules.extend(
            names
                .iter()
                .map(|name| rule(data_dir.join(name), most, IN_FOLDER)),
        );
    }
    let files = database::files(data_dir).into_iter();
    rules.extend(files.map(|file| rule(file, 0o600, IN_DATABASE)));
    rules
}

/// What a file is.
#[derive(Clone, Copy, Debug)]
struct Found {
    mode: u32,
    uid: u32,
}

/// What is there of the rules' files.
fn look(rules: Vec<Rule>) -> Vec<(Rule, Found)> {
    let found = |rule: Rule| {
        let meta = std::fs::metadata(&rule.path).ok()?;
        let found = Found {
            mode: meta.mode() & 0o7777,
            uid: meta.uid(),
        };
        Some((rule, found))
    };
    rules.into_iter().filter_map(found).collect()
}

fn rules_of(app: &App) -> Vec<Rule> {
    rules(&app.data_dir, &app.run_dir, &app.socket)
}

/// A failure for each file that somebody can reach who should not.
pub(super) async fn check(app: &App) -> Vec<Finding> {
    let rules = rules_of(app);
    match blocking("looking at modes", move || Ok(look(rules))).await {
        Ok(found) => judge(&found, rustix::process::geteuid().as_raw()),
        Err(Failure(error)) => vec![
            Finding::new(PART, Severity::Warning, error.message, "look at the daemon's log")
                .id("modes-unknown")
                .cost("files that others can reach stay unseen"),
        ],
    }
}

fn judge(found: &[(Rule, Found)], us: u32) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (rule, found) in found {
        let place = rule.path.display();
        if found.mode & !rule.most & 0o777 != 0 {
            let message = format!("{place} has mode {:04o}, more than {:04o}", found.mode, rule.most);
            let hint = format!(
                "offshoot doctor --fix, or chmod {:04o} {place}",
                found.mode & rule.most
            );
            findings.push(
                Finding::new(PART, Severity::Failure, message, hint)
                    .id("mode-unsafe")
                    .cost(rule.cost)
                    .fix(Fix::TightenModes),
            );
        }
        if found.uid != us {
            let message = format!("{place} belongs to user {}", found.uid);
            findings.push(
                Finding::new(PART, Severity::Failure, message, format!("chown {us} {place}"))
                    .id("owner-foreign")
                    .cost("that user can give everybody access to it"),
            );
        }
    }
    if findings.is_empty() {
        let message = format!(
            "{} files and folders of its own are closed to others",
            found.len()
        );
        findings.push(Finding::ok(PART, message).id("modes"));
    }
    findings
}

/// Takes the rights away that nobody should have.
pub(super) async fn tighten(app: &App) -> Answer<Mended> {
    let rules = rules_of(app);
    blocking("tightening modes", move || Ok(tighten_all(look(rules)))).await
}

fn tighten_all(found: Vec<(Rule, Found)>) -> Mended {
    let mut mended = Mended::default();
    for (rule, Found { mode, .. }) in found {
        let (place, tight) = (rule.path.display(), mode & (rule.most | 0o7000));
        if tight == mode {
            continue;
        }
        match std::fs::set_permissions(&rule.path, std::fs::Permissions::from_mode(tight)) {
            Ok(()) => mended.did(format!(
                "changed the mode of {place} from {mode:04o} to {tight:04o}"
            )),
            Err(error) => {
                let message = format!("cannot change the mode of {place}: {error}");
                let failure = Failure::new(ErrorKind::Internal, message);
                mended.could_not(failure.hint(format!("chmod {tight:04o} {place}")));
            }
        }
    }
    mended
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(path: &str, most: u32) -> Rule {
        Rule {
            path: path.into(),
            most,
            cost: IN_FOLDER,
        }
    }

    #[test]
    fn more_rights_than_allowed_are_a_failure() {
        let check = |mode, most, uid, expected: &[&str]| {
            let findings = judge(&[(rule("/d", most), Found { mode, uid })], 0);
            let ids: Vec<_> = findings.iter().map(|found| found.id.as_str()).collect();
            assert_eq!(ids, expected, "{mode:o} {most:o}");
        };
        check(0o600, 0o600, 0, &["modes"]);
        check(0o400, 0o600, 0, &["modes"]);
        check(0o640, 0o600, 0, &["mode-unsafe"]);
        check(0o604, 0o600, 0, &["mode-unsafe"]);
        check(0o720, 0o710, 0, &["mode-unsafe"]);
        check(0o710, 0o710, 1000, &["owner-foreign"]);
        check(0o777, 0o710, 1000, &["mode-unsafe", "owner-foreign"]);
        let unsafe_one = &judge(&[(rule("/d", 0o710), Found { mode: 0o755, uid: 0 })], 0)[0];
        assert_eq!(
            (unsafe_one.severity, unsafe_one.fix),
            (Severity::Failure, Some(Fix::TightenModes))
        );
        assert!(unsafe_one.hint.contains("chmod 0710 /d"), "{unsafe_one:?}");
    }

    #[test]
    fn only_rights_are_taken_and_none_given() {
        let dir = tempfile::tempdir().unwrap();
        let set = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o7777;
        let (open, closed) = (dir.path().join("open"), dir.path().join("closed"));
        for (path, bits) in [(&open, 0o644), (&closed, 0o400)] {
            std::fs::write(path, "").unwrap();
            set(path, bits);
        }
        let rules = || {
            let missing = dir.path().join("missing");
            [&open, &closed, &missing]
                .map(|path| rule(path.to_str().unwrap(), 0o600))
                .into()
        };
        let lines = |mended: Mended| mended.outcome(Fix::TightenModes).done;
        let done = lines(tighten_all(look(rules())));
        assert_eq!(done.len(), 1, "{done:?}");
        assert!(done[0].contains("open from 0644 to 0600"), "{done:?}");
        assert_eq!((mode(&open), mode(&closed)), (0o600, 0o400));
        assert_eq!(lines(tighten_all(look(rules()))), [""; 0]);
    }

    #[test]
    fn database_and_socket_are_among_the_rules() {
        let rules = rules(Path::new("/d"), Path::new("/r"), Path::new("/s/api.sock"));
        let most = |path: &str| {
            rules
                .iter()
                .find(|rule| rule.path == Path::new(path))
                .map(|rule| rule.most)
        };
        assert_eq!(most("/d/offshoot.db"), Some(0o600));
        assert_eq!(most("/d/offshoot.db-wal"), Some(0o600));
        assert_eq!(most("/s/api.sock"), Some(0o660));
        assert_eq!(most("/d"), Some(0o710));
    }
}
