//! The public keys that a new VM is opened by: those that were named, a key of ours, and the user's own.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use clap::Args;
use offshoot_model::SshConfig;
use russh::keys::ssh_key::LineEnding;
use russh::keys::ssh_key::private::Ed25519Keypair;
use russh::keys::{PrivateKey, PublicKey};

use crate::error::Failure;

/// A file of keys is larger only when it is something else.
const MAX_FILE: u64 = 256 << 10;
/// The private key that is made on first use.
const OWN: &str = "id_ed25519";

/// Which keys open a VM's SSH server.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct SshKeyArgs {
    /// Public key that opens the VM over SSH, or a file with some, besides `~/.ssh/*.pub` and a key of Offshoot's
    #[arg(long = "ssh-key", value_name = "FILE|KEY")]
    given: Vec<String>,
    /// No SSH keys but those given by `--ssh-key`
    #[arg(long)]
    no_ssh_keys: bool,
}

impl SshKeyArgs {
    /// The keys, as `authorized_keys` has them, each once.
    pub(crate) fn lines(&self) -> Result<Vec<String>, Failure> {
        gather(&self.given, self.no_ssh_keys, &Places::of_this_user())
    }
}

/// Where this user keeps things.
#[derive(Clone, Debug, Default)]
pub(crate) struct Places {
    /// The home folder.
    pub(crate) home: Option<PathBuf>,
    /// `$XDG_CONFIG_HOME/offshoot`, or the same below the home folder.
    pub(crate) config: Option<PathBuf>,
}

impl Places {
    /// As the environment has it (XDG Base Directory Specification).
    pub(crate) fn of_this_user() -> Self {
        let absolute = |name| {
            let path = std::env::var_os(name).map(PathBuf::from);
            path.filter(|path| path.is_absolute())
        };
        let home = absolute("HOME");
        let config = absolute("XDG_CONFIG_HOME").or_else(|| Some(home.as_ref()?.join(".config")));
        Self {
            config: config.map(|folder| folder.join("offshoot")),
            home,
        }
    }

    /// The folder for our own files, made when it is missing.
    pub(crate) fn make_config(&self) -> Result<&Path, Failure> {
        let folder = self.config.as_deref().ok_or_else(|| {
            Failure::invalid("there is no place for a configuration").hint("set HOME to your home folder")
        })?;
        let made = std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder);
        made.map_err(|e| Failure::io(format!("cannot make the folder {}", folder.display()), &e))?;
        Ok(folder)
    }
}

/// A key of ours, by which its user enters every VM.
#[derive(Clone, Debug)]
pub(crate) struct OwnKey {
    /// The private key's file.
    pub(crate) path: PathBuf,
    /// The public key's line.
    pub(crate) public: String,
}

/// Reads the key, and makes it on first use.
pub(crate) fn own_key(places: &Places) -> Result<OwnKey, Failure> {
    let path = places.make_config()?.join(OWN);
    let cannot = |e: &io::Error| Failure::io(format!("cannot use the SSH key {}", path.display()), e);
    if !path.exists() {
        make(&path).map_err(|e| cannot(&e))?;
    }
    let text = read(&path).map_err(|e| cannot(&e))?;
    let key = PrivateKey::from_openssh(&text).map_err(|e| {
        Failure::invalid(format!("{} holds no SSH key", path.display()))
            .caused_by(&e)
            .hint("remove it, and another one is made")
    })?;
    let public = key.public_key().to_openssh();
    let public = public.map_err(|e| Failure::internal("cannot write an SSH key").caused_by(&e))?;
    Ok(OwnKey { path, public })
}

/// Makes a key. Of several programs that do so at once, the first one's stays.
fn make(path: &Path) -> io::Result<()> {
    let mut seed = [0; 32];
    File::open("/dev/urandom")?.read_exact(&mut seed)?;
    let mut key = PrivateKey::from(Ed25519Keypair::from_seed(&seed));
    key.set_comment("offshoot");
    let private = key.to_openssh(LineEnding::LF).map_err(io::Error::other)?;
    let public = key.public_key().to_openssh().map_err(io::Error::other)? + "\n";
    let fresh = path.with_extension(format!("new-{}", std::process::id()));
    let placed = write(&fresh, 0o600, private.as_bytes()).and_then(|()| std::fs::hard_link(&fresh, path));
    // Nobody knows it by this name.
    let _ = std::fs::remove_file(&fresh);
    match placed {
        Ok(()) => write(&path.with_extension("pub"), 0o644, public.as_bytes()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

fn write(path: &Path, mode: u32, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// A file that is not too large.
fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let read = File::open(path)?.take(MAX_FILE + 1).read_to_string(&mut text)?;
    if read as u64 > MAX_FILE {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "it is too large for a file of keys",
        ));
    }
    Ok(text)
}

/// Those that were named, and unless only they count, ours and what is in `~/.ssh`.
fn gather(given: &[String], only_given: bool, places: &Places) -> Result<Vec<String>, Failure> {
    let mut keys = Keys::default();
    for named in given {
        if is_key(named) {
            keys.add(named);
            continue;
        }
        let (path, text) = read_named(Path::new(named))?;
        let lines: Vec<_> = lines(&text).collect();
        if lines.is_empty() || !lines.iter().all(|line| is_key(line)) {
            return Err(
                Failure::invalid(format!("{} is not a file of SSH public keys", path.display())).hint(
                    "name a file such as `~/.ssh/id_ed25519.pub`, whose lines are keys without options",
                ),
            );
        }
        lines.iter().for_each(|line| keys.add(line));
    }
    if only_given {
        return Ok(keys.lines);
    }
    // A home that cannot be written to is no reason to make no VM: `offshoot ssh` brings its key along.
    if let Ok(own) = own_key(places) {
        keys.add(&own.public);
    }
    // What is no key of a kind that we know is passed over, such as certificates.
    for path in public_keys(places) {
        let text = read(&path).unwrap_or_default();
        for line in lines(&text).filter(|line| is_key(line)) {
            if keys.lines.len() < SshConfig::MAX_KEYS {
                keys.add(line);
            }
        }
    }
    Ok(keys.lines)
}

/// Lines without doubles.
#[derive(Debug, Default)]
struct Keys {
    lines: Vec<String>,
}

impl Keys {
    fn add(&mut self, line: &str) {
        // Algorithm and key; what follows is a comment.
        let same = |a: &str, b: &str| a.split_whitespace().take(2).eq(b.split_whitespace().take(2));
        let line = line.trim();
        if !self.lines.iter().any(|known| same(known, line)) {
            self.lines.push(line.to_owned());
        }
    }
}

fn is_key(line: &str) -> bool {
    PublicKey::from_openssh(line.trim()).is_ok()
}

fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// The file, or the public key beside it when it is a private one.
fn read_named(path: &Path) -> Result<(PathBuf, String), Failure> {
    let cannot = |path: &Path, e: &io::Error| {
        Failure::io(format!("cannot read the SSH key {}", path.display()), e)
            .hint("name a public key's file, or write the key itself: `--ssh-key 'ssh-ed25519 AAAA…'`")
    };
    let text = read(path).map_err(|e| cannot(path, &e))?;
    if !text.trim_start().starts_with("-----BEGIN") {
        return Ok((path.to_owned(), text));
    }
    let mut public = path.as_os_str().to_owned();
    public.push(".pub");
    let public = PathBuf::from(public);
    let text = read(&public).map_err(|e| cannot(&public, &e))?;
    Ok((public, text))
}

/// `~/.ssh/*.pub`, in order.
fn public_keys(places: &Places) -> Vec<PathBuf> {
    let Some(home) = &places.home else {
        return Vec::new();
    };
    let Ok(entries) = std::fs::read_dir(home.join(".ssh")) else {
        return Vec::new();
    };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "pub"));
    paths.sort();
    paths
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const ONE: &str =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILM+rvN+ot98qgEN796jTiQfZfG1KaT0PtFDJ/XFSqti one@here";

    fn places(folder: &Path) -> Places {
        Places {
            home: Some(folder.to_owned()),
            config: Some(folder.join(".config/offshoot")),
        }
    }

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn our_own_key_is_made_once_and_is_the_user_s_alone() {
        let folder = tempfile::tempdir().unwrap();
        let places = places(folder.path());
        let made = own_key(&places).unwrap();
        assert_eq!(mode(&made.path), 0o600);
        assert_eq!(mode(made.path.parent().unwrap()), 0o700);
        assert!(made.public.ends_with(" offshoot"), "{}", made.public);
        assert_eq!(own_key(&places).unwrap().public, made.public);
        let beside = read(&made.path.with_extension("pub")).unwrap();
        assert_eq!(beside.trim_end(), made.public);
        assert_eq!(std::fs::read_dir(made.path.parent().unwrap()).unwrap().count(), 2);

        std::fs::write(&made.path, "nothing").unwrap();
        own_key(&places).unwrap_err();
        own_key(&Places::default()).unwrap_err();
    }

    #[test]
    fn keys_come_from_options_from_us_and_from_the_home_folder() {
        let folder = tempfile::tempdir().unwrap();
        let places = places(folder.path());
        let ssh = folder.path().join(".ssh");
        std::fs::create_dir(&ssh).unwrap();
        let other = own_key(&Places {
            config: Some(folder.path().join("other")),
            ..Places::default()
        })
        .unwrap();
        std::fs::write(ssh.join("a.pub"), format!("# mine\n\n{}\n", other.public)).unwrap();
        std::fs::write(ssh.join("b.pub"), ONE.replace("one@here", "again")).unwrap();
        std::fs::write(ssh.join("c.pub"), "nonsense\n").unwrap();
        std::fs::write(ssh.join("config"), ONE).unwrap();

        let all = gather(&[ONE.to_owned()], false, &places).unwrap();
        let own = own_key(&places).unwrap();
        assert_eq!(all, [ONE, &own.public, &other.public]);
        assert_eq!(gather(&[ONE.to_owned()], true, &places).unwrap(), [ONE]);
        assert_eq!(gather(&[], true, &places).unwrap(), [""; 0]);

        // A private key's name stands for the public one's beside it.
        let private = own.path.to_str().unwrap().to_owned();
        assert_eq!(gather(&[private], true, &places).unwrap(), [own.public.as_str()]);
        for bad in ["no-such-file", ssh.join("c.pub").to_str().unwrap()] {
            gather(&[bad.to_owned()], true, &places).unwrap_err();
        }
        assert!(gather(&[], false, &Places::default()).unwrap().is_empty());
    }
}
