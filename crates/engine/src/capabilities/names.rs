//! Names: a DNS server on the gateway of each network that a VM runs on.
//!
//! What it answers is read from the engine's records ([`LiveZone`](crate::zone::LiveZone)); here it is only about when it
//! listens. Its sockets are the daemon's: nothing is left of them when the daemon is gone.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use offshoot_model::{Explain as _, Finding, Severity};
use offshoot_net::dns::{DnsServers, port_holder};

use super::{blocking, chain, finding};
use crate::capability::{Capability, CapabilityError};
use crate::networks::{NetworkError, Networks};
use crate::run::Run;

const NAME: &str = "names";
/// How often an adopted VM's server is tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// Serves names on the networks of VMs that run.
pub struct NamesCapability {
    /// The servers.
    pub servers: Arc<DnsServers>,
    /// The networks.
    pub networks: Networks,
}

fn ensure(servers: &DnsServers, networks: &Networks, run: &Run) -> Result<(), CapabilityError> {
    let Some(attachment) = &run.vm.definition.attachment else {
        return Ok(());
    };
    let missing = || NetworkError::NotFound {
        name: attachment.network.clone(),
    };
    let network = networks
        .get(&attachment.network)
        .ok_or_else(missing)
        .map_err(|error| Box::new(error) as CapabilityError)?;
    servers
        .ensure(&network, &run.vm.id)
        .map_err(|error| Box::new(error) as CapabilityError)?;
    Ok(())
}

#[async_trait]
impl Capability for NamesCapability {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn check(&self) -> Vec<Finding> {
        let (servers, namespace) = (Arc::clone(&self.servers), self.networks.namespace().clone());
        blocking(move || {
            let port = match port_holder(&namespace) {
                Ok(()) => {
                    Finding::ok(NAME, format!("VMs are called NAME.{}", servers.domain())).id("dns-port")
                }
                Err(error) => finding(
                    NAME,
                    Severity::Warning,
                    chain(&error),
                    error.hints().into_iter().next().unwrap_or_default(),
                )
                .id("dns-port-taken")
                .cost("no VM starts but those with `--network none`"),
            };
            let (upstreams, source) = servers.upstreams();
            let upstream = match upstreams.first() {
                Some(first) => Finding::ok(NAME, format!("other names are asked of {first} ({source})"))
                    .id("dns-upstream"),
                None => finding(
                    NAME,
                    Severity::Warning,
                    format!("{source} names no DNS server to ask for other names"),
                    "write `nameserver ADDRESS` there, or set `dns_upstream` in the daemon's config",
                )
                .id("dns-upstream-missing")
                .cost("VMs can look up each other, and nothing else"),
            };
            vec![port, upstream]
        })
        .await
    }

    async fn prepare(&self, run: &Run) -> Result<(), CapabilityError> {
        ensure(&self.servers, &self.networks, run)
    }

    /// A VM runs well without names: while they cannot be served it is degraded, and they are tried again.
    async fn adopt(&self, run: &Run) -> Result<(), CapabilityError> {
        let Err(error) = ensure(&self.servers, &self.networks, run) else {
            return Ok(());
        };
        let message = format!("its names cannot be served: {}", chain(&*error));
        let (health, over) = (run.health(), run.over.clone());
        health.degrade(message.clone());
        let (servers, networks) = (Arc::clone(&self.servers), self.networks.clone());
        let (network, id) = (run.vm.definition.attachment.as_ref(), run.vm.id.clone());
        let Some(network) = network.map(|attachment| attachment.network.clone()) else {
            return Ok(());
        };
        tokio::spawn(over.run_until_cancelled_owned(async move {
            loop {
                tokio::time::sleep(AGAIN).await;
                let network = networks.get(&network);
                if network.is_some_and(|network| servers.ensure(&network, &id).is_ok()) {
                    health.mend(&message);
                    return;
                }
            }
        }));
        Ok(())
    }

    async fn stop(&self, run: &Run) -> Result<(), CapabilityError> {
        self.servers.release(&run.vm.id);
        Ok(())
    }
}
