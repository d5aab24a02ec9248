//! Where the namespace's routes lead.

use std::net::Ipv4Addr;

use futures::TryStreamExt as _;
use ipnet::Ipv4Net;
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use rtnetlink::RouteMessageBuilder;

use super::{LinkError, Links, refused};

impl Links {
    /// The destinations of every IPv4 route of every table but those that lead out by one of the interfaces `without`
    /// (their numbers), default routes included.
    pub async fn routes(&self, without: &[u32]) -> Result<Vec<Ipv4Net>, LinkError> {
        let all = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let listed: Result<Vec<RouteMessage>, _> =
            self.handle().route().get(all).execute().try_collect().await;
        let messages = listed.map_err(|error| refused("list routes", error))?;
        let routes = messages.iter().filter_map(|route| destination(route, without));
        Ok(routes.collect())
    }
}

/// Where a route leads; nothing where it is no way to other hosts, or one of `without`.
fn destination(route: &RouteMessage, without: &[u32]) -> Option<Ipv4Net> {
    // Broadcast and multicast come with an address that has a unicast or local route as well.
    if matches!(route.header.kind, RouteType::Broadcast | RouteType::Multicast) {
        return None;
    }
    let mut address = Ipv4Addr::UNSPECIFIED;
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(destination)) => address = *destination,
            RouteAttribute::Oif(index) if without.contains(index) => return None,
            _ => {}
        }
    }
    Ipv4Net::new(address, route.header.destination_prefix_length).ok()
}
