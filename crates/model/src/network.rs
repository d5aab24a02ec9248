//! Networks of VMs: what is asked for, and what a VM was given.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{ErrorKind, Explain, VmName};

/// A MAC address (IEEE 802, EUI-48).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mac({self})")
    }
}

/// Why a text is not a MAC address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this is not a MAC address: six pairs of hex digits with colons between them")]
pub struct MacError;

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or(MacError)?;
            let two_digits = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
            *byte = u8::from_str_radix(part, 16)
                .ok()
                .filter(|_| two_digits)
                .ok_or(MacError)?;
        }
        parts.next().is_none().then_some(Self(bytes)).ok_or(MacError)
    }
}

impl TryFrom<String> for Mac {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, MacError> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> String {
        mac.to_string()
    }
}

/// The name of a network: one DNS label in lower case, at most 32 characters. `none` is not one.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NetworkName(String);

/// Why a text is not the name of a network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "this is not a network's name: use 1 to 32 lower-case letters, digits and hyphens, a letter or digit first and last, and not `none`"
)]
pub struct NetworkNameError;

impl Explain for NetworkNameError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidRequest
    }

    fn hints(&self) -> Vec<String> {
        vec!["choose a name such as `lab`; `offshoot net ls` shows those that are taken".into()]
    }
}

impl NetworkName {
    /// The network of VMs that ask for none by name.
    pub fn default_network() -> Self {
        Self("default".to_owned())
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NetworkName {
    type Err = NetworkNameError;

    fn from_str(text: &str) -> Result<Self, NetworkNameError> {
        let label: VmName = text.parse().map_err(|_| NetworkNameError)?;
        let valid = text.len() <= 32 && text != "none" && !text.bytes().any(|b| b.is_ascii_uppercase());
        valid.then(|| Self(label.into())).ok_or(NetworkNameError)
    }
}

impl TryFrom<String> for NetworkName {
    type Error = NetworkNameError;

    fn try_from(text: String) -> Result<Self, NetworkNameError> {
        text.parse()
    }
}

impl From<NetworkName> for String {
    fn from(name: NetworkName) -> String {
        name.0
    }
}

impl fmt::Display for NetworkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for NetworkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NetworkName({})", self.0)
    }
}

/// Which network a VM is on: a network's name, or `none`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum NetworkChoice {
    /// No network device at all.
    None,
    /// This network.
    On(NetworkName),
}

impl Default for NetworkChoice {
    fn default() -> Self {
        Self::On(NetworkName::default_network())
    }
}

impl FromStr for NetworkChoice {
    type Err = NetworkNameError;

    fn from_str(text: &str) -> Result<Self, NetworkNameError> {
        match text {
            "none" => Ok(Self::None),
            name => name.parse().map(Self::On),
        }
    }
}

impl TryFrom<String> for NetworkChoice {
    type Error = NetworkNameError;

    fn try_from(text: String) -> Result<Self, NetworkNameError> {
        text.parse()
    }
}

impl From<NetworkChoice> for String {
    fn from(choice: NetworkChoice) -> String {
        choice.to_string()
    }
}

impl fmt::Display for NetworkChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.pad("none"),
            Self::On(name) => name.fmt(f),
        }
    }
}

/// A transport protocol of a published port.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

impl Transport {
    /// The word for it, as nftables and `/etc/services` have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A port of the host that leads into a VM, `-p [ADDRESS:]HOST:GUEST[/udp]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
pub struct PublishedPort {
    /// The address of the host, IPv4 or IPv6 in numbers; every address when absent.
    #[schema(value_type = Option<String>, pattern = "^[0-9a-fA-F.:]{2,45}$")]
    #[serde(default)]
    pub address: Option<IpAddr>,
    /// The port of the host; 0 in a request lets the daemon choose a free one.
    #[serde(default)]
    pub host: u16,
    /// The port of the guest, at least 1.
    #[schema(minimum = 1)]
    pub guest: u16,
    /// TCP or UDP.
    #[serde(default)]
    pub transport: Transport,
}

impl fmt::Display for PublishedPort {
    /// As `-p` takes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            Some(IpAddr::V4(address)) => write!(f, "{address}:")?,
            None => {}
        }
        write!(f, "{}:{}", self.host, self.guest)?;
        match self.transport {
            Transport::Tcp => Ok(()),
            Transport::Udp => f.write_str("/udp"),
        }
    }
}

/// Something outside of its network that a VM may reach although VMs cannot by themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Allowed {
    /// Services of the host itself, on any of its addresses.
    Host,
    /// The metadata service of the cloud that the host runs in (169.254.169.254, fd00:ec2::254).
    Metadata,
}

/// What a VM asks of networks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct NetworkConfig {
    /// Which network: a name, or `none`.
    #[schema(value_type = String, default = "default", pattern = "^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$")]
    pub network: NetworkChoice,
    /// Whether it reaches what lies beyond the host, by the host's address.
    #[schema(default = true)]
    pub nat: bool,
    /// Whether it and the other VMs of its network are kept from each other.
    pub isolate: bool,
    /// What else it may reach.
    #[schema(max_items = 2)]
    pub allow: Vec<Allowed>,
    /// Ports of the host that lead to it.
    #[schema(max_items = 512)]
    pub publish: Vec<PublishedPort>,
    /// An address it must have; the daemon chooses when absent.
    #[schema(value_type = Option<String>, format = Ipv4)]
    pub ipv4: Option<Ipv4Addr>,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            network: NetworkChoice::default(),
            nat: true,
            isolate: false,
            allow: Vec::new(),
            publish: Vec::new(),
            ipv4: None,
        }
    }
}

/// What the agent's own SSH server is asked to do for a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct SshConfig {
    /// Whose private key opens it: lines of an `authorized_keys` (sshd(8)), without options.
    #[schema(max_items = 128)]
    pub keys: Vec<String>,
    /// The TCP port on the VM's address. Absent: 22, or none in a VM that runs its image's own init and sshd. 0: none.
    /// Whatever it is, the server answers over the agent's channel.
    pub port: Option<u16>,
}

impl SshConfig {
    /// The most keys: a person has a few, a team some dozens. All of them go to the guest in one message of 1 MiB.
    pub const MAX_KEYS: usize = 64;
}

/// A network as the daemon keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its name.
    pub name: NetworkName,
    /// The bridge in the host's kernel (or in the daemon's network namespace).
    pub bridge: String,
    /// Its addresses. The first one is the host's: gateway and DNS server.
    pub ipv4: Ipv4Net,
    /// Its unique local addresses (RFC 4193), a /64. The first one is the host's.
    pub ipv6: Ipv6Net,
    /// When it was made, milliseconds since the epoch.
    pub created_ms: u64,
}

impl Network {
    /// The host's IPv4 address: gateway and DNS server of the VMs.
    pub fn gateway4(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.ipv4.network()) + 1)
    }

    /// The host's IPv6 address.
    pub fn gateway6(&self) -> Ipv6Addr {
        Ipv6Addr::from(u128::from(self.ipv6.network()) + 1)
    }
}

/// What a VM was given on its network, for as long as it exists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The network.
    pub network: NetworkName,
    /// The guest's MAC address.
    pub mac: Mac,
    /// The guest's IPv4 address.
    pub ipv4: Ipv4Addr,
    /// The guest's IPv6 address.
    pub ipv6: Ipv6Addr,
    /// The published ports, with the host's ports chosen.
    pub publish: Vec<PublishedPort>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_reads_back_and_nothing_else_is_one() {
        let mac: Mac = "02:0a:ff:00:10:01".parse().unwrap();
        assert_eq!(mac.to_string(), "02:0a:ff:00:10:01");
        for bad in [
            "",
            "02:0a:ff:00:10",
            "02:0a:ff:00:10:01:02",
            "2:0a:ff:00:10:01",
            "0g:0a:ff:00:10:01",
            "+2:0a:ff:00:10:01",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }

    #[test]
    fn none_is_a_choice_and_no_name() {
        assert_eq!("none".parse(), Ok(NetworkChoice::None));
        assert!("none".parse::<NetworkName>().is_err());
        assert_eq!("default".parse(), Ok(NetworkChoice::default()));
        for bad in ["", "-a", "A", "a.b", "a/b", &"a".repeat(33)] {
            assert!(bad.parse::<NetworkChoice>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_host_has_the_first_address() {
        let network = Network {
            name: NetworkName::default_network(),
            bridge: "b".into(),
            ipv4: "10.1.2.0/24".parse().unwrap(),
            ipv6: "fd00:1::/64".parse().unwrap(),
            created_ms: 0,
        };
        assert_eq!(network.gateway4().to_string(), "10.1.2.1");
        assert_eq!(network.gateway6().to_string(), "fd00:1::1");
    }
}
