//! What a VM may talk to: its rules while it runs, and the ports of the host that lead to it.
//!
//! ```text
//! start ── ports held ── rules in (one transaction)          stop ── rules out ── ports given back
//! new daemon ── rules of all VMs that run (one transaction, in place of what an earlier daemon left)
//! routes or switches of the host change, and every minute ── rules and forwarding follow
//! ```
//!
//! Not here: bridges and TAPs, and what the rules are ([`offshoot_net::firewall`]).

use std::time::Duration;

use async_trait::async_trait;
use offshoot_model::{
    Allowed, ErrorKind, Explain, Finding, KernelObject, Network, NetworkName, ObjectKind, Severity,
};
use offshoot_net::firewall::{Changes, Facts, Firewall, Guarded, NftError, Obstacle, TableName};
use offshoot_net::ports::Reservations;
use offshoot_store::db::{Db, DbError};
use sha2::{Digest as _, Sha256};
use tokio::sync::OnceCell;
use tokio::task::JoinHandle;

use super::network::tap_name;
use super::{chain, finding};
use crate::capability::{Capability, CapabilityError, Known};
use crate::definition::VmRecord;
use crate::networks::Networks;
use crate::run::Run;

/// How often it is looked whether our tables are still there: `systemctl restart nftables` takes them away.
const LOOK_EVERY: Duration = Duration::from_secs(60);

/// Guards VMs on networks.
pub struct FirewallCapability {
    networks: Networks,
    db: Db,
    firewall: Firewall,
    ports: Reservations,
    /// Set once the rules are those of all VMs that run.
    taken_over: OnceCell<()>,
    follower: JoinHandle<()>,
}

/// Why a VM cannot be guarded.
#[derive(Debug, thiserror::Error)]
enum GuardError {
    /// The row of its network is gone.
    #[error("the network `{name}` is gone")]
    NoNetwork {
        /// Its name.
        name: NetworkName,
    },
    /// The database.
    #[error(transparent)]
    Db(#[from] DbError),
}

impl Explain for GuardError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NoNetwork { .. } => ErrorKind::Internal,
            Self::Db(error) => error.kind(),
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::NoNetwork { name } => vec![format!("make it again with `offshoot net create {name}`")],
            Self::Db(error) => error.hints(),
        }
    }
}

fn boxed(error: impl Explain + Send + Sync + 'static) -> CapabilityError {
    Box::new(error)
}

impl FirewallCapability {
    /// For the networks of the daemon with this data directory, which tells its tables from others'. Called within a Tokio
    /// runtime.
    pub fn new(networks: Networks, db: Db, data_dir: &std::path::Path) -> Self {
        let digest = Sha256::digest(data_dir.as_os_str().as_encoded_bytes());
        let table = TableName::new([digest[0], digest[1], digest[2], digest[3]]);
        let namespace = networks.namespace().clone();
        let firewall = Firewall::new(namespace.clone(), table);
        // One that cannot be told of changes finds out within the minute.
        let changes = Changes::listen(&namespace)
            .inspect_err(|error| tracing::warn!(%error, "cannot follow routes of this host"))
            .ok();
        Self {
            follower: tokio::spawn(follow(firewall.clone(), changes)),
            ports: Reservations::new(namespace),
            taken_over: OnceCell::new(),
            networks,
            db,
            firewall,
        }
    }

    /// What a VM is guarded by; nothing when it is on no network.
    fn guarded(&self, vm: &VmRecord) -> Result<Option<(Network, Guarded)>, GuardError> {
        let Some(attachment) = &vm.definition.attachment else {
            return Ok(None);
        };
        let network = self.networks.get(&attachment.network);
        let network = network.ok_or_else(|| GuardError::NoNetwork {
            name: attachment.network.clone(),
        })?;
        let config = &vm.definition.config.network;
        let guarded = Guarded {
            tap: tap_name(&vm.id),
            attachment: attachment.clone(),
            nat: config.nat,
            isolate: config.isolate,
            host: config.allow.contains(&Allowed::Host),
            metadata: config.allow.contains(&Allowed::Metadata),
        };
        Ok(Some(((*network).clone(), guarded)))
    }

    /// Once: the rules become those of the VMs that an earlier daemon left running, all at the same time. With those of only
    /// some, the others would be cut off for a moment.
    async fn take_over(&self) -> Result<(), CapabilityError> {
        let taken = self.taken_over.get_or_try_init(|| async {
            let rows = self.db.call(Db::vms).await;
            let rows = rows.map_err(|error| boxed(GuardError::from(error)))?;
            let records = rows.into_iter().filter_map(|row| VmRecord::from_row(row).ok());
            let running = records.filter(|vm| vm.life.state.has_vmm());
            let vms: Vec<_> = running
                .filter_map(|vm| self.guarded(&vm).ok().flatten())
                .collect();
            if vms.is_empty() {
                return Ok(());
            }
            self.firewall.insert(vms).await.map_err(boxed)
        });
        taken.await.copied()
    }

    async fn guard(&self, vm: &VmRecord) -> Result<(), CapabilityError> {
        self.take_over().await?;
        match self.guarded(vm).map_err(boxed)? {
            Some(guarded) => self.firewall.insert(vec![guarded]).await.map_err(boxed),
            None => Ok(()),
        }
    }

    fn hold_ports(&self, vm: &VmRecord) -> Result<(), CapabilityError> {
        match &vm.definition.attachment {
            Some(attachment) => self
                .ports
                .hold(vm.id.as_str(), vm.name.as_str(), &attachment.publish)
                .map_err(boxed),
            None => Ok(()),
        }
    }
}

impl Drop for FirewallCapability {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

/// Keeps rules and forwarding as they should be while the host changes.
async fn follow(firewall: Firewall, mut changes: Option<Changes>) {
    let mut minute = tokio::time::interval(LOOK_EVERY);
    minute.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    minute.tick().await;
    loop {
        let heard = async {
            match &mut changes {
                Some(changes) => changes.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = minute.tick() => {}
            more = heard => if !more {
                changes = None;
                continue;
            },
        }
        match firewall.refresh().await {
            Ok(false) => {}
            Ok(true) => tracing::warn!("somebody removed the rules of VMs; they are there again"),
            Err(error) => tracing::warn!(
                causes = chain(&error),
                "cannot keep the rules of VMs as they should be"
            ),
        }
    }
}

#[async_trait]
impl Capability for FirewallCapability {
    fn name(&self) -> &'static str {
        "firewall"
    }

    async fn check(&self) -> Vec<Finding> {
        match self.firewall.look().await {
            Ok(facts) => judge(&facts),
            Err(error) => vec![unusable(
                "nftables-unusable",
                chain(&error),
                "look at the daemon's log",
            )],
        }
    }

    async fn prepare(&self, run: &Run) -> Result<(), CapabilityError> {
        self.hold_ports(&run.vm)?;
        self.guard(&run.vm).await
    }

    async fn adopt(&self, run: &Run) -> Result<(), CapabilityError> {
        // The VM runs; that something of this fails is no reason to end it.
        if let Err(error) = self.hold_ports(&run.vm) {
            let said = chain(&*error);
            tracing::warn!(vm = %run.vm.name, causes = said, "cannot hold a running VM's ports again");
        }
        if let Err(error) = self.guard(&run.vm).await {
            let said = format!("its rules may not be as they should be: {}", chain(&*error));
            run.health().degrade(said);
        }
        Ok(())
    }

    async fn stop(&self, run: &Run) -> Result<(), CapabilityError> {
        let removed = self.firewall.remove(tap_name(&run.vm.id)).await;
        self.ports.release(run.vm.id.as_str());
        removed.map_err(boxed)
    }

    async fn leftovers(&self, _known: Known<'_>) -> Vec<KernelObject> {
        if let Err(error) = self.take_over().await {
            tracing::warn!(
                causes = chain(&*error),
                "cannot take over the rules of VMs that run"
            );
            return Vec::new();
        }
        match self.firewall.is_left_over().await {
            Ok(true) => vec![KernelObject {
                kind: ObjectKind::NftTable,
                name: self.firewall.table().to_string(),
            }],
            Ok(false) => Vec::new(),
            Err(error) => {
                tracing::debug!(causes = chain(&error), "cannot look for rules that are left");
                Vec::new()
            }
        }
    }

    async fn remove_leftover(&self, _object: &KernelObject) -> Result<(), CapabilityError> {
        self.firewall.remove_left_over().await.map_err(boxed)
    }
}

/// What it costs that there can be no rules.
const NO_RULES: &str = "VMs cannot be put onto networks; those with `--network none` run";

fn unusable(id: &str, message: impl Into<String>, hint: &str) -> Finding {
    finding("firewall", Severity::Warning, message, hint)
        .id(id)
        .cost(NO_RULES)
}

fn judge(facts: &Facts) -> Vec<Finding> {
    let nft = match &facts.usable {
        Ok(()) => Finding::ok("firewall", "nft and the kernel can guard VMs").id("nftables"),
        Err(error @ NftError::Missing) => {
            unusable("nftables-missing", error.to_string(), "apt install nftables")
        }
        Err(error) => unusable(
            "nftables-unusable",
            chain(error),
            "load `nf_tables`, `nft_chain_nat`, `nft_fib_inet` and `nft_reject_inet` with modprobe, and give the daemon CAP_NET_ADMIN",
        ),
    };
    let mut findings = vec![nft];
    if facts.obstacles.is_empty() {
        let said = "no rules of others stop what goes to and from VMs";
        findings.push(Finding::ok("firewall", said).id("forward-open"));
    }
    findings.extend(facts.obstacles.iter().map(obstacle));
    findings
}

/// A verdict of ours does not outweigh one of others: a packet passes when all let it.
fn obstacle(found: &Obstacle) -> Finding {
    let Obstacle { table, chain, docker } = found;
    let way_out = if *docker {
        "let them pass: `iptables -I DOCKER-USER -i ofs-+ -j ACCEPT; iptables -I DOCKER-USER -o ofs-+ -j ACCEPT`"
            .to_owned()
    } else {
        format!(
            "let them pass: `nft insert rule {table} {chain} iifname '\"ofs-*\"' accept; nft insert rule {table} {chain} oifname '\"ofs-*\"' accept`"
        )
    };
    let message = format!("the chain `{chain}` of the table `{table}` drops what it does not know");
    finding("firewall", Severity::Warning, message, way_out)
        .id("forward-dropped")
        .cost("VMs reach nothing beyond the host, and their published ports are not reached from outside")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(facts: &Facts, expected: &[&str]) {
        let findings = judge(facts);
        let bad: Vec<_> = findings
            .iter()
            .filter(|found| found.severity != Severity::Ok)
            .collect();
        let ids: Vec<_> = bad.iter().map(|found| found.id.as_str()).collect();
        assert_eq!(ids, expected, "{facts:?}");
        for found in bad {
            assert_eq!(found.severity, Severity::Warning, "VMs without a network run");
            assert!(!found.cost.is_empty() && !found.hint.is_empty(), "{found:?}");
        }
    }

    #[test]
    fn what_would_stop_vms_is_told_with_the_command_that_mends_it() {
        let obstacle = |docker| Obstacle {
            table: "ip filter".into(),
            chain: "FORWARD".into(),
            docker,
        };
        let facts = |usable, obstacles| Facts { usable, obstacles };
        check(&facts(Ok(()), vec![]), &[]);
        check(&facts(Err(NftError::Missing), vec![]), &["nftables-missing"]);
        let words = "Operation not permitted".to_owned();
        let refused = facts(Err(NftError::Refused { words }), vec![]);
        check(&refused, &["nftables-unusable"]);
        assert!(judge(&refused)[0].message.contains("not permitted"));
        let docker = facts(Ok(()), vec![obstacle(true)]);
        check(&docker, &["forward-dropped"]);
        assert!(judge(&docker)[1].hint.contains("DOCKER-USER -i ofs-+"));
        let plain = judge(&facts(Ok(()), vec![obstacle(false)]));
        assert!(plain[1].hint.contains("nft insert rule ip filter FORWARD"));
    }
}
