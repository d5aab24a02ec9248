//! The same questions to two VMs, and where their answers differ. `probe.sh` has the questions.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::Daemon;

/// The questions.
const SCRIPT: &str = include_str!("probe.sh");

/// How far a guest's clock may be off, and how long a probe may take between its question and our look, seconds.
const CLOCK_SLACK: u64 = 60;

/// What must differ between two VMs, by the question; the form of the answer is looked at all the same.
pub const DIFFERS: [&str; 3] = ["machine-id", "boot-id", "chance"];

/// What may differ: the answer's form is what counts.
pub const MAY_DIFFER: [(&str, &str); 2] = [
    ("time", "the VMs are asked one after the other"),
    (
        "uptime",
        "they are as old as they are; a template's clone as old as the template",
    ),
];

/// Lines that one VM may have and the other not, by the question.
pub const MAY_BE_MISSING: [(&str, &str, &str); 2] = [
    ("mounts", "/proc/sys/kernel/random/boot_id", BOOT_ID),
    ("mounts-of-all", "/proc/sys/kernel/random/boot_id", BOOT_ID),
];
const BOOT_ID: &str =
    "the kernel of a restored VM cannot change its boot id, so another file is mounted over it";

/// Whether an answer has the form that it must have.
type Form<'a> = &'a dyn Fn(&str) -> bool;

/// What one VM answered.
#[derive(Clone, Debug)]
pub struct Probe {
    answers: BTreeMap<String, String>,
    asked: Duration,
}

impl Daemon {
    /// Asks a running VM everything. Its own name, id, addresses and MAC are replaced by words in the answers: all VMs have
    /// different ones.
    pub fn probe(&self, vm: &str) -> Probe {
        let said = self.cli(["exec", "-i", vm, "sh", "-s"]).stdin(SCRIPT).ok();
        let asked = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
        let own = self.own_words(vm);
        let mut answers = BTreeMap::new();
        for part in format!("\n{said}").split("\n### ").skip(1) {
            let (name, answer) = part.split_once('\n').unwrap_or((part, ""));
            let answer = own
                .iter()
                .fold(answer.trim_end().to_owned(), |answer, (word, placeholder)| {
                    answer.replace(word, placeholder)
                });
            answers.insert(name.to_owned(), answer);
        }
        Probe { answers, asked }
    }

    /// What is the VM's own, in every form in which Linux shows it, longest first.
    fn own_words(&self, vm: &str) -> Vec<(String, &'static str)> {
        let details = self.inspect(vm);
        let text = |at: &str| {
            details
                .pointer(at)
                .and_then(|value| value.as_str())
                .unwrap_or_default()
        };
        let v6 = text("/network/ipv6");
        let full: String = v6.parse::<std::net::Ipv6Addr>().map_or(String::new(), |address| {
            address
                .octets()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect()
        });
        let mac = text("/network/mac");
        let link_local = eui64(mac);
        let v4_hex: String =
            text("/network/ipv4")
                .parse::<std::net::Ipv4Addr>()
                .map_or(String::new(), |address| {
                    address
                        .octets()
                        .iter()
                        .rev()
                        .map(|byte| format!("{byte:02X}"))
                        .collect()
                });
        let mut words = vec![
            (text("/id").to_owned(), "{id}"),
            (full, "{ipv6}"),
            (link_local, "{link-local}"),
            (v6.to_owned(), "{ipv6}"),
            (text("/network/ipv4").to_owned(), "{ipv4}"),
            (v4_hex, "{ipv4}"),
            (mac.to_owned(), "{mac}"),
            (text("/name").to_owned(), "{name}"),
        ];
        words.retain(|(word, _)| !word.is_empty());
        words.sort_by_key(|(word, _)| std::cmp::Reverse(word.len()));
        words
    }
}

/// The link-local address of a MAC in full, as `/proc/net/if_inet6` shows it (RFC 4291, appendix A).
fn eui64(mac: &str) -> String {
    let bytes: Vec<u8> = mac
        .split(':')
        .filter_map(|byte| u8::from_str_radix(byte, 16).ok())
        .collect();
    let [a, b, c, d, e, f] = bytes[..] else {
        return String::new();
    };
    format!(
        "fe80000000000000{:02x}{b:02x}{c:02x}fffe{d:02x}{e:02x}{f:02x}",
        a ^ 2
    )
}

impl Probe {
    /// How many questions were answered.
    pub fn len(&self) -> usize {
        self.answers.len()
    }

    pub fn is_empty(&self) -> bool {
        self.answers.is_empty()
    }

    /// What it answered to one question.
    pub fn answer(&self, name: &str) -> &str {
        self.answers.get(name).map_or("", String::as_str)
    }

    /// What is not as it must be in any VM, whatever the other says.
    pub fn complaints(&self) -> Vec<String> {
        let hex = |text: &str, digits: usize| {
            text.len() == digits
                && text
                    .bytes()
                    .all(|byte| byte.is_ascii_hexdigit() && !byte.is_ascii_uppercase())
        };
        let is_boot_id = |text: &str| {
            let parts: Vec<_> = text.split('-').map(str::len).collect();
            parts == [8, 4, 4, 4, 12] && hex(&text.replace('-', ""), 32)
        };
        let off = |text: &str| {
            let guest: u64 = text.parse().unwrap_or(0);
            guest.abs_diff(self.asked.as_secs())
        };
        let forms: [(&str, Form<'_>); 10] = [
            ("machine-id", &|text| {
                hex(text, 32) && text.bytes().any(|byte| byte != b'0')
            }),
            ("boot-id", &is_boot_id),
            ("chance", &|text| hex(text, 64)),
            ("chance-is-ready", &|text| text.ends_with("ready")),
            ("time", &|text| off(text) <= CLOCK_SLACK),
            ("uptime", &|text| {
                text.parse::<u64>().is_ok_and(|seconds| seconds < 3600)
            }),
            ("uptime-is-sane", &|text| {
                text == "booted when it says\nup for less than an hour"
            }),
            ("work-disk-is-written", &|text| text == "text"),
            ("name-server-answers", &|text| text == "answers"),
            ("host-name", &|text| text.starts_with("{name}\n{name}\n{name}")),
        ];
        let wrong = forms.iter().filter(|(name, is_well)| !is_well(self.answer(name)));
        wrong
            .map(|(name, _)| format!("{name}: {:?}", self.answer(name)))
            .collect()
    }

    /// Where two VMs of one image and shape differ and should not, and where they should and do not.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut found = Vec::new();
        for name in self.answers.keys().chain(
            other
                .answers
                .keys()
                .filter(|name| !self.answers.contains_key(*name)),
        ) {
            let [one, two] =
                [self, other].map(|probe| probe.answers.get(name).map(|answer| without(name, answer)));
            let same = one == two;
            let must_differ = DIFFERS.contains(&name.as_str());
            if must_differ && same {
                found.push(format!("{name}: both say {:?}", self.answer(name)));
            }
            if !must_differ && !same && !MAY_DIFFER.iter().any(|(free, _)| free == name) {
                found.push(format!(
                    "{name}:\n{}",
                    lines(self.answer(name), other.answer(name))
                ));
            }
        }
        found
    }
}

/// An answer without the lines that may be missing.
fn without(name: &str, answer: &str) -> Vec<String> {
    let free = |line: &str| {
        let mut free = MAY_BE_MISSING.iter();
        free.any(|(question, part, _)| *question == name && line.contains(part))
    };
    answer
        .lines()
        .filter(|line| !free(line))
        .map(str::to_owned)
        .collect()
}

/// The lines that only one of two answers has.
fn lines(one: &str, two: &str) -> String {
    let only = |sign: char, some: &str, others: &str| -> String {
        let others: Vec<_> = others.lines().collect();
        let own = some.lines().filter(|line| !others.contains(line));
        own.map(|line| format!("    {sign} {line}\n")).collect()
    };
    let both = only('-', one, two) + &only('+', two, one);
    if both.is_empty() {
        "    the same lines in another order\n".to_owned()
    } else {
        both
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(answers: &[(&str, &str)]) -> Probe {
        Probe {
            answers: answers
                .iter()
                .map(|(name, answer)| ((*name).into(), (*answer).into()))
                .collect(),
            asked: Duration::from_secs(1_000),
        }
    }

    #[test]
    fn differences_are_told_line_by_line() {
        let (one, two) = (
            probe(&[("cpus", "1\na"), ("time", "1"), ("boot-id", "x"), ("old", "y")]),
            probe(&[("cpus", "1\nb"), ("time", "2"), ("boot-id", "x")]),
        );
        assert_eq!(
            one.differences(&two),
            [
                "boot-id: both say \"x\"",
                "cpus:\n    - a\n    + b\n",
                "old:\n    - y\n",
            ]
        );
        assert!(one.differences(&one).len() == 1, "only what should differ");
        assert_eq!(one.complaints().len(), 10);
    }

    #[test]
    fn a_mac_gives_its_link_local_address() {
        assert_eq!(eui64("02:00:5e:10:00:01"), "fe8000000000000000005efffe100001");
        assert_eq!(eui64(""), "");
    }
}
