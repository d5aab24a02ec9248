//! What this host needs to compile Linux, and lacks.
//!
//! Looked for before anything is downloaded: make would tell of the first missing program after minutes, and of a missing
//! library in the words of the compiler.

use std::io;
use std::process::Stdio;

use tokio::process::Command;

/// Programs that a build of our configuration runs, and the Debian package of each (Linux's
/// Documentation/process/changes.rst; the last three are what it is run with).
const PROGRAMS: [(&str, &str); 12] = [
    ("gcc", "gcc"),
    ("ld", "binutils"),
    ("make", "make"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("perl", "perl-base"),
    ("awk", "mawk"),
    ("gzip", "gzip"),
    ("unshare", "util-linux"),
    ("setpriv", "util-linux"),
    ("nice", "coreutils"),
];
/// Headers that programs of the source itself are compiled with.
const HEADERS: [(&str, &str, &str); 2] = [
    ("stdio.h", "the C library's headers", "libc6-dev"),
    ("libelf.h", "libelf", "libelf-dev"),
];
/// The longest first line of `gcc --version`.
const VERSION_MAX: usize = 120;

/// Something that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    /// What people call it.
    pub name: &'static str,
    /// The Debian package that has it.
    pub package: &'static str,
}

/// All that is missing; empty where a kernel can be compiled.
pub(crate) async fn missing() -> io::Result<Vec<Missing>> {
    let mut missing = absent(|name| offshoot_sys::programs::find(name).is_some());
    if missing.iter().any(|missing| missing.name == "gcc") {
        // Without it there is no telling which headers there are, and it brings the first.
        return Ok(missing);
    }
    for (header, name, package) in HEADERS {
        if !has_header(header).await? {
            missing.push(Missing { name, package });
        }
    }
    Ok(missing)
}

fn absent(is_there: impl Fn(&str) -> bool) -> Vec<Missing> {
    PROGRAMS
        .into_iter()
        .filter(|(name, _)| !is_there(name))
        .map(|(name, package)| Missing { name, package })
        .collect()
}

async fn has_header(header: &str) -> io::Result<bool> {
    let status = Command::new("gcc")
        .args(["-x", "c", "-fsyntax-only", "-include", header, "/dev/null"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .status()
        .await?;
    Ok(status.success())
}

/// The command that brings what is missing.
pub(crate) fn remedy(missing: &[Missing]) -> String {
    let mut packages: Vec<_> = missing.iter().map(|missing| missing.package).collect();
    packages.dedup();
    format!(
        "run `apt-get install --no-install-recommends {}`",
        packages.join(" ")
    )
}

/// What the compiler calls itself: `gcc (Debian 12.2.0-14+deb12u1) 12.2.0`.
pub(crate) async fn compiler() -> io::Result<String> {
    let output = Command::new("gcc")
        .arg("--version")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().next().unwrap_or_default();
    Ok(line
        .chars()
        .filter(|c| !c.is_control())
        .take(VERSION_MAX)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_comes_with_its_package() {
        let lacks = absent(|name| !["flex", "bison", "unshare", "setpriv"].contains(&name));
        let names: Vec<_> = lacks.iter().map(|missing| missing.name).collect();
        assert_eq!(names, ["flex", "bison", "unshare", "setpriv"]);
        assert_eq!(
            remedy(&lacks),
            "run `apt-get install --no-install-recommends flex bison util-linux`"
        );
        assert_eq!(absent(|_| true), []);
    }

    #[tokio::test]
    #[expect(clippy::print_stderr, reason = "a skipped test says so")]
    async fn a_header_is_there_or_not() {
        if offshoot_sys::programs::find("gcc").is_none() {
            eprintln!("SKIPPED: there is no gcc");
            return;
        }
        assert!(!has_header("no-such-header.h").await.unwrap());
        assert!(compiler().await.unwrap().contains("gcc"));
    }
}
