//! Which virtiofsd is installed: the first that exists is asked for its version. The reading is pure.

use std::path::{Path, PathBuf};

use crate::ask::{ask, not_understood, version_numbers};
use crate::driver::ProbeError;

/// Where distributions put it: Debian 13 and Fedora, Debian 12, Arch.
pub const DEFAULT_PROGRAMS: [&str; 3] = [
    "/usr/libexec/virtiofsd",
    "/usr/lib/qemu/virtiofsd",
    "/usr/lib/virtiofsd",
];
const PACKAGES: [&str; 2] = ["virtiofsd", "qemu-system-common, on Debian 12"];

/// QEMU's own of the oldest QEMU that we use.
const LEAST_QEMU: (u32, u32) = (7, 2);
/// Ubuntu 24.04's, the first that lives with as many memory slots as a VMM may announce.
const LEAST_RUST: (u32, u32) = (1, 10);
/// The first with `--readonly`.
const RUST_READ_ONLY: (u32, u32) = (1, 13);

/// What the installed virtiofsd is, as far as its command line depends on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirtiofsdFacts {
    /// Its program.
    pub program: PathBuf,
    /// Its version, such as `1.13.2`.
    pub version: String,
    /// Which of the two it is.
    pub flavour: VirtiofsdFlavour,
    /// It can be told to refuse writes by itself.
    pub read_only: bool,
}

/// The two programs of that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VirtiofsdFlavour {
    /// The C one that came with QEMU until 8.0 (`tools/virtiofsd`), which takes FUSE options.
    Qemu,
    /// Its successor in Rust (gitlab.com/virtio-fs/virtiofsd).
    Rust,
}

/// Finds the program and asks it.
pub(super) async fn probe(program: Option<&Path>) -> Result<VirtiofsdFacts, ProbeError> {
    let program = match program {
        Some(program) => program,
        None => DEFAULT_PROGRAMS
            .iter()
            .map(Path::new)
            .find(|program| program.exists())
            .ok_or_else(|| ProbeError::NoneOf {
                what: "virtiofsd",
                programs: DEFAULT_PROGRAMS.map(PathBuf::from).into(),
                packages: &PACKAGES,
            })?,
    };
    let said = ask(program, PACKAGES[0], &[], &["--version"]).await?;
    let (flavour, version) = read_version(&said).ok_or_else(|| not_understood(program, &said))?;
    let (least, least_text) = match flavour {
        VirtiofsdFlavour::Qemu => (LEAST_QEMU, "7.2"),
        VirtiofsdFlavour::Rust => (LEAST_RUST, "1.10"),
    };
    let numbers = version_numbers(&version);
    if numbers < Some(least) {
        return Err(ProbeError::TooOld {
            program: program.to_owned(),
            version,
            least: least_text,
        });
    }
    Ok(VirtiofsdFacts {
        program: program.to_owned(),
        version,
        flavour,
        read_only: flavour == VirtiofsdFlavour::Rust && numbers >= Some(RUST_READ_ONLY),
    })
}

/// `virtiofsd version 7.2.22 (Debian …)` and its FUSE version in a line of its own, or `virtiofsd 1.13.2` alone.
fn read_version(said: &str) -> Option<(VirtiofsdFlavour, String)> {
    let mut words = said.lines().next()?.split_ascii_whitespace();
    if words.next()? != "virtiofsd" {
        return None;
    }
    let (flavour, version) = match words.next()? {
        "version" => (VirtiofsdFlavour::Qemu, words.next()?),
        // Until 1.8 it called itself `virtiofsd backend`.
        "backend" => (VirtiofsdFlavour::Rust, words.next()?),
        version => (VirtiofsdFlavour::Rust, version),
    };
    version_numbers(version).map(|_| (flavour, version.to_owned()))
}

#[cfg(test)]
mod tests {
    use offshoot_model::Explain;

    use super::*;

    #[test]
    fn versions_are_read() {
        let check = |said: &str, expected: Option<(VirtiofsdFlavour, &str)>| {
            let found = read_version(said);
            let found = found
                .as_ref()
                .map(|(flavour, version)| (*flavour, version.as_str()));
            assert_eq!(found, expected, "{said}");
        };
        check(
            "virtiofsd version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c)\nusing FUSE kernel interface version 7.36\n",
            Some((VirtiofsdFlavour::Qemu, "7.2.22")),
        );
        check("virtiofsd 1.13.2\n", Some((VirtiofsdFlavour::Rust, "1.13.2")));
        check(
            "virtiofsd backend 1.7.0\n",
            Some((VirtiofsdFlavour::Rust, "1.7.0")),
        );
        check("virtiofsd", None);
        check("virtiofsd x\n", None);
        check("QEMU emulator version 7.2.22", None);
        check("", None);
    }

    #[tokio::test]
    async fn what_is_no_virtiofsd_is_called_so() {
        let probe = |program: &'static str| async move { probe(Some(Path::new(program))).await.unwrap_err() };
        assert!(matches!(probe("/no/such").await, ProbeError::Missing { .. }));
        assert!(matches!(probe("/bin/echo").await, ProbeError::Answer { .. }));
        assert!(matches!(probe("/bin/false").await, ProbeError::Answer { .. }));
        let folder = tempfile::tempdir().unwrap();
        let old = folder.path().join("virtiofsd");
        std::fs::write(&old, "#!/bin/sh\necho virtiofsd 1.9.1\n").unwrap();
        std::fs::set_permissions(&old, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let error = super::probe(Some(&old)).await.unwrap_err();
        assert!(
            matches!(error, ProbeError::TooOld { least: "1.10", .. }),
            "{error:?}"
        );
    }

    #[test]
    fn a_host_without_any_is_told_what_to_install() {
        let error = ProbeError::NoneOf {
            what: "virtiofsd",
            programs: vec!["/a".into(), "/b".into()],
            packages: &PACKAGES,
        };
        assert_eq!(
            error.to_string(),
            "virtiofsd is not installed: there is no `/a`, `/b`"
        );
        assert_eq!(
            error.hints(),
            [
                "apt install virtiofsd",
                "apt install qemu-system-common, on Debian 12"
            ]
        );
    }
}
