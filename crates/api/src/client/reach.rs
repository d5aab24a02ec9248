//! Getting to the daemon's socket, and who may.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use tokio::net::UnixStream;

use super::error::ClientError;

/// Connects to the socket. Whoever may not is told which group may.
pub(super) async fn connect(socket: &Path) -> Result<UnixStream, ClientError> {
    UnixStream::connect(socket).await.map_err(|source| {
        let denied = source.kind() == io::ErrorKind::PermissionDenied;
        ClientError::Unreachable {
            group: denied.then(|| group_of(socket)).flatten(),
            socket: socket.to_owned(),
            source,
        }
    })
}

/// The name of the group that a file belongs to; nothing for root's own, and where it cannot be told.
fn group_of(path: &Path) -> Option<String> {
    let gid = std::fs::metadata(path).ok()?.gid();
    let groups = std::fs::read_to_string("/etc/group").ok()?;
    group_name(&groups, gid).filter(|_| gid != 0)
}

/// A group's name in the text of `/etc/group` (group(5)).
fn group_name(text: &str, gid: u32) -> Option<String> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(gid)).then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_found_by_id() {
        let text = "root:x:0:\nbad\nworse:x\nkvm:x:104:me\n";
        assert_eq!(group_name(text, 104).as_deref(), Some("kvm"));
        assert_eq!(group_name(text, 105), None);
    }
}
