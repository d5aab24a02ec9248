//! From a plan to QEMU's command line. Pure.

use std::os::fd::RawFd;

use offshoot_model::ByteSize;

use crate::driver::LaunchError;
use crate::plan::{Accel, AgentChannel, ConsoleDevice, LaunchPlan, NetBackend, Origin};

use super::opts::{CommandLine, Opts};
use super::probe::QemuFacts;

/// Under which number QEMU gets the listening QMP socket.
pub(crate) const QMP_FD: RawFd = 10;
/// Under which number QEMU gets the agent's listening socket.
pub(crate) const AGENT_FD: RawFd = 11;
/// Under which number QEMU gets the file that is its guest's memory.
pub(crate) const MEMORY_FD: RawFd = 12;
/// Under which number QEMU gets what was saved of a guest's devices.
pub(crate) const STATE_FD: RawFd = 13;
/// Under which numbers QEMU gets TAP devices, in the order of the plan.
pub(crate) const FIRST_TAP_FD: RawFd = 20;
/// The chardev that holds the guest's last words.
pub(crate) const CONSOLE_CHARDEV: &str = "console";
/// How much of them: a panic with its backtrace is 4 to 8 KiB, a whole verbose boot about 40. A power of two.
pub(crate) const CONSOLE_RING: usize = 64 << 10;

/// The CPU that a guest sees under KVM.
pub const CPU_KVM: &str = "host";
/// The CPU that a guest sees under TCG.
pub const CPU_TCG: &str = "max";
/// How many entries a share's queue has: the most that QEMU's virtiofsd takes. A guest puts a page into each, so that
/// QEMU's default of 128 would limit every read and write to 496 KiB (Linux, `virtio_fs_get_tree`).
const SHARE_QUEUE: &str = "1024";
/// How much translated code TCG keeps: QEMU's own default is an eighth of the host's memory, up to 1 GiB for each VM.
pub const TCG_CACHE: ByteSize = ByteSize::from_mib(128);

/// The node name of a disk's block device: what QMP's `block_resize` takes.
pub(crate) fn disk_node(serial: &str) -> String {
    format!("disk-{serial}")
}

/// The command line that carries out a valid plan, or what QEMU cannot do of it.
pub fn command_line(plan: &LaunchPlan, facts: &QemuFacts) -> Result<CommandLine, LaunchError> {
    refuse_the_impossible(plan, facts)?;
    let mut line = CommandLine::default();
    let name = format!("offshoot-{}", plan.vm);
    line.opts(
        "name",
        Opts::pairs()
            .with("guest", name)
            .with_switch("debug-threads", true),
    );
    line.flag("nodefaults");
    line.flag("no-user-config");
    line.value("display", "none");
    // A reset ends the VM. The end of the VM keeps the process until its console is saved: see the module's picture.
    line.flag("no-reboot");
    line.flag("no-shutdown");
    line.opts("msg", Opts::pairs().with_switch("timestamp", true));
    let deny = ["obsolete", "elevateprivileges", "spawn", "resourcecontrol"];
    let sandbox = deny
        .into_iter()
        .fold(Opts::of("on"), |opts, what| opts.with(what, "deny"));
    line.opts("sandbox", sandbox);
    machine(&mut line, plan, facts);
    // A saved guest has its kernel in its memory; reading it again would take most of the time of a restore.
    if !matches!(plan.origin, Origin::Template(_)) {
        boot(&mut line, plan, facts);
    }
    channels(&mut line, plan);
    disks(&mut line, plan);
    shares(&mut line, plan);
    nets(&mut line, plan);
    line.opts("device", Opts::of("virtio-rng-pci").with("id", "rng"));
    if matches!(plan.origin, Origin::Template(_)) {
        // It waits to be told from where.
        line.value("incoming", "defer");
    }
    Ok(line)
}

fn refuse_the_impossible(plan: &LaunchPlan, facts: &QemuFacts) -> Result<(), LaunchError> {
    let wants = [
        (
            plan.accel == Accel::Kvm && !facts.kvm,
            "use KVM: it was built without it",
        ),
        (
            plan.accel == Accel::Tcg && !facts.tcg,
            "run without KVM: it was built without its translator",
        ),
        (
            !plan.pmems.is_empty() && !facts.pmem,
            "offer persistent memory: it has no virtio-pmem-pci",
        ),
        (
            !plan.shares.is_empty() && !facts.virtiofs,
            "share folders: it has no vhost-user-fs-pci",
        ),
        (
            plan.agent != AgentChannel::VirtioSerial,
            "reach the agent over vsock as a Unix socket",
        ),
        (
            !plan.shares.is_empty() && !matches!(plan.origin, Origin::Kernel),
            "save or restore a VM with shared folders",
        ),
    ];
    match wants.into_iter().find(|(impossible, _)| *impossible) {
        Some((_, what)) => Err(LaunchError::Unsupported { vmm: "QEMU", what }),
        None => Ok(()),
    }
}

fn machine(line: &mut CommandLine, plan: &LaunchPlan, facts: &QemuFacts) {
    // On microvm a virtio-pmem device appears, but its memory is not mapped: every file reads as zeros.
    let mut machine = if facts.microvm && plan.pmems.is_empty() {
        Opts::of("microvm").with_switch("pcie", true)
    } else {
        Opts::of("q35").with_switch("vmport", false)
    };
    let memory = format!("{}M", plan.memory.mib());
    if !plan.shares.is_empty() {
        // virtiofsd maps the guest's memory, so it must be shareable.
        let backend = Opts::of("memory-backend-memfd")
            .with("id", "ram")
            .with("size", &memory);
        line.opts("object", backend.with_switch("share", true));
        machine = machine.with("memory-backend", "ram");
    }
    // What is mapped shared is written by the guest; a saved guest's memory, whose file is sealed, is copied as it is written.
    let share = match &plan.origin {
        Origin::Kernel => None,
        Origin::KernelInto(_) => Some(true),
        Origin::Template(_) => Some(false),
    };
    if let Some(share) = share {
        let backend = Opts::of("memory-backend-file")
            .with("id", "ram")
            .with("size", &memory)
            .with("mem-path", format!("/proc/self/fd/{MEMORY_FD}"));
        line.opts("object", backend.with_switch("share", share));
        machine = machine.with("memory-backend", "ram");
    }
    line.opts("machine", machine);
    line.opts(
        "accel",
        match plan.accel {
            Accel::Kvm => Opts::of("kvm"),
            Accel::Tcg => Opts::of("tcg")
                .with("thread", "multi")
                .with("tb-size", TCG_CACHE.mib().to_string()),
        },
    );
    line.value(
        "cpu",
        if plan.accel == Accel::Kvm {
            CPU_KVM
        } else {
            CPU_TCG
        },
    );
    line.opts("smp", Opts::pairs().with("cpus", plan.cpus.to_string()));
    let mut size = Opts::pairs().with("size", &memory);
    if !plan.pmems.is_empty() {
        // Persistent memory lies above the RAM, in room that must be asked for. Devices align to at most 1 GiB.
        let room: u64 = plan
            .pmems
            .iter()
            .map(|pmem| pmem.size.mib().next_multiple_of(1024))
            .sum();
        size = size.with("maxmem", format!("{}M", plan.memory.mib() + room + 1024));
    }
    line.opts("m", size);
    for (n, pmem) in plan.pmems.iter().enumerate() {
        let backend = Opts::of("memory-backend-file")
            .with("id", format!("pmem{n}-file"))
            .with("mem-path", &pmem.path)
            .with("size", pmem.size.bytes().to_string())
            .with_switch("share", true)
            .with_switch("readonly", pmem.read_only);
        line.opts("object", backend);
        let device = Opts::of("virtio-pmem-pci").with("id", format!("pmem{n}"));
        line.opts("device", device.with("memdev", format!("pmem{n}-file")));
    }
}

/// The kernel parameter that tells the rate of the time-stamp counter.
const TSC_RATE: &str = "tsc_early_khz=";

/// The plan's kernel parameters and our own.
///
/// Without KVM the guest reads the host's counter. Its kernel measures the rate with the interval timer, which goes
/// wrong on a busy host; `microvm` has no other clock, and the kernel then stops for good before it says why (seen in
/// three of four boots at a load of 3 on 2 cores). So it is told.
fn cmdline(plan: &LaunchPlan, facts: &QemuFacts) -> String {
    let mut text = plan.cmdline_text();
    let told = plan.cmdline.iter().any(|word| word.starts_with(TSC_RATE));
    if let (Accel::Tcg, Some(khz), false) = (plan.accel, facts.tsc_khz, told) {
        if !text.is_empty() {
            text.push(' ');
        }
        text.push_str(TSC_RATE);
        text.push_str(&khz.to_string());
    }
    text
}

fn boot(line: &mut CommandLine, plan: &LaunchPlan, facts: &QemuFacts) {
    line.value("kernel", &plan.kernel);
    if let Some(initramfs) = &plan.initramfs {
        line.value("initrd", initramfs);
    }
    let cmdline = cmdline(plan, facts);
    if !cmdline.is_empty() {
        line.value("append", cmdline);
    }
}

fn channels(line: &mut CommandLine, plan: &LaunchPlan) {
    let listening = |id: &str, fd: RawFd| {
        let socket = Opts::of("socket").with("id", id).with("fd", fd.to_string());
        socket.with_switch("server", true).with_switch("wait", false)
    };
    line.opts("chardev", listening("qmp", QMP_FD));
    line.opts(
        "mon",
        Opts::pairs().with("chardev", "qmp").with("mode", "control"),
    );
    let ring = Opts::of("ringbuf")
        .with("id", CONSOLE_CHARDEV)
        .with("size", CONSOLE_RING.to_string());
    line.opts("chardev", ring);
    line.opts("chardev", listening("agent", AGENT_FD));
    // Port 0 of the bus is kept for a console.
    line.opts(
        "device",
        Opts::of("virtio-serial-pci")
            .with("id", "serial")
            .with("max_ports", "2"),
    );
    match plan.console_device {
        ConsoleDevice::Serial => line.value("serial", format!("chardev:{CONSOLE_CHARDEV}")),
        ConsoleDevice::Virtio => {
            let console = Opts::of("virtconsole").with("bus", "serial.0").with("nr", "0");
            line.opts("device", console.with("chardev", CONSOLE_CHARDEV));
        }
    }
    let port = Opts::of("virtserialport")
        .with("bus", "serial.0")
        .with("nr", "1")
        .with("chardev", "agent");
    line.opts("device", port.with("name", AgentChannel::PORT_NAME));
}

fn disks(line: &mut CommandLine, plan: &LaunchPlan) {
    for disk in &plan.disks {
        let node = disk_node(&disk.serial);
        // The host's page cache stays on: it is what many VMs share of one base.
        let mut blockdev = Opts::pairs()
            .with("driver", "raw")
            .with("node-name", &node)
            .with_switch("read-only", disk.read_only)
            .with_switch("auto-read-only", false)
            .with("file.driver", "file")
            .with("file.filename", &disk.path);
        if !disk.read_only {
            // What the guest deletes or zeroes becomes a hole in the file again.
            blockdev = blockdev.with("discard", "unmap").with("detect-zeroes", "unmap");
        }
        line.opts("blockdev", blockdev);
        let device = Opts::of("virtio-blk-pci")
            .with("drive", node)
            .with("serial", &disk.serial);
        line.opts("device", device);
    }
}

fn shares(line: &mut CommandLine, plan: &LaunchPlan) {
    for (n, share) in plan.shares.iter().enumerate() {
        let socket = Opts::of("socket")
            .with("id", format!("share{n}"))
            .with("path", &share.socket);
        line.opts("chardev", socket);
        let device = Opts::of("vhost-user-fs-pci")
            .with("chardev", format!("share{n}"))
            .with("tag", &share.tag);
        line.opts("device", device.with("queue-size", SHARE_QUEUE));
    }
}

fn nets(line: &mut CommandLine, plan: &LaunchPlan) {
    for (n, (net, fd)) in plan.nets.iter().zip(FIRST_TAP_FD..).enumerate() {
        let tap = Opts::of("tap").with("id", format!("net{n}"));
        let tap = match &net.backend {
            NetBackend::Tap(name) => tap
                .with("ifname", name)
                .with("script", "no")
                .with("downscript", "no"),
            NetBackend::TapFd(_) => tap.with("fd", fd.to_string()),
        };
        line.opts("netdev", tap);
        // No boot ROM: nobody boots from the network, and loading it takes time.
        let device = Opts::of("virtio-net-pci")
            .with("netdev", format!("net{n}"))
            .with("romfile", "");
        line.opts("device", device.with("mac", net.mac.to_string()));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::ffi::{OsStr, OsString};

    use offshoot_model::ByteSize;
    use proptest::prelude::*;

    use super::super::probe::tests::debian_12;
    use super::*;
    use crate::plan::tests::{any_plan, bare_plan};
    use offshoot_model::Mac;

    use crate::plan::{DiskPlan, NetPlan, PmemPlan, SharePlan};
    use crate::qemu::read_opts;

    /// An option and its parsed value.
    type ParsedOption = (String, Vec<(Option<String>, OsString)>);

    /// The options of an encoded command line.
    fn options(plan: &LaunchPlan) -> Vec<ParsedOption> {
        let words = command_line(plan, &debian_12()).unwrap().encode().unwrap();
        let mut words = words.into_iter().peekable();
        let mut out = Vec::new();
        while let Some(option) = words.next() {
            let option = option.into_string().unwrap();
            let option = option.strip_prefix('-').expect("an option").to_owned();
            let takes_none =
                ["nodefaults", "no-user-config", "no-reboot", "no-shutdown"].contains(&option.as_str());
            let as_it_is =
                ["kernel", "initrd", "append", "display", "cpu", "serial"].contains(&option.as_str());
            let value = match () {
                () if takes_none => Vec::new(),
                () if as_it_is => vec![(None, words.next().unwrap())],
                () => read_opts(&words.next().unwrap()),
            };
            out.push((option, value));
        }
        out
    }

    fn value_of(options: &[ParsedOption], option: &str, key: &str) -> Vec<OsString> {
        let lists = options.iter().filter(|(name, _)| name == option);
        let pairs = lists.flat_map(|(_, pairs)| pairs);
        pairs
            .filter(|(k, _)| k.as_deref() == Some(key))
            .map(|(_, v)| v.clone())
            .collect()
    }

    fn strings<T: AsRef<OsStr>>(values: impl IntoIterator<Item = T>) -> Vec<OsString> {
        values
            .into_iter()
            .map(|value| value.as_ref().to_owned())
            .collect()
    }

    fn switches(values: impl IntoIterator<Item = bool>) -> Vec<OsString> {
        strings(values.into_iter().map(|on| if on { "on" } else { "off" }))
    }

    /// The options whose first word is `first`.
    fn of_kind(options: &[ParsedOption], option: &str, first: &str) -> Vec<ParsedOption> {
        let is = |(name, pairs): &&ParsedOption| name == option && pairs[0] == (None, first.into());
        options.iter().filter(is).cloned().collect()
    }

    proptest! {
        #[test]
        fn a_plan_is_read_back_and_nothing_is_said_twice(
            plan in any_plan(Just(AgentChannel::VirtioSerial), Accel::Tcg),
        ) {
            let options = options(&plan);
            let first = |option: &str| options.iter().find(|(name, _)| name == option).map(|(_, v)| v[0].1.clone());
            prop_assert_eq!(first("kernel"), Some(plan.kernel.clone().into()));
            prop_assert_eq!(first("initrd"), plan.initramfs.clone().map(Into::into));
            prop_assert_eq!(value_of(&options, "smp", "cpus"), strings([plan.cpus.to_string()]));
            let memory = format!("{}M", plan.memory.mib());
            prop_assert_eq!(value_of(&options, "m", "size"), [memory.as_str()]);

            prop_assert_eq!(value_of(&options, "blockdev", "file.filename"), strings(plan.disks.iter().map(|d| &d.path)));
            prop_assert_eq!(value_of(&options, "blockdev", "read-only"), switches(plan.disks.iter().map(|d| d.read_only)));
            prop_assert_eq!(value_of(&options, "device", "drive"), value_of(&options, "blockdev", "node-name"));
            prop_assert_eq!(value_of(&options, "device", "serial"), strings(plan.disks.iter().map(|d| &d.serial)));

            let files = of_kind(&options, "object", "memory-backend-file");
            prop_assert_eq!(value_of(&files, "object", "mem-path"), strings(plan.pmems.iter().map(|p| &p.path)));
            prop_assert_eq!(value_of(&files, "object", "size"),
                strings(plan.pmems.iter().map(|p| p.size.bytes().to_string())));
            prop_assert_eq!(value_of(&files, "object", "readonly"), switches(plan.pmems.iter().map(|p| p.read_only)));
            prop_assert_eq!(value_of(&options, "device", "memdev"), value_of(&files, "object", "id"));
            let machine = if plan.pmems.is_empty() { "microvm" } else { "q35" };
            prop_assert_eq!(first("machine"), Some(machine.into()));

            let devices = of_kind(&options, "device", "vhost-user-fs-pci");
            let sockets: Vec<_> = of_kind(&options, "chardev", "socket").into_iter()
                .filter(|(_, pairs)| pairs.iter().any(|(key, _)| key.as_deref() == Some("path"))).collect();
            prop_assert_eq!(value_of(&devices, "device", "tag"), strings(plan.shares.iter().map(|s| &s.tag)));
            prop_assert_eq!(value_of(&devices, "device", "chardev"), value_of(&sockets, "chardev", "id"));
            prop_assert_eq!(value_of(&sockets, "chardev", "path"), strings(plan.shares.iter().map(|s| &s.socket)));
            let shared = of_kind(&options, "object", "memory-backend-memfd");
            prop_assert_eq!(shared.len(), usize::from(!plan.shares.is_empty()));
            prop_assert_eq!(value_of(&options, "machine", "memory-backend"), value_of(&shared, "object", "id"));

            let taps = plan.nets.iter().filter_map(|net| match &net.backend {
                NetBackend::Tap(name) => Some(name),
                NetBackend::TapFd(_) => None,
            });
            prop_assert_eq!(value_of(&options, "netdev", "ifname"), strings(taps));
            prop_assert_eq!(value_of(&options, "device", "mac"), strings(plan.nets.iter().map(|n| n.mac.to_string())));
            prop_assert_eq!(value_of(&options, "device", "netdev"), value_of(&options, "netdev", "id"));

            let mut seen = HashMap::new();
            for (option, pairs) in &options {
                *seen.entry(option.as_str()).or_insert(0) += 1;
                let mut keys = std::collections::HashSet::new();
                prop_assert!(pairs.iter().all(|(key, _)| keys.insert(key)), "a key twice in -{} {:?}", option, pairs);
            }
            for (option, times) in seen {
                let many = ["device", "chardev", "object", "blockdev", "netdev"].contains(&option);
                prop_assert!(many || times == 1, "-{} stands {} times", option, times);
            }
            // Ids are unique within their kind, and so are the numbers of descriptors.
            for (kind, key) in [("device", "id"), ("chardev", "id"), ("object", "id"), ("netdev", "id"), ("netdev", "fd")] {
                let mut ids = value_of(&options, kind, key);
                let all = ids.len();
                ids.sort();
                ids.dedup();
                prop_assert_eq!(ids.len(), all);
            }
        }
    }

    #[test]
    fn the_machine_fits_the_devices() {
        let first_of = |plan: &LaunchPlan, option: &str| {
            let options = options(plan);
            let (_, pairs) = options.iter().find(|(name, _)| name == option).unwrap();
            pairs[0].1.clone()
        };
        let mut plan = bare_plan();
        assert_eq!(first_of(&plan, "machine"), "microvm");
        assert_eq!(
            (first_of(&plan, "accel"), first_of(&plan, "cpu")),
            ("tcg".into(), CPU_TCG.into())
        );
        plan.accel = Accel::Kvm;
        assert_eq!(
            (first_of(&plan, "accel"), first_of(&plan, "cpu")),
            ("kvm".into(), CPU_KVM.into())
        );
        plan.pmems.push(PmemPlan {
            path: "/p".into(),
            size: ByteSize::from_mib(100),
            read_only: true,
        });
        assert_eq!(first_of(&plan, "machine"), "q35");
        assert_eq!(value_of(&options(&plan), "m", "maxmem"), ["2304M"]);
    }

    #[test]
    fn writable_disks_give_back_and_read_only_ones_are_so() {
        let mut plan = bare_plan();
        plan.disks.push(DiskPlan {
            serial: "overlay".into(),
            path: "/o".into(),
            read_only: false,
        });
        let options = options(&plan);
        assert_eq!(value_of(&options, "blockdev", "read-only"), ["on", "off"]);
        assert_eq!(value_of(&options, "blockdev", "discard"), ["unmap"]);
        assert_eq!(
            value_of(&options, "blockdev", "node-name"),
            ["disk-root", "disk-overlay"]
        );
        assert_eq!(value_of(&options, "device", "serial"), ["root", "overlay"]);
    }

    #[test]
    fn a_share_makes_the_memory_shareable() {
        let mut plan = bare_plan();
        assert!(value_of(&options(&plan), "machine", "memory-backend").is_empty());
        plan.shares.push(SharePlan {
            tag: "t".into(),
            socket: "/s".into(),
        });
        let options = options(&plan);
        assert_eq!(value_of(&options, "machine", "memory-backend"), ["ram"]);
        assert_eq!(value_of(&options, "object", "share"), ["on"]);
    }

    #[test]
    fn an_emulated_guest_is_told_how_fast_its_clock_ticks() {
        let check = |change: &dyn Fn(&mut LaunchPlan, &mut QemuFacts), expected: &str| {
            let (mut plan, mut facts) = (bare_plan(), debian_12());
            change(&mut plan, &mut facts);
            assert_eq!(cmdline(&plan, &facts), expected);
        };
        check(&|_, _| {}, "quiet console=ttyS0 tsc_early_khz=2445424");
        check(&|plan, _| plan.cmdline.clear(), "tsc_early_khz=2445424");
        check(
            &|plan, _| plan.cmdline = vec!["tsc_early_khz=1".into()],
            "tsc_early_khz=1",
        );
        check(&|plan, _| plan.accel = Accel::Kvm, "quiet console=ttyS0");
        check(&|_, facts| facts.tsc_khz = None, "quiet console=ttyS0");
    }

    #[test]
    fn what_this_qemu_lacks_is_refused() {
        let refuse = |change: &dyn Fn(&mut LaunchPlan, &mut QemuFacts), expected: &str| {
            let (mut plan, mut facts) = (bare_plan(), debian_12());
            plan.nets.push(NetPlan {
                backend: NetBackend::Tap("t".into()),
                mac: Mac([2, 0, 0, 0, 0, 1]),
            });
            command_line(&plan, &facts).unwrap();
            change(&mut plan, &mut facts);
            let error = command_line(&plan, &facts).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        refuse(
            &|plan, facts| (plan.accel, facts.kvm) = (Accel::Kvm, false),
            "use KVM",
        );
        refuse(&|_, facts| facts.tcg = false, "without KVM");
        refuse(
            &|plan, _| plan.agent = AgentChannel::HybridVsock { cid: 3, port: 1 },
            "vsock",
        );
        let pmem = PmemPlan {
            path: "/p".into(),
            size: ByteSize::from_mib(2),
            read_only: true,
        };
        refuse(
            &|plan, facts| (plan.pmems, facts.pmem) = (vec![pmem.clone()], false),
            "persistent memory",
        );
        let share = SharePlan {
            tag: "t".into(),
            socket: "/s".into(),
        };
        refuse(
            &|plan, facts| (plan.shares, facts.virtiofs) = (vec![share.clone()], false),
            "share folders",
        );
    }
}
