//! The machine that was measured on: numbers of two machines are not to be compared by accident.

use offshoot_api::client::Client;
use serde::Serialize;

use crate::error::Failure;

/// What makes one machine faster than another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct HostFacts {
    /// Its processor's model.
    pub(super) cpu: String,
    /// How many of them this program may use.
    pub(super) cores: usize,
    /// MiB.
    pub(super) memory_mib: u64,
    /// `uname -r`.
    pub(super) kernel: String,
    /// Load averages when it began, as /proc/loadavg has them.
    pub(super) load: String,
    /// What the daemon found out about KVM: `native`, `emulated`, `absent`, `denied`.
    pub(super) kvm: String,
    /// How guest instructions are run: `kvm`, `tcg`.
    pub(super) accel: &'static str,
    /// The VMMs that the daemon has, with their versions.
    pub(super) vmms: Vec<String>,
    /// The kernel that guests boot by default, with its source.
    pub(super) guest_kernel: Option<String>,
    /// The daemon's version.
    pub(super) offshoot: String,
}

fn file(path: &str) -> String {
    std::fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// The value of a line `NAME : VALUE`; empty where there is none.
fn field<'a>(text: &'a str, name: &str) -> &'a str {
    let value = |line: &'a str| {
        let (found, value) = line.split_once(':')?;
        (found.trim() == name).then(|| value.trim())
    };
    text.lines().find_map(value).unwrap_or("")
}

/// Looks at this machine and asks the daemon, which is on it.
pub(super) async fn gather(client: &Client) -> Result<HostFacts, Failure> {
    let info = client.info().await?;
    let kernels = client.kernels().await?;
    let default = kernels.iter().find(|kernel| kernel.default);
    let (cpu, memory) = (file("/proc/cpuinfo"), file("/proc/meminfo"));
    let kib = field(&memory, "MemTotal").split(' ').next().unwrap_or("");
    Ok(HostFacts {
        cpu: field(&cpu, "model name").to_owned(),
        cores: std::thread::available_parallelism().map_or(0, usize::from),
        memory_mib: kib.parse().unwrap_or(0_u64) / 1024,
        kernel: file("/proc/sys/kernel/osrelease"),
        load: file("/proc/loadavg")
            .split(' ')
            .take(3)
            .collect::<Vec<_>>()
            .join(" "),
        accel: if info.kvm == "native" { "kvm" } else { "tcg" },
        kvm: info.kvm,
        vmms: info
            .vmms
            .iter()
            .map(|vmm| format!("{} {}", vmm.name, vmm.version))
            .collect(),
        guest_kernel: default.map(|kernel| format!("{} ({})", kernel.release, kernel.source)),
        offshoot: info.version,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn facts() -> HostFacts {
        HostFacts {
            cpu: "A CPU <1>".into(),
            cores: 2,
            memory_mib: 24_000,
            kernel: "6.1.0".into(),
            load: "0.10 0.20 0.30".into(),
            kvm: "absent".into(),
            accel: "tcg",
            vmms: vec!["qemu 7.2.0".into()],
            guest_kernel: Some("6.12.0 (distro)".into()),
            offshoot: "0.1.0".into(),
        }
    }

    #[test]
    fn fields_of_proc_are_found() {
        let text = "processor\t: 0\nmodel name\t: A CPU\nflags : a b\n";
        assert_eq!(field(text, "model name"), "A CPU");
        assert_eq!(field(text, "model"), "");
    }
}
