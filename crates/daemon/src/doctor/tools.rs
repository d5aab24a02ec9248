//! Programs that the daemon runs for images and kernels. Those that a start needs are the capabilities' concern.

use std::path::{Path, PathBuf};

use offshoot_model::{Finding, Severity};
use offshoot_sys::programs::find;

const PART: &str = "tools";

/// Programs that do one thing together.
struct Tool {
    id: &'static str,
    programs: &'static [&'static str],
    /// What they are for, and does not work without.
    purpose: &'static str,
    package: &'static str,
}

const TOOLS: [Tool; 2] = [
    Tool {
        id: "mmdebstrap",
        programs: &["mmdebstrap", "unshare"],
        purpose: "images from a Debian mirror (`offshoot image bootstrap`)",
        package: "apt install mmdebstrap util-linux; or pull and import images instead",
    },
    Tool {
        id: "apt",
        programs: &["apt-get", "apt-cache", "dpkg-deb"],
        purpose: "the distribution's kernel (`offshoot kernel add --distro`)",
        package: "these are Debian's own; elsewhere `offshoot kernel add --vmlinux FILE --modules DIR`",
    },
];

/// One finding for each purpose.
pub(super) fn check() -> Vec<Finding> {
    TOOLS.iter().map(|tool| judge(tool, find)).collect()
}

fn judge(tool: &Tool, find: impl Fn(&str) -> Option<PathBuf>) -> Finding {
    let missing: Vec<_> = tool
        .programs
        .iter()
        .filter(|name| find(name).is_none())
        .copied()
        .collect();
    if missing.is_empty() {
        let at = find(tool.programs[0]).unwrap_or_default();
        return Finding::ok(PART, format!("{} at {}", tool.id, shown(&at))).id(tool.id);
    }
    let verb = if missing.len() == 1 { "is" } else { "are" };
    Finding::new(
        PART,
        Severity::Warning,
        format!("{} {verb} not installed", missing.join(", ")),
        tool.package,
    )
    .id(format!("{}-missing", tool.id))
    .cost(format!("no {}", tool.purpose))
}

fn shown(path: &Path) -> String {
    path.parent().unwrap_or(path).display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_says_what_it_was_for() {
        let all = |name: &str| Some(Path::new("/usr/bin").join(name));
        for tool in &TOOLS {
            let well = judge(tool, all);
            assert_eq!((well.severity, well.id.as_str()), (Severity::Ok, tool.id));
            assert!(well.message.ends_with("at /usr/bin"), "{well:?}");
            let none = judge(tool, |_| None);
            assert_eq!(none.severity, Severity::Warning);
            assert!(
                none.cost.contains(tool.purpose) && !none.hint.is_empty(),
                "{none:?}"
            );
        }
        let one = judge(&TOOLS[0], |name| all(name).filter(|_| name != "unshare"));
        assert_eq!(
            (one.id.as_str(), one.message.as_str()),
            ("mmdebstrap-missing", "unshare is not installed")
        );
    }
}
