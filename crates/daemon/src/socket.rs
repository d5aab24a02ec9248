//! The API's socket: 0660, root and one group.

use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use anyhow::{Context as _, bail};
use tokio::net::UnixListener;

/// Listens at `path`. A socket that nobody listens at any more is replaced; a live one is another daemon's.
pub fn listen(path: &Path, group: &str) -> anyhow::Result<UnixListener> {
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => bail!("another offshootd listens at {}", path.display()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(_) => std::fs::remove_file(path)
            .with_context(|| format!("cannot replace the old socket {}", path.display()))?,
    }
    // The file is made with the mode it keeps: nobody gets in between bind and chmod.
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o117));
    let bound = UnixListener::bind(path);
    rustix::process::umask(before);
    let listener = bound.with_context(|| format!("cannot listen at {}", path.display()))?;
    if let Some(gid) = group_id(&std::fs::read_to_string("/etc/group").unwrap_or_default(), group) {
        chown(path, None, Some(gid))
            .with_context(|| format!("cannot give {} to the group `{group}`", path.display()))?;
    }
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o660))
        .with_context(|| format!("cannot set the mode of {}", path.display()))?;
    Ok(listener)
}

/// A group's id in the text of `/etc/group` (group(5)).
pub fn group_id(text: &str, name: &str) -> Option<u32> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == name).then(|| fields.nth(1)?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_found_by_name() {
        let text = "root:x:0:\nkvm:x:104:me\nbad\n";
        assert_eq!(group_id(text, "kvm"), Some(104));
        assert_eq!(group_id(text, "bad"), None);
        assert_eq!(group_id(text, "none"), None);
    }
}
