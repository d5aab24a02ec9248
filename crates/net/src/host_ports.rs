//! Who chooses the host's ports for what VMs publish.

use std::io;

use offshoot_model::{ErrorKind, Explain, PublishedPort};

use crate::Namespace;
use crate::ports::{bind, meet};

/// Chooses ports of the host. Asked once for a VM, when it is created; VMs are created one at a time.
pub trait HostPorts: Send + Sync {
    /// What is `asked` for, with a free port in place of each 0; refuses what is taken. `given` are the published ports
    /// of all VMs that exist.
    fn choose(
        &self,
        asked: &[PublishedPort],
        given: &[PublishedPort],
    ) -> Result<Vec<PublishedPort>, Box<dyn Explain + Send + Sync>>;
}

/// Why a port cannot be published.
#[derive(Debug, thiserror::Error)]
pub enum HostPortError {
    /// Another VM has it, or it was asked for twice.
    #[error("{} port {} of the host is published already", port.transport, port.host)]
    Published {
        /// What was asked for.
        port: PublishedPort,
    },
    /// Some program has it, or the address is not the host's.
    #[error("cannot have {} port {} of the host", port.transport, port.host)]
    Bind {
        /// What was asked for.
        port: PublishedPort,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Explain for HostPortError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::Conflict
    }

    fn hints(&self) -> Vec<String> {
        let (Self::Published { port } | Self::Bind { port, .. }) = self;
        let free = PublishedPort { host: 0, ..*port };
        vec![format!(
            "choose another port of the host, or `-p {free}` for one that is free; see who has it with `offshoot port` and `ss -lntup`"
        )]
    }
}

/// Chooses ports by binding them for a moment in a namespace.
#[derive(Clone, Debug)]
pub struct FreePorts {
    /// Where they are looked for.
    pub namespace: Namespace,
}

impl HostPorts for FreePorts {
    fn choose(
        &self,
        asked: &[PublishedPort],
        given: &[PublishedPort],
    ) -> Result<Vec<PublishedPort>, Box<dyn Explain + Send + Sync>> {
        let chosen = self.namespace.run(|| choose(asked, given));
        match chosen {
            Ok(chosen) => chosen.map_err(|error| Box::new(error) as Box<dyn Explain + Send + Sync>),
            Err(source) => match asked.first() {
                Some(port) => Err(Box::new(HostPortError::Bind { port: *port, source })),
                None => Ok(Vec::new()),
            },
        }
    }
}

fn choose(asked: &[PublishedPort], given: &[PublishedPort]) -> Result<Vec<PublishedPort>, HostPortError> {
    let mut chosen: Vec<PublishedPort> = Vec::new();
    // All are held until the last one is chosen, so that none is chosen twice.
    let mut held = Vec::new();
    for port in asked {
        // Before the kernel is asked: the ports of VMs that run are bound.
        if port.host != 0 && given.iter().chain(&chosen).any(|other| meet(port, other)) {
            return Err(HostPortError::Published { port: *port });
        }
        let bound = loop {
            let bound = bind(port).map_err(|source| HostPortError::Bind { port: *port, source })?;
            let taken = |other: &PublishedPort| {
                meet(
                    &PublishedPort {
                        host: bound.1,
                        ..*port
                    },
                    other,
                )
            };
            if !given.iter().chain(&chosen).any(taken) {
                break bound;
            }
            held.push(bound.0);
        };
        held.push(bound.0);
        chosen.push(PublishedPort {
            host: bound.1,
            ..*port
        });
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;
    use offshoot_model::Transport;
    use std::net::{Ipv4Addr, TcpListener};

    fn port(text: &str) -> PublishedPort {
        let (host, guest) = text.split_once(':').unwrap();
        PublishedPort {
            address: Some(Ipv4Addr::LOCALHOST.into()),
            host: host.parse().unwrap(),
            guest: guest.parse().unwrap(),
            transport: Transport::Tcp,
        }
    }

    #[test]
    fn free_ports_are_free_and_taken_ones_refused() {
        let chosen = choose(&[port("0:80"), port("0:81")], &[]).unwrap();
        assert_ne!(chosen[0].host, chosen[1].host);
        assert!(chosen.iter().all(|port| port.host != 0));
        assert_eq!(chosen[1].guest, 81);
        let twice = choose(
            &[chosen[0]],
            &[PublishedPort {
                address: None,
                ..chosen[0]
            }],
        );
        assert!(matches!(twice, Err(HostPortError::Published { .. })), "{twice:?}");

        let somebody = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let taken = port(&format!("{}:80", somebody.local_addr().unwrap().port()));
        let refused = choose(&[taken], &[]).unwrap_err();
        assert!(matches!(refused, HostPortError::Bind { .. }), "{refused}");
        assert!(
            refused.hints()[0].contains("127.0.0.1:0:80"),
            "{:?}",
            refused.hints()
        );
    }
}
