//! `ssh-config --install`: one line in `~/.ssh/config`, and the file that it includes.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use super::keys::Places;
use super::quote;
use crate::error::Failure;

/// The file that is included, in the folder of our own.
const INCLUDED: &str = "ssh_config";
/// The line before ours.
const MARK: &str = "# Offshoot's VMs; `offshoot ssh-config --uninstall` removes this line and the next.";

/// Writes the included file, and includes it; gives what was done.
pub(super) fn install(places: &Places, text: &str, domain: &str) -> Result<String, Failure> {
    let included = places.make_config()?.join(INCLUDED);
    replace(&included, 0o644, text).map_err(|e| cannot_write(&included, &e))?;
    let config = user_config(places)?;
    let before = read(&config)?;
    let after = with_include(&before, &included)?;
    if after == before {
        return Ok(format!(
            "{} includes {} already: `ssh NAME.{domain}` reaches VMs",
            config.display(),
            included.display()
        ));
    }
    if let Some(folder) = config.parent() {
        let made = std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder);
        made.map_err(|e| cannot_write(folder, &e))?;
    }
    replace(&config, 0o600, &after).map_err(|e| cannot_write(&config, &e))?;
    Ok(format!(
        "{} includes {} now: `ssh NAME.{domain}` reaches VMs",
        config.display(),
        included.display()
    ))
}

/// Takes both away; gives what was done.
pub(super) fn uninstall(places: &Places) -> Result<String, Failure> {
    let config = user_config(places)?;
    let before = read(&config)?;
    let after = without_include(&before);
    if after != before {
        replace(&config, 0o600, &after).map_err(|e| cannot_write(&config, &e))?;
    }
    if let Some(folder) = &places.config {
        let included = folder.join(INCLUDED);
        match std::fs::remove_file(&included) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(cannot_write(&included, &e)),
            _ => {}
        }
    }
    Ok(if after == before {
        format!("{} does not include Offshoot's VMs", config.display())
    } else {
        format!("{} does not include Offshoot's VMs any more", config.display())
    })
}

fn cannot_write(path: &Path, e: &io::Error) -> Failure {
    Failure::io(format!("cannot write {}", path.display()), e)
}

/// `~/.ssh/config`, or what it is a link to.
fn user_config(places: &Places) -> Result<PathBuf, Failure> {
    let home = places.home.as_deref().ok_or_else(|| {
        Failure::invalid("there is no home folder with a `.ssh/config`").hint("set HOME to your home folder")
    })?;
    let config = home.join(".ssh/config");
    Ok(std::fs::canonicalize(&config).unwrap_or(config))
}

fn read(path: &Path) -> Result<String, Failure> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(e) => Err(Failure::io(format!("cannot read {}", path.display()), &e)),
    }
}

/// The user's file with our lines first: what stands after a `Host` belongs to that host alone.
fn with_include(before: &str, included: &Path) -> Result<String, Failure> {
    let rest = without_include(before);
    let include = format!("{MARK}\nInclude {}\n", quote::argument(included)?);
    Ok(if rest.is_empty() {
        include
    } else {
        format!("{include}\n{rest}")
    })
}

/// The user's file without our lines, whatever they include.
fn without_include(text: &str) -> String {
    let Some((before, ours)) = text.split_once(MARK) else {
        return text.to_owned();
    };
    let ours = ours.strip_prefix('\n').unwrap_or(ours);
    let after = match ours.split_once('\n') {
        Some((first, rest)) if first.starts_with("Include ") => rest,
        None if ours.starts_with("Include ") => "",
        _ => ours,
    };
    format!("{before}{}", after.strip_prefix('\n').unwrap_or(after))
}

/// Replaces a file, whole or not at all; one that was there keeps its mode.
fn replace(path: &Path, mode: u32, text: &str) -> io::Result<()> {
    let mode = std::fs::metadata(path).map_or(mode, |meta| meta.permissions().mode() & 0o7777);
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(format!(".new-{}", std::process::id()));
    let fresh = PathBuf::from(fresh);
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&fresh)
        .and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        })
        .and_then(|()| std::fs::rename(&fresh, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&fresh);
    }
    written
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;

    use super::*;

    #[test]
    fn it_comes_first_and_once_and_goes_without_a_trace() {
        for before in ["", "Host github.com\n    User git\n", "\n# mine\nHost *\n"] {
            let home = tempfile::tempdir().unwrap();
            let places = Places {
                home: Some(home.path().to_owned()),
                config: Some(home.path().join("my config/offshoot")),
            };
            let config = home.path().join(".ssh/config");
            if !before.is_empty() {
                std::fs::create_dir(home.path().join(".ssh")).unwrap();
                std::fs::write(&config, before).unwrap();
                std::fs::set_permissions(&config, Permissions::from_mode(0o640)).unwrap();
            }
            let said = install(&places, "Host *.vm.internal\n", "vm.internal").unwrap();
            assert!(said.contains(" now: "), "{said}");
            let text = std::fs::read_to_string(&config).unwrap();
            assert!(text.starts_with(MARK) && text.ends_with(before), "{text}");
            let include = format!(
                "Include \"{}\"",
                home.path().join("my config/offshoot/ssh_config").display()
            );
            assert_eq!(text.lines().nth(1).unwrap(), include);
            let mode = std::fs::metadata(&config).unwrap().permissions().mode() & 0o7777;
            assert_eq!(mode, if before.is_empty() { 0o600 } else { 0o640 });

            let said = install(&places, "other\n", "vm.internal").unwrap();
            assert!(said.contains(" already: "), "{said}");
            assert_eq!(std::fs::read_to_string(&config).unwrap(), text);

            let said = uninstall(&places).unwrap();
            assert!(said.ends_with(" any more"), "{said}");
            assert_eq!(std::fs::read_to_string(&config).unwrap(), before);
            assert!(!home.path().join("my config/offshoot/ssh_config").exists());
            assert!(!uninstall(&places).unwrap().ends_with("any more"));
        }
    }

    #[test]
    fn a_link_stays_one() {
        let home = tempfile::tempdir().unwrap();
        let places = Places {
            home: Some(home.path().to_owned()),
            config: Some(home.path().join("config")),
        };
        std::fs::create_dir(home.path().join(".ssh")).unwrap();
        let dotfiles = home.path().join("dotfiles");
        std::fs::write(&dotfiles, "Host a\n").unwrap();
        std::os::unix::fs::symlink(&dotfiles, home.path().join(".ssh/config")).unwrap();
        install(&places, "", "vm.internal").unwrap();
        assert!(home.path().join(".ssh/config").is_symlink());
        assert!(std::fs::read_to_string(&dotfiles).unwrap().starts_with(MARK));
    }
}
