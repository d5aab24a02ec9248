//! A VM's place on its network: a TAP on the network's bridge, and what the guest is told of it.
//!
//! ```text
//! VMM ── descriptor ── TAP os-<VM's id> ── bridge ofs-<hash> ── host's addresses, routes, filters
//!        (the only one)                    (made with the first VM that runs, removed with the last)
//! ```
//!
//! The bridge is looked at and changed by one at a time: one without a TAP is idle, and whoever finds it so removes it. Where
//! there are pools of TAPs (`crate::tap_pool`), the TAP comes out of one, and the bridge stays for the sake of its pool.
//!
//! Not here: what may pass (the firewall's), names, and which address a VM has (`crate::networks`).

use std::sync::Arc;

use async_trait::async_trait;
use ipnet::Ipv4Net;
use offshoot_agent_proto::v1;
use offshoot_model::{
    Attachment, ErrorKind, Explain, Finding, KernelObject, Network, NetworkName, ObjectKind, Severity, VmId,
};
use offshoot_net::allocate;
use offshoot_net::links::{Link, LinkError, LinkKind};
use offshoot_vmm::plan::{NetBackend, NetPlan, TapSlot};
use tokio::task::JoinHandle;

use super::{chain, finding};
use crate::capability::{Capability, CapabilityError, Known, VmPlan};
use crate::definition::VmRecord;
use crate::networks::{Networks, bridge_plan};
use crate::paths::VmPaths;
use crate::run::Run;
use crate::tap_pool::{self, TapPoolFacts};

/// What the name of a VM's TAP begins with; its id follows, and 15 characters are full.
const TAP_PREFIX: &str = "os-";
/// What a VM is told as that lost its TAP.
const NO_TAP: &str = "its network device is gone: restart it with `offshoot restart`";

/// Puts VMs onto their networks.
pub struct NetworkCapability {
    networks: Networks,
    /// The domain of VMs' names.
    domain: String,
    /// Keeps pools of TAPs filled.
    keeper: JoinHandle<()>,
}

/// The row of a VM's network is gone.
#[derive(Debug, thiserror::Error)]
#[error("the network `{name}` is gone")]
struct NoNetwork {
    name: NetworkName,
}

impl Explain for NoNetwork {
    fn kind(&self) -> ErrorKind {
        ErrorKind::Internal
    }

    fn hints(&self) -> Vec<String> {
        vec![format!("make it again with `offshoot net create {}`", self.name)]
    }
}

/// Somebody else has a route to a network's addresses.
#[derive(Debug, thiserror::Error)]
#[error("the network `{name}` ({subnet}) collides with this host's route to {route}")]
struct Collides {
    name: NetworkName,
    subnet: Ipv4Net,
    route: Ipv4Net,
}

impl Explain for Collides {
    fn kind(&self) -> ErrorKind {
        ErrorKind::Conflict
    }

    fn hints(&self) -> Vec<String> {
        vec![
            "see whose route it is with `ip route`, and remove it; or make the VM again on another network, which `offshoot net create` makes"
                .into(),
        ]
    }
}

fn boxed(error: impl Explain + Send + Sync + 'static) -> CapabilityError {
    Box::new(error)
}

/// The interface of a VM's TAP.
pub fn tap_name(id: &VmId) -> String {
    format!("{TAP_PREFIX}{id}")
}

fn object(kind: ObjectKind, name: &str) -> KernelObject {
    KernelObject {
        kind,
        name: name.to_owned(),
    }
}

impl NetworkCapability {
    /// For the networks of one daemon. Called within a Tokio runtime.
    pub fn new(networks: Networks, domain: String) -> Self {
        Self {
            keeper: tokio::spawn(tap_pool::keep(networks.clone())),
            networks,
            domain,
        }
    }

    fn network(&self, attachment: &Attachment) -> Result<Arc<Network>, CapabilityError> {
        let found = self.networks.get(&attachment.network);
        found.ok_or_else(|| {
            boxed(NoNetwork {
                name: attachment.network.clone(),
            })
        })
    }

    /// Brings the bridge and the TAP of a running VM to what they should be; tells what was not so.
    async fn mend(&self, run: &Run, attachment: &Attachment) -> Result<Vec<String>, CapabilityError> {
        let (plan, name) = (bridge_plan(&*self.network(attachment)?), tap_name(&run.vm.id));
        let links = self.networks.links();
        let _bridges = self.networks.taps().bridges().await;
        let Some(tap) = links.find(&name).await.map_err(boxed)? else {
            run.health().degrade(NO_TAP.to_owned());
            return Ok(Vec::new());
        };
        let mut mended = Vec::new();
        let (bridge, lacked) = links.ensure_bridge(&plan).await.map_err(boxed)?;
        if let Some(lacked) = lacked {
            mended.push(format!("the bridge {} {lacked}", plan.name));
        }
        if tap.bridge != Some(bridge.index) || !tap.up {
            links.attach(&name, &bridge).await.map_err(boxed)?;
            mended.push(format!("put {name} back onto {}", plan.name));
        }
        Ok(mended)
    }

    /// Interfaces of ours that serve nobody: TAPs of VMs that are unknown, and bridges that are idle once those are gone.
    fn idle(&self, links: &[Link], known: Known<'_>) -> Vec<KernelObject> {
        let mut found = Vec::new();
        for network in self.networks.list() {
            let plan = bridge_plan(&network);
            let Some(bridge) = links.iter().find(|link| plan.is(link)) else {
                continue;
            };
            let on_it: Vec<_> = links
                .iter()
                .filter(|link| link.bridge == Some(bridge.index))
                .collect();
            let (left, in_use): (Vec<_>, Vec<_>) = on_it.into_iter().partition(|link| is_left(link, known));
            found.extend(left.iter().map(|tap| object(ObjectKind::Tap, &tap.name)));
            if in_use.is_empty() && !self.networks.taps().keeps_bridges() {
                found.push(object(ObjectKind::Bridge, &plan.name));
            }
        }
        found
    }
}

impl Drop for NetworkCapability {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

/// Whether an interface is the TAP of a VM that is unknown.
fn is_left(link: &Link, known: Known<'_>) -> bool {
    let id = link.name.strip_prefix(TAP_PREFIX).map(str::parse::<VmId>);
    link.kind == LinkKind::Tun && matches!(id, Some(Ok(id)) if !known(&id))
}

#[async_trait]
impl Capability for NetworkCapability {
    fn name(&self) -> &'static str {
        "network"
    }

    async fn check(&self) -> Vec<Finding> {
        let links = self.networks.links();
        let mut findings = vec![
            judge_tun(links.probe_tun()),
            judge_bridge(links.probe_bridge().await),
            judge_pool(&self.networks.taps().facts()),
        ];
        let looked = async {
            let mut found = Vec::new();
            for network in self.networks.list() {
                let plan = bridge_plan(&network);
                let bridge = links.find(&plan.name).await?;
                if bridge.as_ref().is_some_and(|link| !plan.is(link)) {
                    found.push(name_taken(&network));
                }
                let own = bridge.filter(|link| plan.is(link)).map(|link| link.index);
                let routes = links.routes(own.as_slice()).await?;
                if let Some(route) = allocate::colliding_route(network.ipv4, &routes) {
                    found.push(collision(&network, route));
                }
            }
            Ok::<_, LinkError>(found)
        };
        match looked.await {
            Ok(found) if found.is_empty() => {
                let message = format!(
                    "networks collide with nothing; new ones come from {}",
                    self.networks.pool()
                );
                findings.push(Finding::ok(self.name(), message).id("networks"));
            }
            Ok(found) => findings.extend(found),
            Err(error) => findings.push(warning(
                "networks-unreadable",
                chain(&error),
                "VMs cannot be put onto networks; those with `--network none` run",
                "look at the daemon's log, and whether it has CAP_NET_ADMIN",
            )),
        }
        findings
    }

    fn plan(&self, vm: &VmRecord, _paths: &VmPaths, plan: &mut VmPlan) -> Result<(), CapabilityError> {
        let Some(attachment) = &vm.definition.attachment else {
            return Ok(());
        };
        let network = self.network(attachment)?;
        plan.objects.push(object(ObjectKind::Tap, &tap_name(&vm.id)));
        plan.launch.nets.push(NetPlan {
            backend: NetBackend::TapFd(TapSlot::default()),
            mac: attachment.mac,
        });
        let gateways = vec![network.gateway4().to_string(), network.gateway6().to_string()];
        plan.guest.network = Some(v1::NetworkInterface {
            mac: attachment.mac.to_string(),
            addresses: vec![
                format!("{}/{}", attachment.ipv4, network.ipv4.prefix_len()),
                format!("{}/{}", attachment.ipv6, network.ipv6.prefix_len()),
            ],
            nameservers: gateways.clone(),
            gateways,
            domain: self.domain.clone(),
        });
        Ok(())
    }

    async fn prepare(&self, run: &Run) -> Result<(), CapabilityError> {
        let Some(attachment) = &run.vm.definition.attachment else {
            return Ok(());
        };
        let (plan, name) = (bridge_plan(&*self.network(attachment)?), tap_name(&run.vm.id));
        let links = self.networks.links();
        let taps = self.networks.taps();
        let bridges = taps.bridges().await;
        // With the bridge comes a route; somebody else's may have come while no VM of this network ran.
        if links.find(&plan.name).await.map_err(boxed)?.is_none() {
            let routes = links.routes(&[]).await.map_err(boxed)?;
            if let Some(route) = allocate::colliding_route(plan.ipv4.1, &routes) {
                return Err(boxed(Collides {
                    name: attachment.network.clone(),
                    subnet: plan.ipv4.1,
                    route,
                }));
            }
        }
        let (bridge, _) = links.ensure_bridge(&plan).await.map_err(boxed)?;
        if run.is_warm() {
            // The VMM has had it all the time; it led nowhere.
            return links.attach(&name, &bridge).await.map_err(boxed);
        }
        let tap = taps.tap(&bridges, &bridge, &name).await.map_err(boxed)?;
        // From here on it ends with the run's plan, unless the VMM takes it.
        for net in &run.plan.launch.nets {
            if let NetBackend::TapFd(slot) = &net.backend {
                slot.fill(tap.file);
                break;
            }
        }
        Ok(())
    }

    async fn adopt(&self, run: &Run) -> Result<(), CapabilityError> {
        let Some(attachment) = &run.vm.definition.attachment else {
            return Ok(());
        };
        match self.mend(run, attachment).await {
            Ok(mended) => {
                for line in mended {
                    tracing::warn!(vm = %run.vm.name, "{line}");
                }
            }
            // The VM runs; that it is cut off is no reason to end it.
            Err(error) => run
                .health()
                .degrade(format!("it is cut off from its network: {}", chain(&*error))),
        }
        Ok(())
    }

    async fn tend(&self, run: &Run) -> Result<Vec<String>, CapabilityError> {
        match &run.vm.definition.attachment {
            Some(attachment) => self.mend(run, attachment).await,
            None => Ok(Vec::new()),
        }
    }

    async fn stop(&self, run: &Run) -> Result<(), CapabilityError> {
        let Some(attachment) = &run.vm.definition.attachment else {
            return Ok(());
        };
        // What no VMM took.
        for net in &run.plan.launch.nets {
            if let NetBackend::TapFd(slot) = &net.backend {
                drop(slot.take());
            }
        }
        let links = self.networks.links();
        let _bridges = self.networks.taps().bridges().await;
        if let Some(tap) = links.find(&tap_name(&run.vm.id)).await.map_err(boxed)? {
            links.remove(&tap).await.map_err(boxed)?;
        }
        if self.networks.taps().keeps_bridges() {
            return Ok(());
        }
        if let Some(network) = self.networks.get(&attachment.network) {
            links
                .remove_idle_bridge(&bridge_plan(&network))
                .await
                .map_err(boxed)?;
        }
        Ok(())
    }

    async fn leftovers(&self, known: Known<'_>) -> Vec<KernelObject> {
        let _bridges = self.networks.taps().bridges().await;
        match self.networks.links().list().await {
            Ok(links) => self.idle(&links, known),
            Err(error) => {
                tracing::warn!(causes = chain(&error), "cannot look for interfaces that are left");
                Vec::new()
            }
        }
    }

    async fn remove_leftover(&self, object: &KernelObject) -> Result<(), CapabilityError> {
        let links = self.networks.links();
        let _bridges = self.networks.taps().bridges().await;
        if object.kind == ObjectKind::Bridge {
            // It may be in use by now.
            for network in self.networks.list() {
                if network.bridge == object.name {
                    links
                        .remove_idle_bridge(&bridge_plan(&network))
                        .await
                        .map_err(boxed)?;
                }
            }
            return Ok(());
        }
        match links.find(&object.name).await.map_err(boxed)? {
            Some(tap) => links.remove(&tap).await.map_err(boxed),
            None => Ok(()),
        }
    }
}

fn warning(id: &str, message: String, cost: &str, hint: &str) -> Finding {
    finding("network", Severity::Warning, message, hint)
        .id(id)
        .cost(cost)
}

/// The cost of a host that cannot have any network of ours.
const NO_NETWORKS: &str = "VMs cannot be put onto networks; those with `--network none` run";

fn judge_tun(probe: Result<(), LinkError>) -> Finding {
    match probe {
        Ok(()) => Finding::ok("network", "TAP devices can be made").id("tun"),
        Err(error) => warning(
            "tun-missing",
            chain(&error),
            NO_NETWORKS,
            "load the driver with `modprobe tun`; in a container, give it /dev/net/tun",
        ),
    }
}

fn judge_bridge(probe: Result<(), LinkError>) -> Finding {
    match probe {
        Ok(()) => Finding::ok("network", "bridges can be made").id("bridge"),
        Err(error) => warning(
            "bridge-unsupported",
            chain(&error),
            NO_NETWORKS,
            "load the driver with `modprobe bridge`, or run a kernel that has it",
        ),
    }
}

fn judge_pool(facts: &TapPoolFacts) -> Finding {
    let TapPoolFacts {
        size, ready, wanted, ..
    } = facts;
    match &facts.failure {
        Some(failure) => warning(
            "tap-pool-unfilled",
            format!("{ready} of {wanted} TAPs are ready: {failure}"),
            "starts make their TAPs themselves, which takes them a moment longer",
            "look at the daemon's log; `tap_pool_size = 0` in its config makes do without a pool",
        ),
        None if *size == 0 => Finding::ok("network", "no TAPs are kept ready").id("tap-pool"),
        // Fewer than wanted are there for a moment after each start.
        None => Finding::ok("network", format!("{ready} of {wanted} TAPs are ready")).id("tap-pool"),
    }
}

fn name_taken(network: &Network) -> Finding {
    warning(
        "bridge-name-taken",
        format!(
            "the interface `{}` is not ours, and the network `{}` needs that name",
            network.bridge, network.name
        ),
        "no VM on that network can start",
        &format!(
            "look at it with `ip -d link show {}`, and rename or remove it",
            network.bridge
        ),
    )
}

fn collision(network: &Network, route: Ipv4Net) -> Finding {
    warning(
        "subnet-collides",
        format!(
            "the network `{}` ({}) collides with this host's route to {route}",
            network.name, network.ipv4
        ),
        "its VMs, or what that route leads to, cannot be reached",
        &format!(
            "remove that route, or the network with `offshoot net rm {}` and make it again",
            network.name
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_lacks_something_is_told_what_and_never_refused() {
        let io = || LinkError::Socket(std::io::Error::from(std::io::ErrorKind::PermissionDenied));
        for (found, id) in [
            (judge_tun(Err(io())), "tun-missing"),
            (judge_bridge(Err(io())), "bridge-unsupported"),
        ] {
            assert_eq!((found.severity, found.id.as_str()), (Severity::Warning, id));
            assert!(!found.cost.is_empty() && !found.hint.is_empty(), "{found:?}");
        }
        let unfilled = TapPoolFacts {
            size: 4,
            ready: 1,
            wanted: 4,
            failure: Some("no room".into()),
        };
        let found = judge_pool(&unfilled);
        assert_eq!(
            (found.severity, found.id.as_str()),
            (Severity::Warning, "tap-pool-unfilled")
        );
        assert!(
            found.message.contains("1 of 4") && found.message.contains("no room"),
            "{found:?}"
        );
        assert_eq!(judge_pool(&TapPoolFacts::default()).severity, Severity::Ok);
        assert_eq!(judge_tun(Ok(())).severity, Severity::Ok);
        assert_eq!(judge_bridge(Ok(())).severity, Severity::Ok);
    }

    #[test]
    fn only_taps_of_vms_that_are_unknown_are_left() {
        let link = |name: &str, kind| Link {
            index: 1,
            name: name.into(),
            kind,
            bridge: Some(2),
            mac: None,
            mtu: 1500,
            up: true,
        };
        let here = VmId::from_bytes(&[1; 6]);
        let known = |id: &VmId| *id == here;
        assert!(is_left(&link("os-0123456789ab", LinkKind::Tun), &known));
        assert!(!is_left(&link(&tap_name(&here), LinkKind::Tun), &known));
        for other in ["os-0123", "tap0", "os-0123456789aX", "os-"] {
            assert!(!is_left(&link(other, LinkKind::Tun), &known), "{other}");
        }
        assert!(!is_left(&link("os-0123456789ab", LinkKind::Other), &known));
        assert_eq!(tap_name(&here).len(), 15);
    }
}
