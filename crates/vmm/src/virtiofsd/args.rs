//! What a virtiofsd is told. Pure.
//!
//! QEMU's takes FUSE options, a list with commas, in which a backslash makes the next character mean itself (or, before
//! three octal digits, their byte): `tools/virtiofsd/fuse_opt.c`, `process_real_option_group`. The Rust one takes every
//! value as an argument of its own, which is text.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use offshoot_model::{ErrorKind, Explain};

use super::probe::{VirtiofsdFacts, VirtiofsdFlavour};
use super::server::ShareCache;

/// Under which number it gets its listening socket.
pub const SOCKET_FD: RawFd = 10;

/// What neither needs of the capabilities that both keep. A guest makes no device nodes on the host; whiteouts of
/// overlayfs and named pipes need no capability.
const DROPPED: [&str; 1] = ["mknod"];
/// What one that writes nothing does not need, either.
const DROPPED_READ_ONLY: [&str; 4] = ["mknod", "chown", "fsetid", "setfcap"];

/// Why a folder cannot be given to a virtiofsd.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArgumentsError {
    /// Its path is not text.
    #[error("`{}` is not UTF-8, and virtiofsd {version} takes no other paths", path.display())]
    NotText {
        /// The path.
        path: PathBuf,
        /// The version of the Rust virtiofsd.
        version: String,
    },
}

impl Explain for ArgumentsError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::NotPossible
    }

    fn hints(&self) -> Vec<String> {
        vec!["rename the folder, or share one above it".into()]
    }
}

/// The arguments after the program's name that make it serve `source`, an absolute path to a folder.
pub fn arguments(
    source: &Path,
    read_only: bool,
    cache: ShareCache,
    facts: &VirtiofsdFacts,
) -> Result<Vec<OsString>, ArgumentsError> {
    let dropped: &[&str] = if read_only { &DROPPED_READ_ONLY } else { &DROPPED };
    let dropped = dropped
        .iter()
        .map(|name| format!("-{name}"))
        .collect::<Vec<_>>()
        .join(":");
    let cache = match cache {
        ShareCache::Auto => "auto",
        ShareCache::Always => "always",
    };
    // Both: the limit of open files is ours to set, and theirs would need a capability to raise it.
    let mut out: Vec<OsString> = vec![format!("--fd={SOCKET_FD}").into(), "--rlimit-nofile=0".into()];
    match facts.flavour {
        VirtiofsdFlavour::Qemu => {
            let mut options = b"source=".to_vec();
            options.extend(escape(source.as_os_str().as_bytes()));
            let rest = format!(
                ",sandbox=namespace,xattr,no_posix_lock,announce_submounts,log_level=warn,cache={cache},modcaps={dropped}"
            );
            options.extend(rest.into_bytes());
            out.push("-o".into());
            out.push(OsString::from_vec(options));
        }
        VirtiofsdFlavour::Rust => {
            let Some(source) = source.to_str() else {
                return Err(ArgumentsError::NotText {
                    path: source.to_owned(),
                    version: facts.version.clone(),
                });
            };
            // With the equals sign, so that nothing of a value can be read as an option.
            out.push(format!("--shared-dir={source}").into());
            // Without file handles it needs no CAP_DAC_READ_SEARCH, with which a program that was taken over opens any
            // file of the file system.
            for option in [
                "--sandbox=namespace",
                "--xattr",
                "--announce-submounts",
                "--inode-file-handles=never",
                "--log-level=warn",
            ] {
                out.push(option.into());
            }
            out.push(format!("--cache={cache}").into());
            out.push(format!("--modcaps={dropped}").into());
            if read_only && facts.read_only {
                out.push("--readonly".into());
            }
        }
    }
    Ok(out)
}

/// A value of a FUSE option.
fn escape(value: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(value.len() + 8);
    for byte in value {
        if matches!(byte, b',' | b'\\') {
            out.push(b'\\');
        }
        out.push(*byte);
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn qemu() -> VirtiofsdFacts {
        VirtiofsdFacts {
            program: "/usr/lib/qemu/virtiofsd".into(),
            version: "7.2.22".into(),
            flavour: VirtiofsdFlavour::Qemu,
            read_only: false,
        }
    }

    fn rust(version: &str, read_only: bool) -> VirtiofsdFacts {
        VirtiofsdFacts {
            program: "/usr/libexec/virtiofsd".into(),
            version: version.into(),
            flavour: VirtiofsdFlavour::Rust,
            read_only,
        }
    }

    /// Reads a list of FUSE options as `process_real_option_group` does.
    fn read_options(text: &[u8]) -> Vec<Vec<u8>> {
        let (mut options, mut option) = (Vec::new(), Vec::new());
        let mut at = 0;
        while at < text.len() {
            match &text[at..] {
                [b',', ..] => options.push(std::mem::take(&mut option)),
                [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] => {
                    option.push((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'));
                    at += 3;
                }
                [b'\\', byte, ..] => {
                    option.push(*byte);
                    at += 1;
                }
                [byte, ..] => option.push(*byte),
                [] => {}
            }
            at += 1;
        }
        options.push(option);
        options
    }

    /// The program reads its options twice, and in between writes those that it does not know yet, as libfuse does
    /// (`add_opt_common`).
    fn read_twice(text: &[u8]) -> Vec<Vec<u8>> {
        let once = read_options(text);
        let again: Vec<_> = once.iter().map(|option| escape(option)).collect();
        read_options(&again.join(&b","[..]))
    }

    proptest! {
        #[test]
        fn every_path_is_read_back(
            path in prop::collection::vec(prop_oneof![
                1u8..=255,
                prop::sample::select(b",\\=07:- \n\"'".to_vec()),
            ], 0..40),
            read_only in any::<bool>(),
        ) {
            let path = [b"/".to_vec(), path].concat();
            let source = PathBuf::from(OsString::from_vec(path.clone()));
            let words = arguments(&source, read_only, ShareCache::Auto, &qemu()).unwrap();
            prop_assert_eq!(words.len(), 4);
            let options = read_twice(words[3].as_bytes());
            prop_assert_eq!(&options[0], &[b"source=".to_vec(), path.clone()].concat());
            let rest: Vec<_> = options[1..].iter().map(|o| std::str::from_utf8(o).unwrap()).collect();
            let caps = if read_only { "modcaps=-mknod:-chown:-fsetid:-setfcap" } else { "modcaps=-mknod" };
            prop_assert_eq!(rest, ["sandbox=namespace", "xattr", "no_posix_lock", "announce_submounts",
                "log_level=warn", "cache=auto", caps]);

            match arguments(&source, read_only, ShareCache::Auto, &rust("1.13.2", true)) {
                Ok(words) => {
                    let text = std::str::from_utf8(&path).unwrap();
                    let given: Vec<_> = words.iter()
                        .filter_map(|word| word.to_str().unwrap().strip_prefix("--shared-dir=")).collect();
                    prop_assert_eq!(given, [text]);
                    let mut names: Vec<_> = words.iter()
                        .map(|word| word.to_str().unwrap().split('=').next().unwrap()).collect();
                    prop_assert!(names.iter().all(|name| name.starts_with("--")));
                    names.sort_unstable();
                    let all = names.len();
                    names.dedup();
                    prop_assert_eq!(names.len(), all);
                }
                Err(ArgumentsError::NotText { .. }) => prop_assert!(std::str::from_utf8(&path).is_err()),
            }
        }
    }

    #[test]
    fn a_backslash_does_not_start_a_number() {
        assert_eq!(escape(b"/a\\101,b=c"), b"/a\\\\101\\,b=c");
        assert_eq!(read_options(b"\\101\\\\101\\"), [b"A\\101\\".to_vec()]);
    }

    #[test]
    fn the_program_refuses_writes_too_where_it_can() {
        let has = |facts: &VirtiofsdFacts, read_only: bool, word: &str| {
            let words = arguments(Path::new("/a"), read_only, ShareCache::Always, facts).unwrap();
            assert!(words.iter().any(|w| w.to_str().unwrap().contains("cache=always")));
            words.iter().any(|w| w == word)
        };
        assert!(has(&rust("1.13.2", true), true, "--readonly"));
        assert!(!has(&rust("1.13.2", true), false, "--readonly"));
        assert!(!has(&rust("1.10.0", false), true, "--readonly"));
        assert!(!has(&qemu(), true, "--readonly"));
        assert!(has(
            &rust("1.10.0", false),
            true,
            "--modcaps=-mknod:-chown:-fsetid:-setfcap"
        ));
    }
}
