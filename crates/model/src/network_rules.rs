//! What a VM may ask of networks, on any host.

use std::collections::HashSet;

use crate::{NetworkChoice, NetworkConfig, PublishedPort};

/// Why a VM cannot have such a place on a network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetworkConfigError {
    /// Something that needs a network, in a VM without one.
    #[error("a VM without a network {what}")]
    NoNetwork {
        /// What it cannot have: `publishes no ports`.
        what: &'static str,
    },
    /// Too many ports.
    #[error("{given} published ports are too many for one VM: at most {most}")]
    TooManyPorts {
        /// What was asked for.
        given: usize,
        /// The most.
        most: usize,
    },
    /// Guests have no port 0.
    #[error("cannot publish `{port}`: a guest's port is a number from 1 to 65535")]
    GuestPort {
        /// What was asked for.
        port: PublishedPort,
    },
    /// An address that no host has for itself.
    #[error("cannot publish `{port}`: the address is none of a host's")]
    Address {
        /// What was asked for.
        port: PublishedPort,
    },
    /// One port of the host for two of the guest.
    #[error("{} port {} of the host is published twice", port.transport, port.host)]
    Twice {
        /// What was asked for the second time.
        port: PublishedPort,
    },
    /// The same permission again.
    #[error("{given} things to allow are too many: there are {most}")]
    TooManyAllowed {
        /// What was asked for.
        given: usize,
        /// The most.
        most: usize,
    },
}

impl NetworkConfigError {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NoNetwork { .. } => "leave `--network none` away, or leave away what needs a network",
            Self::TooManyPorts { .. } => {
                "publish fewer ports, or reach the VM by its own address from this host"
            }
            Self::GuestPort { .. } | Self::Address { .. } => {
                "write `-p [ADDRESS:]HOST:GUEST[/udp]`, such as `-p 127.0.0.1:8080:80`"
            }
            Self::Twice { .. } => "choose another port of the host, or leave it away and the daemon chooses",
            Self::TooManyAllowed { .. } => "name `host` and `metadata` once each",
        }
    }
}

/// As many as there are words for [`crate::Allowed`].
const MAX_ALLOWED: usize = 2;

impl NetworkConfig {
    /// Refuses what no host can do. Pure.
    pub fn validate(&self) -> Result<(), NetworkConfigError> {
        if self.network == NetworkChoice::None {
            let refuse = |what| Err(NetworkConfigError::NoNetwork { what });
            if !self.publish.is_empty() {
                return refuse("publishes no ports");
            }
            if self.ipv4.is_some() {
                return refuse("has no address");
            }
            if !self.allow.is_empty() {
                return refuse("reaches nothing, whatever is allowed");
            }
        }
        if self.allow.len() > MAX_ALLOWED {
            return Err(NetworkConfigError::TooManyAllowed {
                given: self.allow.len(),
                most: MAX_ALLOWED,
            });
        }
        if self.publish.len() > PublishedPort::MAX {
            return Err(NetworkConfigError::TooManyPorts {
                given: self.publish.len(),
                most: PublishedPort::MAX,
            });
        }
        let mut taken = HashSet::new();
        for port in &self.publish {
            if port.guest == 0 {
                return Err(NetworkConfigError::GuestPort { port: *port });
            }
            if port.address.is_some_and(|address| address.is_multicast()) {
                return Err(NetworkConfigError::Address { port: *port });
            }
            if port.host != 0 && !taken.insert((port.address, port.host, port.transport)) {
                return Err(NetworkConfigError::Twice { port: *port });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Allowed, Transport};

    fn port(host: u16, guest: u16) -> PublishedPort {
        PublishedPort {
            address: None,
            host,
            guest,
            transport: Transport::Tcp,
        }
    }

    #[test]
    fn a_place_on_a_network_is_checked() {
        let check = |change: &dyn Fn(&mut NetworkConfig), expected: Option<&str>| {
            let mut config = NetworkConfig::default();
            change(&mut config);
            let said = config.validate().err().map(|error| error.to_string());
            assert_eq!(said.is_some(), expected.is_some(), "{said:?}");
            if let (Some(said), Some(expected)) = (said, expected) {
                assert!(said.contains(expected), "{said}");
            }
        };
        check(&|_| (), None);
        check(&|config| config.network = NetworkChoice::None, None);
        check(
            &|config| {
                config.network = NetworkChoice::None;
                (config.isolate, config.nat) = (true, false);
            },
            None,
        );
        check(
            &|config| {
                config.network = NetworkChoice::None;
                config.publish = vec![port(1, 1)];
            },
            Some("publishes no ports"),
        );
        check(
            &|config| {
                config.network = NetworkChoice::None;
                config.ipv4 = Some([10, 0, 0, 2].into());
            },
            Some("has no address"),
        );
        check(
            &|config| {
                config.network = NetworkChoice::None;
                config.allow = vec![Allowed::Host];
            },
            Some("reaches nothing"),
        );
        check(
            &|config| config.publish = vec![port(1, 0)],
            Some("from 1 to 65535"),
        );
        check(
            &|config| config.publish = vec![port(8080, 80), port(8080, 81)],
            Some("tcp port 8080"),
        );
        check(&|config| config.publish = vec![port(0, 80), port(0, 80)], None);
        check(
            &|config| {
                let udp = PublishedPort {
                    transport: Transport::Udp,
                    ..port(53, 53)
                };
                config.publish = vec![port(53, 53), udp];
            },
            None,
        );
        check(
            &|config| {
                let address = Some([224, 0, 0, 1].into());
                config.publish = vec![PublishedPort {
                    address,
                    ..port(1, 1)
                }];
            },
            Some("none of a host's"),
        );
        check(&|config| config.publish = vec![port(0, 80); 512], None);
        check(
            &|config| config.publish = vec![port(0, 80); 513],
            Some("at most 512"),
        );
        check(&|config| config.allow = vec![Allowed::Host; 3], Some("too many"));
    }
}
