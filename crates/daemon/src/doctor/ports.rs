//! Which addresses of this host are taken for a port, out of the kernel's own tables (`/proc/net/udp`, `tcp`, …6).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A line says where a socket is bound: `0: 3500007F:0035 00000000:0000 07 …`, numbers in hexadecimal, addresses as 32-bit
/// words in the host's byte order. Of TCP only listeners (state `0A`) take a port from others. Source: proc_net(5).
pub(super) fn bound_to(table: &str, port: u16, is_tcp: bool) -> Vec<IpAddr> {
    let found = table.lines().skip(1).filter_map(|line| {
        let mut words = line.split_ascii_whitespace().skip(1);
        let (address, bound) = words.next()?.split_once(':')?;
        let state = words.nth(1)?;
        let wanted = u16::from_str_radix(bound, 16).ok()? == port && (!is_tcp || state == "0A");
        wanted.then(|| read_address(address)).flatten()
    });
    found.collect()
}

fn read_address(hex: &str) -> Option<IpAddr> {
    let words: Vec<u32> = (0..hex.len())
        .step_by(8)
        .map(|at| u32::from_str_radix(hex.get(at..at + 8)?, 16).ok())
        .collect::<Option<_>>()?;
    match *words.as_slice() {
        [word] => Some(IpAddr::V4(Ipv4Addr::from(word.to_ne_bytes()))),
        [a, b, c, d] => {
            let mut bytes = [0; 16];
            for (part, word) in bytes.chunks_mut(4).zip([a, b, c, d]) {
                part.copy_from_slice(&word.to_ne_bytes());
            }
            Some(IpAddr::V6(Ipv6Addr::from(bytes)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt\n";

    #[test]
    fn listeners_are_read() {
        let line = |address: &str, state: &str| {
            format!(
                "{HEAD}   0: {address} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0        0 1145 1\n"
            )
        };
        let check = |address: &str, state: &str, is_tcp, expected: &[&str]| {
            let expected: Vec<IpAddr> = expected.iter().map(|text| text.parse().unwrap()).collect();
            assert_eq!(
                bound_to(&line(address, state), 53, is_tcp),
                expected,
                "{address} {state}"
            );
        };
        check("00000000:0035", "0A", true, &["0.0.0.0"]);
        check("3500007F:0035", "07", false, &["127.0.0.53"]);
        // An established connection from port 53 takes no port from a listener.
        check("0100007F:0035", "01", true, &[]);
        check("0100007F:0050", "0A", true, &[]);
        check("00000000000000000000000000000000:0035", "07", false, &["::"]);
        check("00000000000000000000000001000000:0035", "07", false, &["::1"]);
        for garbage in [
            "",
            HEAD,
            "x\n0: 12:0035 x 0A\n",
            "x\n0: ü0000000:0035 x 0A\n",
            "x\n0:\n",
        ] {
            assert_eq!(bound_to(garbage, 53, true), [] as [IpAddr; 0]);
        }
    }

    #[test]
    fn a_real_listener_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        assert_eq!(bound_to(&table, port, true), [IpAddr::V4(Ipv4Addr::LOCALHOST)]);
    }
}
