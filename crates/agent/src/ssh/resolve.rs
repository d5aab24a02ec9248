//! Names as the guest knows them: its own `/etc/hosts` and `/etc/resolv.conf`.
//!
//! The C library cannot be asked: the agent is static, and does not see the guest's files.

use std::fs::File;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use hickory_resolver::config::ResolveHosts;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::system_conf::parse_resolv_conf;
use hickory_resolver::{Hosts, Resolver};

use crate::workload::Workload;

/// More than this of a file is not read.
const MAX_FILE: u64 = 1 << 20;

/// The most addresses of a name that are tried.
const MAX_ADDRESSES: usize = 16;

/// Addresses of a host, best first.
pub(super) async fn addresses(workload: &Arc<Workload>, host: &str) -> io::Result<Vec<IpAddr>> {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    if let Ok(address) = host.parse() {
        return Ok(vec![address]);
    }
    if host.eq_ignore_ascii_case("localhost") {
        return Ok(vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]);
    }
    let files = workload.run(|| (read("/etc/hosts"), read("/etc/resolv.conf")));
    let (hosts, resolv_conf) = files.await?;
    let mut names = Hosts::default();
    names.read_hosts_conf(&hosts[..])?;
    let (config, mut options) = parse_resolv_conf(&resolv_conf).map_err(io::Error::other)?;
    options.use_hosts_file = ResolveHosts::Never;
    let mut builder = Resolver::builder_with_config(config, TokioRuntimeProvider::default());
    *builder.options_mut() = options;
    let mut resolver = builder.build().map_err(io::Error::other)?;
    resolver.set_hosts(Arc::new(names));
    let found = resolver.lookup_ip(host).await.map_err(io::Error::other)?;
    Ok(found.iter().take(MAX_ADDRESSES).collect())
}

fn read(path: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    // An image may have neither.
    if let Ok(file) = File::open(path) {
        let _ = file.take(MAX_FILE).read_to_end(&mut bytes);
    }
    bytes
}
