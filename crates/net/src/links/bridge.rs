//! Bridges: made on demand, mended when somebody changed them, removed when nothing is on them.
//!
//! A bridge is ours when it has the name and the MAC address that its plan says. It gets both in the one request that makes
//! it, so that no crash leaves one that nobody knows.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use netlink_packet_route::address::AddressHeaderFlags;
use netlink_packet_route::link::{BridgeStpState, LinkAttribute};
use offshoot_model::Mac;
use rtnetlink::{LinkBridge, LinkMessageBuilder, LinkUnspec};
use rustix::io::Errno;

use super::{Link, LinkError, LinkKind, Links, RequestError};

/// A bridge as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BridgePlan {
    /// Its interface.
    pub name: String,
    /// Its own address: a bridge without one takes that of a port, and another one when that port goes, which guests
    /// notice as a gateway that is silent until their neighbour tables are refreshed.
    pub mac: Mac,
    /// The host's address on it, and the subnet.
    pub ipv4: (Ipv4Addr, Ipv4Net),
    /// The host's address on it, and the subnet.
    pub ipv6: (Ipv6Addr, Ipv6Net),
    /// The largest packet, bytes.
    pub mtu: u32,
}

impl BridgePlan {
    /// Whether this interface is that bridge, and not somebody else's of the same name.
    pub fn is(&self, link: &Link) -> bool {
        link.kind == LinkKind::Bridge && link.name == self.name && link.mac == Some(self.mac)
    }

    fn addresses(&self) -> [(IpAddr, u8); 2] {
        [
            (self.ipv4.0.into(), self.ipv4.1.prefix_len()),
            (self.ipv6.0.into(), self.ipv6.1.prefix_len()),
        ]
    }
}

impl Links {
    /// Makes the bridge unless it is there, and gives it what it lacks; says in a few words what it lacked. Refuses an
    /// interface of that name that is not ours.
    pub async fn ensure_bridge(&self, plan: &BridgePlan) -> Result<(Link, Option<&'static str>), LinkError> {
        let (link, mut lacked) = match self.find(&plan.name).await? {
            Some(link) => (link, None),
            None => (self.create_bridge(plan).await?, Some("was not there")),
        };
        if !plan.is(&link) {
            return Err(LinkError::NotOurs {
                name: plan.name.clone(),
            });
        }
        // IPv6 addresses go with an interface that is switched off, so up comes first.
        if !link.up || link.mtu != plan.mtu {
            let up = LinkUnspec::new_with_index(link.index).mtu(plan.mtu).up().build();
            self.change(up, &format!("bring {} up", plan.name)).await?;
            lacked.get_or_insert("was switched off");
        }
        let there = self.addresses(&link).await?;
        for (address, prefix) in plan.addresses() {
            if !there.contains(&(address, prefix)) {
                self.add_address(&link, address, prefix).await?;
                lacked.get_or_insert("lacked an address");
            }
        }
        let link = Link {
            up: true,
            mtu: plan.mtu,
            ..link
        };
        Ok((link, lacked))
    }

    /// The bridge, if it is there and ours.
    pub async fn find_bridge(&self, plan: &BridgePlan) -> Result<Option<Link>, LinkError> {
        Ok(self.find(&plan.name).await?.filter(|link| plan.is(link)))
    }

    /// Removes the bridge unless something is on it; it is no error if it is gone or not ours. Says whether it removed it.
    pub async fn remove_idle_bridge(&self, plan: &BridgePlan) -> Result<bool, LinkError> {
        let links = self.list().await?;
        let Some(bridge) = links.iter().find(|link| plan.is(link)) else {
            return Ok(false);
        };
        if links.iter().any(|link| link.bridge == Some(bridge.index)) {
            return Ok(false);
        }
        self.remove(bridge).await?;
        Ok(true)
    }

    /// Puts an interface onto a bridge and switches it on.
    pub async fn attach(&self, name: &str, bridge: &Link) -> Result<(), LinkError> {
        let Some(link) = self.find(name).await? else {
            return Err(LinkError::Gone {
                name: name.to_owned(),
            });
        };
        let change = LinkUnspec::new_with_index(link.index)
            .mtu(bridge.mtu)
            .controller(bridge.index)
            .up()
            .build();
        self.change(change, &format!("put {name} onto {}", bridge.name))
            .await
    }

    /// Whether the kernel can make bridges: it is asked for one with more queues than there can be, and refuses the number
    /// only when it knows what a bridge is (`rtnl_create_link` in net/core/rtnetlink.c). Loads the driver as a real
    /// request does, and makes nothing.
    pub async fn probe_bridge(&self) -> Result<(), LinkError> {
        let message = LinkMessageBuilder::<LinkBridge>::new("ofs-probe")
            .append_extra_attribute(LinkAttribute::NumTxQueues(u32::MAX))
            .build();
        match self
            .handle()
            .link()
            .add(message)
            .execute()
            .await
            .map_err(RequestError::from)
        {
            Ok(()) => Ok(()),
            Err(source) if source.is(Errno::INVAL) => Ok(()),
            Err(source) => Err(LinkError::Request {
                doing: "make bridges".into(),
                source,
            }),
        }
    }

    async fn create_bridge(&self, plan: &BridgePlan) -> Result<Link, LinkError> {
        let message = LinkMessageBuilder::<LinkBridge>::new(&plan.name)
            .address(plan.mac.0.to_vec())
            .mtu(plan.mtu)
            // One switch in a star: there is no loop to look for, and a new port shall pass packets at once.
            .stp_state(BridgeStpState::Disabled)
            .forward_delay(0)
            // Without a querier, snooping forgets who listens, and neighbour discovery is multicast.
            .mcast_snooping(false)
            // Frames that it keeps for itself pass no filter of bridges, and it would believe their senders.
            .no_linklocal_learn(true)
            .build();
        match self.handle().link().add(message).execute().await {
            Ok(()) => {}
            Err(error) => match RequestError::from(error) {
                // Somebody was faster; whose it is is looked at next.
                source if source.is(Errno::EXIST) => {}
                source => {
                    return Err(LinkError::Request {
                        doing: format!("make the bridge {}", plan.name),
                        source,
                    });
                }
            },
        }
        self.find(&plan.name).await?.ok_or_else(|| LinkError::Gone {
            name: plan.name.clone(),
        })
    }

    async fn add_address(&self, link: &Link, address: IpAddr, prefix: u8) -> Result<(), LinkError> {
        let mut request = self.handle().address().add(link.index, address, prefix);
        if address.is_ipv6() {
            // Nobody else on a new bridge can have it, and until duplicates were looked for it could not be bound.
            request.message_mut().header.flags = AddressHeaderFlags::Nodad;
        }
        match request.execute().await {
            Ok(()) => Ok(()),
            Err(error) => match RequestError::from(error) {
                source if source.is(Errno::EXIST) => Ok(()),
                source => Err(LinkError::Request {
                    doing: format!("give {} the address {address}", link.name),
                    source,
                }),
            },
        }
    }
}
