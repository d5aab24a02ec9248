//! SSH keys: those that open VMs, checked, and each VM's own, by which clients know it again.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use offshoot_model::{ErrorKind, Explain, SshConfig};
use russh::keys::ssh_key::LineEnding;
use russh::keys::ssh_key::private::Ed25519Keypair;
use russh::keys::{PrivateKey, PublicKey, ssh_key};

/// The longest line: an RSA key of 16,384 bits takes 2,800 bytes, and comments are short.
pub const MAX_KEY_LINE: usize = 8 << 10;
/// The most bytes of a host key's file: an Ed25519 key takes 400.
const MAX_HOST_KEY: u64 = 4 << 10;
/// How much of a bad line is worth repeating.
const SHOWN: usize = 40;

/// A line that opens no VM.
#[derive(Debug, thiserror::Error)]
pub enum SshKeyError {
    /// More than anybody has.
    #[error("{given} SSH keys are too many: at most {}", SshConfig::MAX_KEYS)]
    TooMany {
        /// How many were given.
        given: usize,
    },
    /// More than a public key takes.
    #[error("an SSH key of {given} bytes is too long: at most {MAX_KEY_LINE}")]
    TooLong {
        /// How long it is, bytes.
        given: usize,
    },
    /// No public key, or something before it.
    #[error("`{shown}` is not an SSH public key")]
    NotAKey {
        /// The beginning of the line.
        shown: String,
        /// What is wrong with it.
        #[source]
        source: ssh_key::Error,
    },
    /// Several lines in one.
    #[error("an SSH key is one line")]
    Lines,
}

impl Explain for SshKeyError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidRequest
    }

    fn hints(&self) -> Vec<String> {
        vec![
            "give the line of a file such as `~/.ssh/id_ed25519.pub`, without options before it (`ssh-keygen` makes one)"
                .into(),
        ]
    }
}

/// Refuses what is not a bounded number of public keys, one a line, without options.
pub fn check_keys(lines: &[String]) -> Result<(), SshKeyError> {
    if lines.len() > SshConfig::MAX_KEYS {
        return Err(SshKeyError::TooMany { given: lines.len() });
    }
    lines.iter().try_for_each(|line| check_key(line))
}

fn check_key(line: &str) -> Result<(), SshKeyError> {
    if line.len() > MAX_KEY_LINE {
        return Err(SshKeyError::TooLong { given: line.len() });
    }
    if line.contains(['\n', '\r', '\0']) {
        return Err(SshKeyError::Lines);
    }
    // Options stand where the algorithm's name should be, so that they are no key either.
    PublicKey::from_openssh(line)
        .map(drop)
        .map_err(|source| SshKeyError::NotAKey {
            shown: line.chars().take(SHOWN).flat_map(char::escape_debug).collect(),
            source,
        })
}

/// A VM's own key cannot be made or read.
#[derive(Debug, thiserror::Error)]
pub enum HostKeyError {
    /// Its file.
    #[error("cannot use the VM's SSH host key {}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It holds something else.
    #[error("{} holds no SSH host key", path.display())]
    Broken {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: ssh_key::Error,
    },
}

impl Explain for HostKeyError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { source, .. }
                if matches!(
                    source.kind(),
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
                ) =>
            {
                ErrorKind::NoSpace
            }
            _ => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        let (Self::Io { path, .. } | Self::Broken { path, .. }) = self;
        vec![format!(
            "look at {0}; without that file the VM gets another key when it starts",
            path.display()
        )]
    }
}

/// A VM's own key.
pub struct HostKey(PrivateKey);

impl HostKey {
    /// Reads the key at `path`; nothing where there is none yet.
    pub fn read(path: &Path) -> Result<Option<Self>, HostKeyError> {
        let unusable = |source| HostKeyError::Io {
            path: path.to_owned(),
            source,
        };
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(unusable(source)),
        };
        let mut text = Vec::new();
        file.take(MAX_HOST_KEY).read_to_end(&mut text).map_err(unusable)?;
        match PrivateKey::from_openssh(&text) {
            Ok(key) => Ok(Some(Self(key))),
            Err(source) => Err(HostKeyError::Broken {
                path: path.to_owned(),
                source,
            }),
        }
    }

    /// The key at `path`, made when there is none. The file is whole or not there, and root's alone.
    pub fn ensure(path: &Path) -> Result<Self, HostKeyError> {
        if let Some(key) = Self::read(path)? {
            return Ok(key);
        }
        let unusable = |source| HostKeyError::Io {
            path: path.to_owned(),
            source,
        };
        let seed = offshoot_sys::random::bytes().map_err(unusable)?;
        let key = Self(PrivateKey::from(Ed25519Keypair::from_seed(&seed)));
        let text = key.to_openssh().map_err(|source| HostKeyError::Broken {
            path: path.to_owned(),
            source,
        })?;
        let fresh = path.with_extension("new");
        let written = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&fresh)
            .and_then(|mut file| {
                file.write_all(text.as_bytes())?;
                file.sync_all()
            })
            .and_then(|()| std::fs::rename(&fresh, path));
        written.map_err(unusable)?;
        if let Some(folder) = path.parent() {
            offshoot_sys::durable::fsync_dir(folder).map_err(unusable)?;
        }
        Ok(key)
    }

    /// The private key in OpenSSH's format.
    pub fn to_openssh(&self) -> Result<String, ssh_key::Error> {
        Ok(self.0.to_openssh(LineEnding::LF)?.to_string())
    }

    /// The public key as known_hosts has it (sshd(8)): algorithm and base64.
    pub fn public_line(&self) -> Result<String, ssh_key::Error> {
        self.0.public_key().to_openssh()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const GOOD: &str =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILM+rvN+ot98qgEN796jTiQfZfG1KaT0PtFDJ/XFSqti me@here";

    #[test]
    fn only_bare_public_keys_are_taken() {
        check_keys(&[GOOD.into(), GOOD.replace(" me@here", "")]).unwrap();
        check_keys(&[]).unwrap();
        for bad in [
            "",
            "# a comment",
            "ssh-ed25519",
            "ssh-ed25519 AAAA",
            &format!("command=\"/bin/sh\" {GOOD}"),
            &format!("restrict {GOOD}"),
            &format!("{GOOD}\n{GOOD}"),
            &format!("{GOOD}\0"),
            "-----BEGIN OPENSSH PRIVATE KEY-----",
            &format!("{GOOD}{}", "x".repeat(MAX_KEY_LINE)),
        ] {
            let error = check_keys(&[GOOD.into(), bad.to_owned()]).unwrap_err();
            assert!(error.to_string().len() < 200, "{error}");
        }
        let many = vec![GOOD.to_owned(); SshConfig::MAX_KEYS + 1];
        assert!(matches!(
            check_keys(&many),
            Err(SshKeyError::TooMany { given: 65 })
        ));
    }

    #[test]
    fn a_host_key_is_made_once_and_is_roots_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        assert!(HostKey::read(&path).unwrap().is_none());
        let made = HostKey::ensure(&path).unwrap().public_line().unwrap();
        assert!(made.starts_with("ssh-ed25519 AAAA"), "{made}");
        assert_eq!(HostKey::ensure(&path).unwrap().public_line().unwrap(), made);
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        let other = HostKey::ensure(&folder.path().join("other")).unwrap();
        assert_ne!(other.public_line().unwrap(), made);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_broken_host_key_is_not_replaced_in_silence() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        std::fs::write(&path, "nothing").unwrap();
        assert!(matches!(HostKey::ensure(&path), Err(HostKeyError::Broken { .. })));
    }
}
