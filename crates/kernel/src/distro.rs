//! The distribution's own kernel, as a package of apt: found, downloaded, extracted; never installed.
//!
//! ```text
//! apt-cache search ─► newest linux-image-<release>-cloud-<arch> ─► apt-get download ─► dpkg-deb -x
//! ```
//!
//! The source that kernels are compiled from comes in the same way, out of the package `linux-source-<version>`.
//! apt checks each package against the signed lists of its archive.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use offshoot_model::{ErrorKind, Progress, ProgressUnit};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

use crate::version;

/// The most that we read of a tool's output: every kernel package of an archive is 200 KiB of records.
const OUTPUT_MAX: u64 = 16 << 20;
/// How much of what a tool complains about is kept.
const COMPLAINT_MAX: u64 = 4 << 10;
/// How many meta packages may lead to each other: Debian has two (`linux-image-cloud-amd64`, and the package).
const META_DEPTH: usize = 4;
/// How often a download's progress is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What kernel packages are called.
const IMAGE: &str = "linux-image-";
/// What packages with Linux's source are called.
const SOURCE: &str = "linux-source-";
/// The one whose options our configuration was written for.
const SOURCE_PACKAGE: &str = "linux-source-6.12";

/// What to take of the distribution's kernels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DistroOptions {
    /// A package, or a meta package such as `linux-image-cloud-amd64`; `None` takes the newest cloud kernel.
    pub package: Option<String>,
}

/// Why the distribution's kernel cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DistroError {
    /// This machine's architecture has no cloud kernel, or none that we know.
    #[error("no distribution kernel is known for {arch} machines")]
    Architecture {
        /// What this machine is.
        arch: &'static str,
    },
    /// A tool is not there or cannot be run.
    #[error("cannot run `{tool}`")]
    Spawn {
        /// Which.
        tool: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A tool failed.
    #[error("`{tool}` failed ({status}): {complaint}")]
    Tool {
        /// Which.
        tool: &'static str,
        /// How it ended.
        status: ExitStatus,
        /// The last lines that it wrote to its standard error.
        complaint: String,
    },
    /// A tool wrote more than makes sense.
    #[error("`{tool}` wrote more than {limit} bytes")]
    Output {
        /// Which.
        tool: &'static str,
        /// The most that is read.
        limit: u64,
    },
    /// apt has no such package.
    #[error("apt knows no package `{package}`")]
    NoPackage {
        /// What was looked for.
        package: String,
    },
    /// A name that no kernel package has.
    #[error("`{package}` is not the name of a kernel package")]
    Name {
        /// The refused name, shortened.
        package: String,
    },
    /// The package is not what its name says.
    #[error("the package `{package}` holds no kernel: {what}")]
    NoKernel {
        /// The package.
        package: String,
        /// What is missing.
        what: &'static str,
    },
    /// A file of ours cannot be read or written.
    #[error("cannot use {}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl DistroError {
    /// What kind of trouble it is.
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Architecture { .. } | Self::Spawn { .. } => ErrorKind::NotPossible,
            Self::Name { .. } => ErrorKind::InvalidRequest,
            Self::NoPackage { .. } => ErrorKind::NotFound,
            Self::Tool { .. } | Self::Output { .. } | Self::NoKernel { .. } => ErrorKind::Upstream,
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
                _ => ErrorKind::Internal,
            },
        }
    }
}

/// A kernel package that apt can download.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    size: u64,
    /// The kernel package a meta package stands for.
    leads_to: Option<String>,
}

/// Finds the package that `options` ask for.
pub(crate) async fn find(options: &DistroOptions) -> Result<Package, DistroError> {
    let Some(wanted) = &options.package else {
        let pattern = format!("^linux-image-[0-9].*-cloud-{}$", debian_arch()?);
        let records = run(
            "apt-cache",
            &["search", "--names-only", "--full", &pattern],
            Path::new("/"),
        )
        .await?;
        return newest(&records).ok_or_else(|| DistroError::NoPackage {
            package: format!("linux-image-*-cloud-{}", debian_arch().unwrap_or("*")),
        });
    };
    let mut name = wanted.clone();
    for _ in 0..META_DEPTH {
        if !is_kernel_package(&name) {
            return Err(DistroError::Name {
                package: name.chars().take(80).collect(),
            });
        }
        match show(&name, IMAGE).await? {
            None => return Err(DistroError::NoPackage { package: name }),
            Some(Package {
                leads_to: Some(next), ..
            }) => name = next,
            Some(package) => return Ok(package),
        }
    }
    Err(DistroError::NoPackage {
        package: wanted.clone(),
    })
}

/// Finds the package with the source that kernels are compiled from.
pub(crate) async fn find_source() -> Result<Package, DistroError> {
    show(SOURCE_PACKAGE, SOURCE)
        .await?
        .ok_or_else(|| DistroError::NoPackage {
            package: SOURCE_PACKAGE.to_owned(),
        })
}

/// The version of a package that apt would install.
async fn show(name: &str, prefix: &str) -> Result<Option<Package>, DistroError> {
    let records = match run("apt-cache", &["show", "--no-all-versions", name], Path::new("/")).await {
        Ok(records) => records,
        // It ends with 100 when it knows nothing of that name.
        Err(DistroError::Tool { status, .. }) if status.code() == Some(100) => String::new(),
        Err(error) => return Err(error),
    };
    Ok(parse_records(&records, prefix)
        .into_iter()
        .find(|package| package.name == name))
}

/// Downloads and extracts `package` into `dir`; gives the extracted tree and the kernel in it.
pub(crate) async fn fetch(
    package: &Package,
    dir: &Path,
    progress: &Progress,
) -> Result<(PathBuf, PathBuf), DistroError> {
    let tree = download(package, dir, progress).await?;
    let kernel = one_file(&tree.join("boot"), |name| name.starts_with("vmlinuz-"))
        .ok_or_else(|| nothing_in(package, "it has no boot/vmlinuz-*"))?;
    Ok((tree, kernel))
}

/// Downloads and extracts a package with Linux's source into `dir`; gives the tarball.
pub(crate) async fn fetch_source(
    package: &Package,
    dir: &Path,
    progress: &Progress,
) -> Result<PathBuf, DistroError> {
    let tree = download(package, dir, progress).await?;
    one_file(&tree.join("usr/src"), |name| {
        name.starts_with(SOURCE) && name.contains(".tar")
    })
    .ok_or_else(|| nothing_in(package, "it has no usr/src/linux-source-*.tar.*"))
}

fn nothing_in(package: &Package, what: &'static str) -> DistroError {
    DistroError::NoKernel {
        package: package.name.clone(),
        what,
    }
}

/// Downloads and extracts `package` into `dir`; gives the extracted tree.
async fn download(package: &Package, dir: &Path, progress: &Progress) -> Result<PathBuf, DistroError> {
    let (download, tree) = (dir.join("download"), dir.join("tree"));
    for dir in [&download, &tree] {
        std::fs::create_dir(dir).map_err(|source| DistroError::Io {
            path: dir.clone(),
            source,
        })?;
    }
    let task = progress.start(
        format!("downloading {}", package.name),
        ProgressUnit::Bytes,
        Some(package.size),
    );
    let what = format!("{}={}", package.name, package.version);
    // The sandbox user could not write into a folder that only its maker may enter.
    let arguments = ["-q", "-o", "APT::Sandbox::User=root", "download", &what];
    let running = run("apt-get", &arguments, &download);
    tokio::pin!(running);
    loop {
        tokio::select! {
            done = &mut running => break done.map(drop)?,
            () = tokio::time::sleep(LOOK_EVERY) => progress.moved(task, size_of_files(&download)),
        };
    }
    progress.finish(task);

    let deb = one_file(&download, |name| name.ends_with(".deb"))
        .ok_or_else(|| nothing_in(package, "apt-get left no .deb"))?;
    let task = progress.start(format!("extracting {}", package.name), ProgressUnit::Items, None);
    let (deb_path, tree_path) = (deb.to_string_lossy(), tree.to_string_lossy());
    run("dpkg-deb", &["-x", &deb_path, &tree_path], &download).await?;
    progress.finish(task);
    Ok(tree)
}

fn debian_arch() -> Result<&'static str, DistroError> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        arch => Err(DistroError::Architecture { arch }),
    }
}

/// A package name (Debian policy 5.6.1) of a kernel: it goes into a command line.
fn is_kernel_package(name: &str) -> bool {
    is_package(name, IMAGE)
}

fn is_package(name: &str, prefix: &str) -> bool {
    name.strip_prefix(prefix).is_some_and(|rest| {
        !rest.is_empty()
            && name.len() <= 128
            && rest
                .bytes()
                .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'+' | b'-' | b'.' | b'~'))
    })
}

/// The newest of the real packages; signed ones are those without a suffix, which the search has left.
fn newest(records: &str) -> Option<Package> {
    parse_records(records, IMAGE)
        .into_iter()
        .filter(|package| package.leads_to.is_none())
        .max_by(|a, b| version::compare(&a.version, &b.version))
}

/// The packages whose names begin so, of records of `Field: value` lines with empty lines between them (deb822(5)).
fn parse_records(text: &str, prefix: &str) -> Vec<Package> {
    text.split("\n\n")
        .filter_map(|record| {
            let field = |name: &str| {
                record
                    .lines()
                    .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
                    .map(str::trim)
            };
            let name = field("Package").filter(|name| is_package(name, prefix))?;
            let leads_to = field("Depends")
                .unwrap_or_default()
                .split([',', '|'])
                .find_map(|dependency| {
                    dependency
                        .split_ascii_whitespace()
                        .next()
                        .filter(|name| is_kernel_package(name))
                });
            Some(Package {
                name: name.to_owned(),
                version: field("Version").filter(|version| is_version(version))?.to_owned(),
                size: field("Size")
                    .and_then(|size| size.parse().ok())
                    .unwrap_or_default(),
                leads_to: leads_to.map(str::to_owned),
            })
        })
        .collect()
}

fn is_version(version: &str) -> bool {
    !version.is_empty()
        && version
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"+-.~:".contains(&b))
}

/// The only file in `dir` whose name fits.
fn one_file(dir: &Path, fits: impl Fn(&str) -> bool) -> Option<PathBuf> {
    let mut found = std::fs::read_dir(dir)
        .ok()?
        .flatten()
        .filter(|entry| entry.file_name().to_str().is_some_and(&fits));
    let first = found.next()?;
    found.next().is_none().then(|| first.path())
}

fn size_of_files(dir: &Path) -> u64 {
    // Only shown as progress: what cannot be read counts nothing.
    let Ok(entries) = std::fs::read_dir(dir) else {
        return 0;
    };
    entries
        .flatten()
        .filter_map(|entry| entry.metadata().ok())
        .map(|metadata| metadata.len())
        .sum()
}

/// Runs a tool in `dir` to its end and gives what it wrote. Dropping the future kills the tool.
async fn run(tool: &'static str, arguments: &[&str], dir: &Path) -> Result<String, DistroError> {
    let failed = |source| DistroError::Spawn { tool, source };
    let mut child = Command::new(tool)
        .args(arguments)
        .current_dir(dir)
        .env("LC_ALL", "C.UTF-8")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (output, complaint) = tokio::join!(read_start(stdout, OUTPUT_MAX), read_start(stderr, COMPLAINT_MAX));
    let (output, is_whole) = output.map_err(failed)?;
    let (complaint, _) = complaint.map_err(failed)?;
    let status = child.wait().await.map_err(failed)?;
    if !status.success() {
        let complaint = String::from_utf8_lossy(&complaint);
        let lines: Vec<_> = complaint
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .collect();
        let last = &lines[lines.len().saturating_sub(3)..];
        return Err(DistroError::Tool {
            tool,
            status,
            complaint: last.join("; "),
        });
    }
    if !is_whole {
        return Err(DistroError::Output {
            tool,
            limit: OUTPUT_MAX,
        });
    }
    Ok(String::from_utf8_lossy(&output).into_owned())
}

/// Reads to the end and keeps at most `limit` bytes; says whether that is all.
async fn read_start(pipe: Option<impl AsyncRead + Unpin>, limit: u64) -> io::Result<(Vec<u8>, bool)> {
    let mut kept = Vec::new();
    let Some(mut pipe) = pipe else {
        return Ok((kept, true));
    };
    (&mut pipe).take(limit).read_to_end(&mut kept).await?;
    let rest = tokio::io::copy(&mut pipe, &mut tokio::io::sink()).await?;
    Ok((kept, rest == 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORDS: &str = "Package: linux-image-6.1.0-50-cloud-amd64\nVersion: 6.1.176-1\nSize: 5\n\
        Depends: kmod, linux-base (>= 4.3~), initramfs-tools (>= 0.120+deb8u2) | linux-initramfs-tool\n\n\
        Package: linux-image-6.12-cloud-amd64\nVersion: 6.12.117-1~deb12u1\nSize: 1512\n\
        Depends: linux-image-6.12.117+deb12-cloud-amd64 (= 6.12.117-1~deb12u1)\n\n\
        Package: linux-image-6.12.117+deb12-cloud-amd64\nVersion: 6.12.117-1~deb12u1\nDepends: kmod\nSize: 34307256\n\
        Description: Linux\n Size: 1\n\n\
        Package: linux-image-6.12.99+deb12-cloud-amd64\nVersion: 6.12.99-1~deb12u1\n\n\
        Package: bash\nVersion: 9\n\n\
        Package: linux-image-evil\nVersion: 9 -o Dir=/\n\nnonsense\n";

    #[test]
    fn the_newest_real_package_is_taken() {
        let package = newest(RECORDS).unwrap();
        assert_eq!(package.name, "linux-image-6.12.117+deb12-cloud-amd64");
        assert_eq!(
            (package.version.as_str(), package.size),
            ("6.12.117-1~deb12u1", 34_307_256)
        );
        let records = parse_records(RECORDS, IMAGE);
        assert_eq!(records.len(), 4);
        assert_eq!(
            records[1].leads_to.as_deref(),
            Some("linux-image-6.12.117+deb12-cloud-amd64")
        );
        assert_eq!(newest(""), None);
        let source = "Package: linux-source-6.12\nVersion: 6.12.1-1\nDepends: binutils, xz-utils\nSize: 7\n";
        assert_eq!(parse_records(source, IMAGE), []);
        assert_eq!(parse_records(source, SOURCE)[0].leads_to, None);
    }

    #[test]
    fn only_names_of_kernels_reach_a_command_line() {
        for (name, expected) in [
            ("linux-image-6.12.1+deb13-cloud-amd64", true),
            ("linux-image-cloud-amd64", true),
            ("linux-image-", false),
            ("bash", false),
            ("-o", false),
            ("linux-image-x y", false),
            ("linux-image-../x", false),
        ] {
            assert_eq!(is_kernel_package(name), expected, "{name}");
        }
    }

    #[tokio::test]
    async fn tools_that_fail_are_told_with_their_last_words() {
        let root = Path::new("/");
        let error = run("sh", &["-c", "echo a >&2; echo; echo b >&2; exit 3"], root)
            .await
            .unwrap_err();
        assert_eq!(error.to_string(), "`sh` failed (exit status: 3): a; b");
        assert!(matches!(
            run("/nonexistent", &[], root).await,
            Err(DistroError::Spawn { .. })
        ));
        let error = run("head", &["-c", "20m", "/dev/zero"], root).await.unwrap_err();
        assert!(matches!(error, DistroError::Output { .. }), "{error}");
        assert_eq!(run("echo", &["x"], root).await.unwrap(), "x\n");
    }
}
