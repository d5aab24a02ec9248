//! Published ports as Docker shows them, and `port`.

use std::net::IpAddr;

use clap::Args;
use offshoot_api::client::Client;
use offshoot_model::{GuestPort, PublishedPort};

use crate::error::Failure;
use crate::output::{Output, OutputArgs, json, line};
use crate::values::vm_ref;

#[derive(Clone, Debug, Args)]
pub(crate) struct PortArgs {
    #[command(flatten)]
    output: OutputArgs,
    /// Name or id
    #[arg(value_parser = vm_ref)]
    vm: String,
    /// Only what leads to this port of the VM, such as 80 or 53/udp
    #[arg(value_name = "GUEST[/udp]")]
    guest: Option<GuestPort>,
}

pub(crate) async fn port(client: &Client, args: &PortArgs) -> Result<u8, Failure> {
    let vm = client.vm(&args.vm).await?.summary;
    let shown: Vec<PublishedPort> = vm
        .ports
        .into_iter()
        .filter(|port| args.guest.is_none_or(|guest| port.guest_port() == guest))
        .collect();
    if let Some(guest) = args.guest
        && shown.is_empty()
    {
        let said = format!("VM `{}` publishes no port {guest}", vm.name);
        let hint = format!(
            "see what it does with `offshoot port {}`; ports are published at creation, with `-p`",
            vm.name
        );
        return Err(Failure::invalid(said).hint(hint));
    }
    if args.output.output == Output::Json {
        json(&shown)?;
        return Ok(0);
    }
    let lines: Vec<String> = shown
        .iter()
        .map(|port| match args.guest {
            Some(_) => format!("{}\n", host_side(port)),
            None => format!("{} -> {}\n", port.guest_port(), host_side(port)),
        })
        .collect();
    if !lines.is_empty() {
        line(&lines.concat())?;
    }
    Ok(0)
}

/// `0.0.0.0:8080`, and `[::1]:8080` for IPv6.
fn host_side(port: &PublishedPort) -> String {
    format!("{}:{}", address(port.address), port.host)
}

fn address(address: Option<IpAddr>) -> String {
    match address {
        None => "0.0.0.0".to_owned(),
        Some(IpAddr::V4(address)) => address.to_string(),
        Some(IpAddr::V6(address)) => format!("[{address}]"),
    }
}

/// All in one cell of `ps`: `0.0.0.0:8080->80/tcp`, and neighbours as one, `0.0.0.0:9000-9005->9000-9005/udp`.
pub(crate) fn summary(ports: &[PublishedPort]) -> String {
    let mut sorted = ports.to_vec();
    sorted.sort_unstable_by_key(|port| (port.guest, port.transport, port.address, port.host));
    let mut runs: Vec<(PublishedPort, u16)> = Vec::new();
    for port in sorted {
        let continued = runs.iter_mut().find(|(first, more)| {
            let next = |start: u16| start.checked_add(*more).and_then(|last| last.checked_add(1));
            (first.address, first.transport) == (port.address, port.transport)
                && next(first.guest) == Some(port.guest)
                && next(first.host) == Some(port.host)
        });
        match continued {
            Some((_, more)) => *more += 1,
            None => runs.push((port, 0)),
        }
    }
    let range = |start: u16, more: u16| match more {
        0 => start.to_string(),
        more => format!("{start}-{}", start.saturating_add(more)),
    };
    let cells: Vec<String> = runs
        .iter()
        .map(|(first, more)| {
            format!(
                "{}:{}->{}/{}",
                address(first.address),
                range(first.host, *more),
                range(first.guest, *more),
                first.transport
            )
        })
        .collect();
    cells.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_look_like_dockers() {
        let check = |texts: &[&str], expected: &str| {
            let ports: Vec<_> = texts
                .iter()
                .flat_map(|text| PublishedPort::parse_all(text).unwrap())
                .collect();
            assert_eq!(summary(&ports), expected);
        };
        check(&[], "");
        check(&["8080:80"], "0.0.0.0:8080->80/tcp");
        check(
            &["443:8443", "127.0.0.1:53:53/udp", "[::1]:80:80"],
            "127.0.0.1:53->53/udp, [::1]:80->80/tcp, 0.0.0.0:443->8443/tcp",
        );
        check(
            &["9000-9005:9000-9005/udp", "8001-8002:9000-9001"],
            "0.0.0.0:8001-8002->9000-9001/tcp, 0.0.0.0:9000-9005->9000-9005/udp",
        );
        check(
            &["1:65535", "2:1", "65535:3"],
            "0.0.0.0:2->1/tcp, 0.0.0.0:65535->3/tcp, 0.0.0.0:1->65535/tcp",
        );
        assert_eq!(
            host_side(&PublishedPort::parse_all("[fd00::1]:8:9").unwrap()[0]),
            "[fd00::1]:8"
        );
    }
}
