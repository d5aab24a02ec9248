//! `-p [ADDRESS:]HOST:GUEST[/udp]`: ports of the host that lead into a VM, as users write them, and single ports of a guest.

use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::str::FromStr;

use crate::{PublishedPort, Transport};

/// How much of a refused text is shown.
const MAX_SHOWN: usize = 80;

/// Why a text is not a port, or ports, to publish.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a port to publish: {what}")]
pub struct PublishError {
    /// The refused text, shortened, control characters escaped.
    pub text: String,
    /// What is wrong with it.
    pub what: PublishMistake,
}

/// What is wrong with a port to publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PublishMistake {
    /// None of the forms.
    #[error(
        "write HOST:GUEST, ADDRESS:HOST:GUEST, or GUEST for any free port of the host, and `/udp` behind it for UDP"
    )]
    Form,
    /// No port number.
    #[error("a port is a number from 1 to 65535, or two with a hyphen between them, the smaller one first")]
    Port,
    /// Not an address.
    #[error("the address is none of the host's in numbers, such as 127.0.0.1 or [::1]")]
    Address,
    /// Not a protocol.
    #[error("the protocol behind the `/` is `tcp` or `udp`")]
    Transport,
    /// Ranges of different lengths.
    #[error("the host's ports are not as many as the guest's")]
    Ranges,
    /// More than a VM may have.
    #[error("a VM publishes at most {} ports", PublishedPort::MAX)]
    TooMany,
}

impl FromStr for Transport {
    type Err = PublishMistake;

    fn from_str(text: &str) -> Result<Self, PublishMistake> {
        match text.to_ascii_lowercase().as_str() {
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            _ => Err(PublishMistake::Transport),
        }
    }
}

/// A port of a guest, `80` or `53/udp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestPort {
    /// Its number, at least 1.
    pub port: u16,
    /// TCP or UDP.
    pub transport: Transport,
}

impl fmt::Display for GuestPort {
    /// With the protocol, as Docker shows it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}/{}", self.port, self.transport))
    }
}

impl FromStr for GuestPort {
    type Err = PublishError;

    fn from_str(text: &str) -> Result<Self, PublishError> {
        let parse = || {
            let (port, transport) = split_transport(text)?;
            let port = number(port)?;
            Ok(Self { port, transport })
        };
        parse().map_err(|what| PublishError {
            text: shown(text),
            what,
        })
    }
}

impl PublishedPort {
    /// The most that one VM publishes: each is a rule of the firewall and a socket that the daemon holds.
    pub const MAX: usize = 512;

    /// The ports that one `-p` means: several where it names ranges.
    pub fn parse_all(text: &str) -> Result<Vec<Self>, PublishError> {
        parse_all(text).map_err(|what| PublishError {
            text: shown(text),
            what,
        })
    }

    /// The port of the guest.
    pub fn guest_port(&self) -> GuestPort {
        GuestPort {
            port: self.guest,
            transport: self.transport,
        }
    }
}

fn shown(text: &str) -> String {
    text.chars()
        .take(MAX_SHOWN)
        .flat_map(char::escape_debug)
        .collect()
}

fn parse_all(text: &str) -> Result<Vec<PublishedPort>, PublishMistake> {
    let (ports, transport) = split_transport(text)?;
    let (host, guest) = match ports.rsplit_once(':') {
        Some((host, guest)) => (host, guest),
        None => ("", ports),
    };
    // What is before the last colon but one is an address, even an empty one: `127.0.0.1::80`.
    let (address, host) = match host.rsplit_once(':') {
        Some((address, host)) => (Some(address), host),
        None if host.is_empty() && ports.contains(':') => return Err(PublishMistake::Form),
        None => (None, host),
    };
    let address = address.map(parse_address).transpose()?;
    let guest = range(guest)?;
    let host = if host.is_empty() { None } else { Some(range(host)?) };
    let count = usize::from(guest.end() - guest.start()) + 1;
    if count > PublishedPort::MAX {
        return Err(PublishMistake::TooMany);
    }
    if let Some(host) = &host
        && host.end() - host.start() != guest.end() - guest.start()
    {
        return Err(PublishMistake::Ranges);
    }
    let hosts = host.map(|host| *host.start());
    let ports = guest.clone().map(|port| PublishedPort {
        address,
        // The ranges are equally long, so that it stays a port.
        host: hosts.map_or(0, |first| first + (port - guest.start())),
        guest: port,
        transport,
    });
    Ok(ports.collect())
}

fn split_transport(text: &str) -> Result<(&str, Transport), PublishMistake> {
    match text.rsplit_once('/') {
        Some((ports, transport)) => Ok((ports, transport.parse()?)),
        None => Ok((text, Transport::Tcp)),
    }
}

fn parse_address(text: &str) -> Result<IpAddr, PublishMistake> {
    let address = match text.strip_prefix('[').and_then(|text| text.strip_suffix(']')) {
        Some(address) => address.parse().map(IpAddr::V6),
        None => text.parse().map(IpAddr::V4),
    };
    address
        .ok()
        .filter(|address| !address.is_multicast())
        .ok_or(PublishMistake::Address)
}

fn range(text: &str) -> Result<RangeInclusive<u16>, PublishMistake> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (number(first)?, number(last)?);
    if first > last {
        return Err(PublishMistake::Port);
    }
    Ok(first..=last)
}

fn number(text: &str) -> Result<u16, PublishMistake> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let number = text.parse().ok().filter(|number| digits && *number > 0);
    number.ok_or(PublishMistake::Port)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn port(address: Option<&str>, host: u16, guest: u16, transport: Transport) -> PublishedPort {
        PublishedPort {
            address: address.map(|address| address.parse().unwrap()),
            host,
            guest,
            transport,
        }
    }

    #[test]
    fn docker_s_forms_are_known() {
        let check = |text: &str, expected: &[PublishedPort]| {
            assert_eq!(PublishedPort::parse_all(text).as_deref(), Ok(expected), "{text}");
        };
        use Transport::{Tcp, Udp};
        check("80", &[port(None, 0, 80, Tcp)]);
        check("53/udp", &[port(None, 0, 53, Udp)]);
        check("8080:80", &[port(None, 8080, 80, Tcp)]);
        check("8080:80/tcp", &[port(None, 8080, 80, Tcp)]);
        check("127.0.0.1:53:53/UDP", &[port(Some("127.0.0.1"), 53, 53, Udp)]);
        check("127.0.0.1::80", &[port(Some("127.0.0.1"), 0, 80, Tcp)]);
        check("[::1]:8080:80", &[port(Some("::1"), 8080, 80, Tcp)]);
        check("[fd00::1]::80", &[port(Some("fd00::1"), 0, 80, Tcp)]);
        check("0.0.0.0:1:65535", &[port(Some("0.0.0.0"), 1, 65535, Tcp)]);
        check(
            "8000-8001:9000-9001/udp",
            &[port(None, 8000, 9000, Udp), port(None, 8001, 9001, Udp)],
        );
        check("7-8", &[port(None, 0, 7, Tcp), port(None, 0, 8, Tcp)]);
    }

    #[test]
    fn everything_else_is_refused_with_what_is_wrong() {
        use PublishMistake::{Address, Form, Port, Ranges, TooMany, Transport};
        for (text, what) in [
            ("", Port),
            ("http", Port),
            ("0", Port),
            ("8080:0", Port),
            ("0:80", Port),
            ("65536:80", Port),
            ("+80:80", Port),
            (" 80", Port),
            ("8080:", Port),
            (":80", Form),
            ("80/sctp", Transport),
            ("80/", Transport),
            ("localhost:80:80", Address),
            (":80:80", Address),
            ("::1:80:80", Address),
            ("224.0.0.1:80:80", Address),
            ("[127.0.0.1]:80:80", Address),
            ("1:2:3:4", Address),
            ("9-8:9-8", Port),
            ("8000-8001:80", Ranges),
            ("80:8000-8001", Ranges),
            ("1000-2000:1000-2000", TooMany),
        ] {
            let error = PublishedPort::parse_all(text).unwrap_err();
            assert_eq!(error.what, what, "{text}");
        }
        assert_eq!(
            "80".parse(),
            Ok(GuestPort {
                port: 80,
                transport: super::Transport::Tcp
            })
        );
        for bad in ["", "0", "80:80", "80-81", "80/x"] {
            assert!(bad.parse::<GuestPort>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_reads_back(
            address in prop::option::of(any::<IpAddr>()), host in 1_u16.., guest in 1_u16.., udp in any::<bool>(),
        ) {
            let transport = if udp { Transport::Udp } else { Transport::Tcp };
            let published = PublishedPort { address, host, guest, transport };
            prop_assume!(address.is_none_or(|address| !address.is_multicast()));
            prop_assert_eq!(PublishedPort::parse_all(&published.to_string()), Ok(vec![published]));
            let guest = published.guest_port();
            prop_assert_eq!(guest.to_string().parse(), Ok(guest));
        }

        #[test]
        fn any_text_is_some_ports_or_an_error_on_one_line(text in "\\PC{0,40}|[0-9:./\\[\\]\\-tcpud]{0,30}") {
            match PublishedPort::parse_all(&text) {
                Ok(ports) => {
                    prop_assert!((1..=PublishedPort::MAX).contains(&ports.len()));
                    prop_assert!(ports.iter().all(|port| port.guest > 0));
                }
                Err(error) => prop_assert!(!error.to_string().contains(char::is_control)),
            }
        }
    }
}
