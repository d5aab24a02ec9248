//! What went over interfaces, as the kernel counts it in `/proc/net/dev` (proc_pid_net(5)).

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read as _};

use crate::Namespace;

/// The counters of the thread's own namespace; `/proc/net` would be those of the process.
const FILE: &str = "/proc/thread-self/net/dev";

/// The most of it that is read: a line has some 130 bytes, and a bridge takes 1,023 ports.
const MAX_FILE: u64 = 16 << 20;

/// What went over one interface since it was made, as the host sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes that the host took from it.
    pub rx_bytes: u64,
    /// Packets that the host took from it.
    pub rx_packets: u64,
    /// Packets that the host did not take.
    pub rx_dropped: u64,
    /// Bytes that the host gave to it.
    pub tx_bytes: u64,
    /// Packets that the host gave to it.
    pub tx_packets: u64,
    /// Packets for which there was no room.
    pub tx_dropped: u64,
}

/// The counters of every interface in a namespace, by name.
pub fn read(namespace: &Namespace) -> io::Result<HashMap<String, Counters>> {
    let text = namespace.run(|| {
        let mut text = String::new();
        File::open(FILE)?.take(MAX_FILE).read_to_string(&mut text)?;
        Ok::<_, io::Error>(text)
    })??;
    Ok(text.lines().filter_map(parse_line).collect())
}

/// `name: ` and sixteen numbers; the two lines of headings have none.
fn parse_line(line: &str) -> Option<(String, Counters)> {
    // A name may hold colons, numbers do not.
    let (name, numbers) = line.rsplit_once(':')?;
    let numbers: Vec<u64> = numbers
        .split_ascii_whitespace()
        .map(|number| number.parse().ok())
        .collect::<Option<_>>()?;
    let [
        rx_bytes,
        rx_packets,
        _,
        rx_dropped,
        _,
        _,
        _,
        _,
        tx_bytes,
        tx_packets,
        _,
        tx_dropped,
        ..,
    ] = numbers[..]
    else {
        return None;
    };
    let counters = Counters {
        rx_bytes,
        rx_packets,
        rx_dropped,
        tx_bytes,
        tx_packets,
        tx_dropped,
    };
    Some((name.trim_start().to_owned(), counters))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SAMPLE: &str = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo: 2776770   11307    0    0    0     0          0         0  2776770   11307    0    0    0     0       0          0
os-abababababab: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16
";

    #[test]
    fn the_kernel_s_lines_are_read() {
        let all: HashMap<_, _> = SAMPLE.lines().filter_map(parse_line).collect();
        assert_eq!(all.len(), 2);
        assert_eq!(all["lo"].rx_packets, 11_307);
        let expected = Counters {
            rx_bytes: 1,
            rx_packets: 2,
            rx_dropped: 4,
            tx_bytes: 9,
            tx_packets: 10,
            tx_dropped: 12,
        };
        assert_eq!(all["os-abababababab"], expected);
    }

    #[test]
    fn every_namespace_has_loopback() {
        assert!(read(&Namespace::own()).unwrap().contains_key("lo"));
    }

    proptest! {
        #[test]
        fn no_line_breaks_it(line in "\\PC{0,80}") {
            drop(parse_line(&line));
        }
    }
}
