//! What a bootstrap will do, decided without doing any of it: names checked, the suite known, the mirrors chosen.

use crate::bootstrap::BootstrapError;

/// Debian's releases by the numbers that are their tags on Docker Hub, too.
const RELEASES: [(&str, &str); 4] = [
    ("11", "bullseye"),
    ("12", "bookworm"),
    ("13", "trixie"),
    ("14", "forky"),
];
/// Suites without updates and security archives of their own.
const ROLLING: [&str; 3] = ["sid", "unstable", "experimental"];
/// What a tag may leave out.
const DEFAULT_SUITE: &str = "stable";
/// Longer is no package (deb-control(5) sets no limit; the longest in Debian 13 has 79 characters).
const MAX_PACKAGE: usize = 100;

/// The command line, but for the hooks that are always the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) suite: String,
    pub(super) include: Vec<String>,
    /// Lines for `sources.list`; empty leaves the choice to mmdebstrap.
    pub(super) sources: Vec<String>,
}

/// Decides. `host_sources` are the host's own apt sources, as [`read_sources`] gives them.
pub(super) fn plan(
    suite: &str,
    include: &[String],
    mirror: Option<&str>,
    host_sources: &[Source],
) -> Result<Plan, BootstrapError> {
    let suite = parse_suite(suite)?;
    for package in include {
        if !is_package(package) {
            return Err(BootstrapError::Package {
                name: package.chars().take(100).collect(),
            });
        }
    }
    let sources = match mirror {
        Some(mirror) if !is_mirror(mirror) => {
            return Err(BootstrapError::Mirror {
                text: mirror.chars().take(100).collect(),
            });
        }
        Some(mirror) => vec![format!("deb {mirror} {suite} main")],
        None => sources_for(&suite, host_sources),
    };
    // Docker's image has the time zones, which debootstrap's minbase had when it was first made.
    let mut packages = vec!["tzdata".to_owned()];
    packages.extend(include.iter().cloned());
    packages.sort();
    packages.dedup();
    Ok(Plan {
        suite,
        include: packages,
        sources,
    })
}

/// `debian:bookworm`, `debian:12`, `debian` → the suite.
fn parse_suite(text: &str) -> Result<String, BootstrapError> {
    let (distribution, tag) = text.split_once(':').unwrap_or((text, DEFAULT_SUITE));
    if distribution != "debian" {
        return Err(BootstrapError::Distribution {
            name: distribution.chars().take(60).collect(),
        });
    }
    let suite = RELEASES
        .iter()
        .find(|(number, _)| *number == tag)
        .map_or(tag, |(_, name)| name);
    let valid = suite.len() <= 40
        && suite.starts_with(|c: char| c.is_ascii_lowercase())
        && suite
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if !valid {
        return Err(BootstrapError::Suite {
            text: text.chars().take(60).collect(),
        });
    }
    Ok(suite.to_owned())
}

/// Debian Policy 5.6.1, and an architecture after a colon.
fn is_package(name: &str) -> bool {
    let (name, arch) = name.split_once(':').unwrap_or((name, "any"));
    let good = |text: &str, extra: &[u8]| {
        text.len() >= 2
            && text.len() <= MAX_PACKAGE
            && text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || extra.contains(&b))
    };
    good(name, b"+-.") && good(arch, b"-")
}

/// A URI of a kind that apt fetches by itself, in characters that mean nothing to `sources.list`.
fn is_mirror(text: &str) -> bool {
    let rest = ["http://", "https://", "file:///"]
        .iter()
        .find_map(|scheme| text.strip_prefix(scheme));
    rest.is_some_and(|rest| {
        !rest.is_empty()
            && text.len() <= 500
            && text
                .bytes()
                .all(|b| b.is_ascii_graphic() && !matches!(b, b'[' | b']' | b'"' | b'\'' | b'#' | b'\\'))
    })
}

/// One suite of one archive, as the host's apt knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Source {
    uri: String,
    suite: String,
}

/// The host's own mirrors for `suite`: where the host gets `<any>`, `<any>-updates` and `<any>-security`, the image gets the
/// same of its suite.
fn sources_for(suite: &str, host: &[Source]) -> Vec<String> {
    let family = |source: &Source| {
        let known = |name: &str| ROLLING.contains(&name) || name == suite || is_release_name(name);
        match source.suite.rsplit_once('-') {
            Some((name, kind @ ("updates" | "security"))) if known(name) => Some(kind.to_owned()),
            _ if known(&source.suite) => Some(String::new()),
            _ => None,
        }
    };
    // Its own suite first; any other suite's mirror carries ours as well.
    let mut ordered: Vec<&Source> = host.iter().collect();
    ordered.sort_by_key(|source| !source.suite.starts_with(suite));
    let mut lines: Vec<(String, String)> = Vec::new();
    for source in ordered {
        let Some(kind) = family(source) else { continue };
        let rolling = ROLLING.contains(&suite);
        if lines.iter().any(|(there, _)| *there == kind) || (rolling && !kind.is_empty()) {
            continue;
        }
        let dash = if kind.is_empty() { "" } else { "-" };
        let line = format!("deb {} {suite}{dash}{kind} main", source.uri);
        lines.push((kind, line));
    }
    // Without the suite itself, updates are worth nothing.
    if !lines.iter().any(|(kind, _)| kind.is_empty()) {
        return Vec::new();
    }
    lines.sort();
    lines.into_iter().map(|(_, line)| line).collect()
}

fn is_release_name(name: &str) -> bool {
    RELEASES.iter().any(|(_, release)| *release == name) || ["stable", "testing", "oldstable"].contains(&name)
}

/// Reads `sources.list` and `*.list` (one-line) or `*.sources` (deb822) text: sources.list(5). Only the `main` of binary
/// archives on Debian mirrors counts; what is not understood is passed over.
pub(super) fn read_sources(text: &str) -> Vec<Source> {
    let is_debian = |uri: &str| {
        let path = uri.trim_end_matches('/');
        is_mirror(uri) && (path.ends_with("/debian") || path.ends_with("/debian-security"))
    };
    let one_line = text.lines().filter_map(|line| {
        let mut words = strip_options(line.trim().strip_prefix("deb ")?)?.split_whitespace();
        let (uri, suite) = (words.next()?, words.next()?);
        words
            .any(|word| word == "main")
            .then(|| (vec![uri.to_owned()], vec![suite.to_owned()]))
    });
    let mut found: Vec<(Vec<String>, Vec<String>)> = one_line.collect();
    for paragraph in paragraphs(text) {
        let field = |name: &str| -> Vec<String> {
            let values = paragraph.iter().filter(|(key, _)| key.eq_ignore_ascii_case(name));
            values
                .flat_map(|(_, value)| value.split_whitespace().map(str::to_owned))
                .collect()
        };
        let enabled = !field("Enabled").iter().any(|value| value == "no");
        let has = |name: &str, value: &str| field(name).iter().any(|v| v == value);
        if enabled && has("Types", "deb") && has("Components", "main") {
            found.push((field("URIs"), field("Suites")));
        }
    }
    let mut sources = Vec::new();
    for (uris, suites) in found {
        for uri in uris.iter().filter(|uri| is_debian(uri)) {
            sources.extend(suites.iter().map(|suite| Source {
                uri: uri.clone(),
                suite: suite.clone(),
            }));
        }
    }
    sources
}

/// `[arch=amd64 signed-by=…] http://…` → `http://…`
fn strip_options(text: &str) -> Option<&str> {
    match text.trim_start().strip_prefix('[') {
        Some(rest) => rest.split_once(']').map(|(_, rest)| rest),
        None => Some(text),
    }
}

/// The fields of each deb822 paragraph; continuation lines belong to the field before.
fn paragraphs(text: &str) -> Vec<Vec<(String, String)>> {
    let mut paragraphs = vec![Vec::<(String, String)>::new()];
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let last = paragraphs.len() - 1;
        if line.trim().is_empty() {
            paragraphs.push(Vec::new());
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = paragraphs[last].last_mut() {
                value.push(' ');
                value.push_str(line.trim());
            }
        } else if let Some((key, value)) = line.split_once(':') {
            paragraphs[last].push((key.trim().to_owned(), value.trim().to_owned()));
        }
    }
    paragraphs
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEB822: &str = "\
Types: deb
# http://snapshot.debian.org/
URIs: http://mirror.example/debian
Suites: bookworm
 bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/x.gpg

Types: deb deb-src
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main

Types: deb
URIs: https://other.example/node
Suites: nodistro
Components: main

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: trixie
Components: main
";

    #[test]
    fn the_hosts_sources_are_read_in_both_forms() {
        let show = |text: &str| {
            let sources = read_sources(text);
            sources
                .iter()
                .map(|s| format!("{} {}", s.uri, s.suite))
                .collect::<Vec<_>>()
                .join("\n")
        };
        assert_eq!(
            show(DEB822),
            "http://mirror.example/debian bookworm\nhttp://mirror.example/debian bookworm-updates\n\
             http://mirror.example/debian-security bookworm-security"
        );
        let lines = "# deb http://x/debian sid main\ndeb [arch=amd64 trusted=yes] http://a/debian/ sid contrib main\n\
                     deb-src http://a/debian sid main\ndeb http://a/debian sid contrib\ndeb cdrom:[x]/ sid main\n\
                     deb http://b/ubuntu jammy main\ndeb\ndeb [ http://a/debian sid main";
        assert_eq!(show(lines), "http://a/debian/ sid");
        assert_eq!(show(""), "");
    }

    #[test]
    fn the_image_uses_the_hosts_mirrors() {
        let host = read_sources(DEB822);
        let check = |suite: &str, expected: &[&str]| {
            assert_eq!(
                plan(&format!("debian:{suite}"), &[], None, &host)
                    .unwrap()
                    .sources,
                expected,
                "{suite}"
            );
        };
        check(
            "bookworm",
            &[
                "deb http://mirror.example/debian bookworm main",
                "deb http://mirror.example/debian-security bookworm-security main",
                "deb http://mirror.example/debian bookworm-updates main",
            ],
        );
        check(
            "trixie",
            &[
                "deb http://mirror.example/debian trixie main",
                "deb http://mirror.example/debian-security trixie-security main",
                "deb http://mirror.example/debian trixie-updates main",
            ],
        );
        check("sid", &["deb http://mirror.example/debian sid main"]);
        assert!(plan("debian:sid", &[], None, &[]).unwrap().sources.is_empty());
        let own = plan("debian:sid", &[], Some("http://m/debian"), &host).unwrap();
        assert_eq!(own.sources, ["deb http://m/debian sid main"]);
    }

    #[test]
    fn suites_are_found_by_name_and_number() {
        for (text, expected) in [
            ("debian:bookworm", "bookworm"),
            ("debian:12", "bookworm"),
            ("debian:13", "trixie"),
            ("debian", "stable"),
        ] {
            assert_eq!(plan(text, &[], None, &[]).unwrap().suite, expected);
        }
        for bad in [
            "debian:",
            "debian:-x",
            "debian:--help",
            "debian:a b",
            "debian:../x",
            "debian:A",
            "debian:12.1",
        ] {
            assert!(
                matches!(plan(bad, &[], None, &[]), Err(BootstrapError::Suite { .. })),
                "{bad}"
            );
        }
        for bad in ["ubuntu:noble", "", "bookworm", "-debian:x"] {
            assert!(
                matches!(
                    plan(bad, &[], None, &[]),
                    Err(BootstrapError::Distribution { .. })
                ),
                "{bad}"
            );
        }
    }

    #[test]
    fn only_package_names_and_mirrors_pass() {
        let include = |name: &str| plan("debian:sid", &[name.to_owned()], None, &[]);
        for good in [
            "curl",
            "g++",
            "libstdc++6",
            "gcc-12",
            "python3.11",
            "libc6:arm64",
            "0ad",
            "tzdata",
        ] {
            assert!(include(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "a",
            "-x",
            "--help",
            "a b",
            "a,b",
            "a;b",
            "$(x)",
            "?essential",
            "~i",
            "../x",
            "a/b",
            "A",
            "a\nb",
            "a:",
            ":a",
        ] {
            assert!(
                matches!(include(bad), Err(BootstrapError::Package { .. })),
                "{bad:?}"
            );
        }
        let packages = plan("debian:sid", &["curl".into(), "curl".into()], None, &[])
            .unwrap()
            .include;
        assert_eq!(packages, ["curl", "tzdata"]);
        let mirror = |text: &str| plan("debian:sid", &[], Some(text), &[]);
        for good in [
            "http://deb.debian.org/debian",
            "https://m.example:8443/debian/",
            "file:///srv/mirror",
        ] {
            assert!(mirror(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "-",
            "http://",
            "ftp://x/debian",
            "http://x/ [trusted=yes]",
            "http://x\ndeb",
            "copy:/x",
            "/etc",
        ] {
            assert!(
                matches!(mirror(bad), Err(BootstrapError::Mirror { .. })),
                "{bad:?}"
            );
        }
    }
}
