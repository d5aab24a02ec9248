//! Who is asked for names that are not ours: the addresses of the config, or those that the host itself asks.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::SystemTime;

use hickory_resolver::system_conf::parse_resolv_conf;
use serde::Deserialize;

use super::PORT;
use crate::Namespace;

/// Where the host's resolvers are named.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Where systemd-resolved names those that it asks itself, when [`RESOLV_CONF`] only names its own listener.
const BEHIND_RESOLVED: &str = "/run/systemd/resolve/resolv.conf";
/// Where ip-netns(8) keeps what replaces files of `/etc` in namespaces.
const OF_NAMESPACES: &str = "/etc/netns";
/// A longer file is not read: nobody needs it, and it is read while somebody waits.
const MAX_FILE: u64 = 64 << 10;
/// How many are asked; more would be asked after the client gave up (resolv.conf(5) takes three).
const MAX_SERVERS: usize = 3;

/// The address of a resolver, `ADDRESS[:PORT]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct UpstreamAddress(pub SocketAddr);

/// Why a text is not the address of a resolver.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not the address of a resolver, such as `9.9.9.9`, `10.0.0.1:5353` or `[2620:fe::fe]:53`"
)]
pub struct UpstreamError {
    /// The refused text, shortened.
    text: String,
}

impl FromStr for UpstreamAddress {
    type Err = UpstreamError;

    fn from_str(text: &str) -> Result<Self, UpstreamError> {
        let bare = |text: &str| text.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, PORT));
        let in_brackets = || bare(text.strip_prefix('[')?.strip_suffix(']')?);
        text.parse()
            .ok()
            .or_else(|| bare(text))
            .or_else(in_brackets)
            .filter(|address| address.port() != 0 && !address.ip().is_unspecified())
            .map(Self)
            .ok_or_else(|| UpstreamError {
                text: text.chars().take(80).flat_map(char::escape_debug).collect(),
            })
    }
}

impl TryFrom<String> for UpstreamAddress {
    type Error = UpstreamError;

    fn try_from(text: String) -> Result<Self, UpstreamError> {
        text.parse()
    }
}

impl fmt::Display for UpstreamAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where upstreams are named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UpstreamSource {
    /// In the config.
    Config(Vec<UpstreamAddress>),
    /// In this file, in the format of resolv.conf(5).
    File(PathBuf),
}

impl UpstreamSource {
    /// The addresses of the config, where it has any; otherwise the file for this namespace.
    pub fn of(configured: &[UpstreamAddress], namespace: &Namespace) -> Self {
        if !configured.is_empty() {
            return Self::Config(configured.to_vec());
        }
        let own = namespace
            .name()
            .map(|name| Path::new(OF_NAMESPACES).join(name).join("resolv.conf"));
        match own {
            Some(own) if own.exists() => Self::File(own),
            _ => Self::File(RESOLV_CONF.into()),
        }
    }

    /// The addresses that it names now.
    pub(crate) fn read(&self, namespace: &Namespace) -> Vec<SocketAddr> {
        let mut servers = match self {
            Self::Config(addresses) => addresses.iter().map(|address| address.0).collect(),
            Self::File(path) => {
                let servers = servers_of(path);
                // The listener of systemd-resolved cannot be reached from another namespace; those behind it can.
                let unreachable = namespace.name().is_some() && servers.iter().all(|s| s.ip().is_loopback());
                if unreachable && path == Path::new(RESOLV_CONF) {
                    servers_of(Path::new(BEHIND_RESOLVED))
                } else {
                    servers
                }
            }
        };
        servers.truncate(MAX_SERVERS);
        servers
    }

    /// What changes when the file does.
    pub(crate) fn stamp(&self) -> Option<Stamp> {
        let Self::File(path) = self else { return None };
        let meta = std::fs::metadata(path).ok()?;
        Some((meta.ino(), meta.len(), meta.modified().ok()?))
    }
}

impl fmt::Display for UpstreamSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config(_) => f.write_str("dns_upstream in the daemon's config"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

/// Inode, length and time of a file.
pub(crate) type Stamp = (u64, u64, SystemTime);

/// The name servers of a file; none where it cannot be read.
fn servers_of(path: &Path) -> Vec<SocketAddr> {
    let long = std::fs::metadata(path).map_or(true, |meta| meta.len() > MAX_FILE);
    if long {
        return Vec::new();
    }
    let Ok(text) = std::fs::read(path) else {
        return Vec::new();
    };
    match parse_resolv_conf(text) {
        Ok((config, _)) => config
            .name_servers()
            .iter()
            .map(|server| SocketAddr::new(server.ip, PORT))
            .collect(),
        // It says so where no server is named.
        Err(_) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upstream_is_an_address_with_or_without_a_port() {
        for (text, address) in [
            ("9.9.9.9", "9.9.9.9:53"),
            ("10.0.0.1:5353", "10.0.0.1:5353"),
            ("2620:fe::fe", "[2620:fe::fe]:53"),
            ("[2620:fe::fe]", "[2620:fe::fe]:53"),
            ("[2620:fe::fe]:54", "[2620:fe::fe]:54"),
        ] {
            assert_eq!(text.parse::<UpstreamAddress>().unwrap().to_string(), address);
        }
        for bad in [
            "",
            "dns.example",
            "1.2.3",
            "1.2.3.4:",
            "1.2.3.4:0",
            "1.2.3.4:70000",
            "0.0.0.0",
            "[::]",
        ] {
            assert!(bad.parse::<UpstreamAddress>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_file_names_servers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        let source = UpstreamSource::File(path.clone());
        let read = || source.read(&Namespace::own());
        assert_eq!((read(), source.stamp()), (vec![], None), "no file");
        std::fs::write(&path, "search lan\n").unwrap();
        assert_eq!(read(), [], "no server");
        std::fs::write(
            &path,
            "# c\nnameserver 10.0.0.1\nnonsense\nnameserver fd00::1\nnameserver 10.0.0.3\nnameserver 10.0.0.4\n",
        )
        .unwrap();
        let before = source.stamp();
        let expected: Vec<SocketAddr> = ["10.0.0.1:53", "[fd00::1]:53", "10.0.0.3:53"]
            .map(|text| text.parse().unwrap())
            .to_vec();
        assert_eq!(read(), expected);
        std::fs::write(&path, "nameserver 10.0.0.9\n").unwrap();
        assert_ne!(source.stamp(), before);
        std::fs::write(&path, vec![b'#'; 70_000]).unwrap();
        assert_eq!(read(), []);
    }
}
