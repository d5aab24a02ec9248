//! From a plan to Cloud Hypervisor's command line. Pure.

use std::os::fd::RawFd;

use crate::driver::LaunchError;
use crate::plan::{Accel, AgentChannel, ConsoleDevice, LaunchPlan, NetBackend, Origin, PlanError};
use crate::saved::{MEMORY_FD, inherited_path};

use super::options::{CommandLine, Options};
use super::probe::CloudHypervisorFacts;
use super::saved::ZONE;
use crate::tended::own_folder;

/// Under which number it gets its listening API socket.
pub const API_FD: RawFd = 10;
/// Under which number it gets the pipe for its events.
pub const EVENTS_FD: RawFd = 12;
/// Under which numbers it gets TAP devices, in the order of the plan.
pub const FIRST_TAP_FD: RawFd = 20;

/// How many entries a share's queue has: the most that QEMU's virtiofsd takes, and Cloud Hypervisor's default.
const SHARE_QUEUE: &str = "1024";

/// The command line that carries out a valid plan, or what Cloud Hypervisor cannot do of it.
pub fn command_line(plan: &LaunchPlan, _: &CloudHypervisorFacts) -> Result<CommandLine, LaunchError> {
    refuse_the_impossible(plan)?;
    let mut line = CommandLine::default();
    line.options("api-socket", Options::new().with("fd", API_FD.to_string()));
    line.options("event-monitor", Options::new().with("fd", EVENTS_FD.to_string()));
    line.plain("seccomp", "true");
    if let Origin::Template(_) = plan.origin {
        // Its configuration, which lies with what was saved, says everything else.
        line.options("restore", restore(plan));
        return Ok(line);
    }
    line.plain("kernel", &plan.kernel);
    if let Some(initramfs) = &plan.initramfs {
        line.plain("initramfs", initramfs);
    }
    let cmdline = plan.cmdline_text();
    if !cmdline.is_empty() {
        line.plain("cmdline", cmdline);
    }
    line.options("cpus", Options::new().with("boot", plan.cpus.to_string()));
    memory(&mut line, plan);
    console(&mut line, plan);
    disks(&mut line, plan);
    shares(&mut line, plan);
    nets(&mut line, plan);
    if let AgentChannel::HybridVsock { cid, port: _ } = plan.agent {
        let vsock = Options::new().with("cid", cid.to_string());
        line.options("vsock", vsock.with("socket", agent_socket(plan)));
    }
    // Nothing is taken from the guest; what it does not use, it gives back. A guest that goes on from a saved one cannot: it
    // would punch holes into the saved memory.
    let gives_back = !matches!(plan.origin, Origin::KernelInto(_));
    let balloon = Options::new()
        .with("size", "0")
        .with_switch("deflate_on_oom", true);
    line.options("balloon", balloon.with_switch("free_page_reporting", gives_back));
    Ok(line)
}

/// The folder with what was saved, for a VM that goes on from there.
pub(super) fn restore_folder(plan: &LaunchPlan) -> std::path::PathBuf {
    own_folder(&plan.run_dir).join("restore")
}

fn restore(plan: &LaunchPlan) -> Options {
    let url = format!("file://{}", restore_folder(plan).display());
    let options = Options::new().with("source_url", url);
    let open = plan.nets.iter().zip(FIRST_TAP_FD..).enumerate();
    let open = open.filter(|(_, (net, _))| matches!(net.backend, NetBackend::TapFd(_)));
    let open: Vec<_> = open.map(|(n, (_, fd))| (net_id(n), fd)).collect();
    if open.is_empty() {
        options
    } else {
        options.with_numbered("net_fds", open)
    }
}

fn memory(line: &mut CommandLine, plan: &LaunchPlan) {
    let size = format!("{}M", plan.memory.mib());
    if let Origin::KernelInto(_) = plan.origin {
        // In a file with a name, which then is what it saves of it.
        line.options("memory", Options::new().with("size", "0"));
        let zone = Options::new().with("id", ZONE).with("size", size);
        let zone = zone.with("file", inherited_path(MEMORY_FD));
        line.options("memory-zone", zone.with_switch("shared", true));
    } else {
        let memory = Options::new().with("size", size);
        // virtiofsd maps the guest's memory, so it must be shareable.
        line.options("memory", memory.with_switch("shared", !plan.shares.is_empty()));
    }
}

/// What two VMs must have in common so that one can go on from where the other was saved; `None` where it cannot save such a
/// VM: what serves its shares has their memory in common with it.
pub(super) fn shape(plan: &LaunchPlan, facts: &CloudHypervisorFacts) -> Result<Option<String>, LaunchError> {
    if !plan.shares.is_empty() {
        return Ok(None);
    }
    let words = encoded(&plan.without_its_own(), facts)?;
    let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
    Ok(Some(words.join("\n")))
}

/// The same as arguments.
pub(super) fn encoded(
    plan: &LaunchPlan,
    facts: &CloudHypervisorFacts,
) -> Result<Vec<std::ffi::OsString>, LaunchError> {
    command_line(plan, facts)?
        .encode()
        .map_err(|error| LaunchError::Plan {
            source: PlanError::Path {
                what: error.flag,
                path: error.value.into(),
            },
        })
}

fn net_id(n: usize) -> String {
    format!("net{n}")
}

/// The agent's socket, which it makes.
pub(super) fn agent_socket(plan: &LaunchPlan) -> std::path::PathBuf {
    own_folder(&plan.run_dir).join("agent.sock")
}

/// The id of a disk, for the API.
pub(super) fn disk_id(serial: &str) -> String {
    format!("disk-{serial}")
}

fn refuse_the_impossible(plan: &LaunchPlan) -> Result<(), LaunchError> {
    let wants = [
        (plan.accel == Accel::Tcg, "run without KVM"),
        (
            plan.agent == AgentChannel::VirtioSerial,
            "reach the agent over virtio-serial: it has no such device",
        ),
    ];
    match wants.into_iter().find(|(impossible, _)| *impossible) {
        Some((_, what)) => Err(LaunchError::Unsupported {
            vmm: "Cloud Hypervisor",
            what,
        }),
        None => Ok(()),
    }
}

fn console(line: &mut CommandLine, plan: &LaunchPlan) {
    let (used, unused) = match plan.console_device {
        ConsoleDevice::Serial => ("serial", "console"),
        ConsoleDevice::Virtio => ("console", "serial"),
    };
    // Its standard output, which is a pipe of ours.
    line.options(used, Options::new().with_word("tty"));
    line.options(unused, Options::new().with_word("off"));
}

fn disks(line: &mut CommandLine, plan: &LaunchPlan) {
    for disk in &plan.disks {
        let options = Options::new()
            .with("path", &disk.path)
            .with_switch("readonly", disk.read_only)
            // Said, or the first bytes of the disk would decide, which are the guest's.
            .with("image_type", "raw")
            .with("serial", &disk.serial)
            .with("id", disk_id(&disk.serial));
        line.options("disk", options);
    }
    for (n, pmem) in plan.pmems.iter().enumerate() {
        // With `discard_writes` the file is opened to read only, and what the guest writes stays in its own memory.
        let options = Options::new()
            .with("file", &pmem.path)
            .with("size", pmem.size.bytes().to_string())
            .with_switch("discard_writes", pmem.read_only)
            .with("id", format!("pmem{n}"));
        line.options("pmem", options);
    }
}

fn shares(line: &mut CommandLine, plan: &LaunchPlan) {
    for (n, share) in plan.shares.iter().enumerate() {
        let options = Options::new()
            .with("tag", &share.tag)
            .with("socket", &share.socket)
            .with("num_queues", "1")
            .with("queue_size", SHARE_QUEUE)
            .with("id", format!("share{n}"));
        line.options("fs", options);
    }
}

fn nets(line: &mut CommandLine, plan: &LaunchPlan) {
    for (n, (net, fd)) in plan.nets.iter().zip(FIRST_TAP_FD..).enumerate() {
        let options = match &net.backend {
            NetBackend::Tap(name) => Options::new().with("tap", name),
            NetBackend::TapFd(_) => Options::new().with_numbers("fd", &[fd]),
        };
        let options = options.with("mac", net.mac.to_string());
        line.options("net", options.with("id", net_id(n)));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::path::Path;

    use proptest::prelude::*;

    use super::super::options::tests::{read_flags, read_options};
    use super::super::probe::tests::newest;
    use super::*;
    use crate::plan::tests::{any_plan, bare_plan};
    use crate::plan::{DiskPlan, PmemPlan, SharePlan};

    /// The values of a flag, each as its options.
    type Read = Vec<Vec<(String, String)>>;

    fn values(flags: &[(String, Vec<String>)], flag: &str) -> Read {
        let found = flags.iter().filter(|(name, _)| name == flag);
        found
            .flat_map(|(_, values)| values)
            .map(|value| read_options(value))
            .collect()
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    fn text(path: &Path) -> &str {
        path.to_str().expect("UTF-8")
    }

    fn switch(on: bool) -> &'static str {
        if on { "on" } else { "off" }
    }

    fn expected_disk(disk: &DiskPlan) -> Vec<(String, String)> {
        pairs(&[
            ("path", text(&disk.path)),
            ("readonly", switch(disk.read_only)),
            ("image_type", "raw"),
            ("serial", &disk.serial),
            ("id", &format!("disk-{}", disk.serial)),
        ])
    }

    fn expected_pmem((n, pmem): (usize, &PmemPlan)) -> Vec<(String, String)> {
        pairs(&[
            ("file", text(&pmem.path)),
            ("size", &pmem.size.bytes().to_string()),
            ("discard_writes", switch(pmem.read_only)),
            ("id", &format!("pmem{n}")),
        ])
    }

    fn expected_share((n, share): (usize, &SharePlan)) -> Vec<(String, String)> {
        pairs(&[
            ("tag", &share.tag),
            ("socket", text(&share.socket)),
            ("num_queues", "1"),
            ("queue_size", "1024"),
            ("id", &format!("share{n}")),
        ])
    }

    fn vsock() -> impl Strategy<Value = AgentChannel> {
        (3u32..u32::MAX, any::<u32>()).prop_map(|(cid, port)| AgentChannel::HybridVsock { cid, port })
    }

    proptest! {
        #[test]
        fn a_plan_is_read_back_and_no_flag_stands_twice(plan in any_plan(vsock(), Accel::Kvm)) {
            let quoted = plan.disks.iter().map(|d| &d.path)
                .chain(plan.pmems.iter().map(|p| &p.path))
                .chain(plan.shares.iter().map(|s| &s.socket));
            let impossible = quoted.into_iter().any(|path| text(path).contains('"'))
                || plan.cmdline_text().starts_with('-');
            let words = command_line(&plan, &newest()).unwrap().encode();
            prop_assert_eq!(words.is_err(), impossible);
            let Ok(words) = words else { return Ok(()) };
            let flags = read_flags(&words);
            let mut names = HashSet::new();
            prop_assert!(flags.iter().all(|(flag, _)| names.insert(flag.clone())), "a flag twice: {:?}", words);
            prop_assert!(flags.iter().all(|(_, values)| !values.is_empty()), "a flag without a value: {:?}", words);

            let plain = |flag: &str| flags.iter().find(|(name, _)| name == flag).map(|(_, values)| values.clone());
            prop_assert_eq!(plain("kernel"), Some(vec![text(&plan.kernel).to_owned()]));
            prop_assert_eq!(plain("initramfs"), plan.initramfs.as_ref().map(|p| vec![text(p).to_owned()]));
            let cmdline = plan.cmdline_text();
            prop_assert_eq!(plain("cmdline"), (!cmdline.is_empty()).then(|| vec![cmdline]));
            prop_assert_eq!(values(&flags, "cpus"), [pairs(&[("boot", &plan.cpus.to_string())])]);
            let memory = format!("{}M", plan.memory.mib());
            let shared = switch(!plan.shares.is_empty());
            prop_assert_eq!(values(&flags, "memory"), [pairs(&[("size", &memory), ("shared", shared)])]);
            prop_assert_eq!(values(&flags, "disk"), plan.disks.iter().map(expected_disk).collect::<Read>());
            prop_assert_eq!(values(&flags, "pmem"), plan.pmems.iter().enumerate().map(expected_pmem).collect::<Read>());
            prop_assert_eq!(values(&flags, "fs"), plan.shares.iter().enumerate().map(expected_share).collect::<Read>());
            let nets = plan.nets.iter().zip(FIRST_TAP_FD..).enumerate().map(|(n, (net, fd))| {
                let backend = match &net.backend {
                    NetBackend::Tap(name) => ("tap", name.clone()),
                    NetBackend::TapFd(_) => ("fd", format!("[{fd}]")),
                };
                pairs(&[(backend.0, &backend.1), ("mac", &net.mac.to_string()), ("id", &format!("net{n}"))])
            });
            prop_assert_eq!(values(&flags, "net"), nets.collect::<Read>());
            let AgentChannel::HybridVsock { cid, .. } = plan.agent else { unreachable!() };
            let socket = "/run/offshoot/x/own/agent.sock";
            prop_assert_eq!(values(&flags, "vsock"), [pairs(&[("cid", &cid.to_string()), ("socket", socket)])]);
            let mut ids = HashSet::new();
            for flag in ["disk", "pmem", "fs", "net"] {
                for (_, id) in values(&flags, flag).into_iter().flatten().filter(|(key, _)| key == "id") {
                    prop_assert!(ids.insert(id.clone()), "id {} twice", id);
                }
            }
        }
    }

    fn possible() -> LaunchPlan {
        LaunchPlan {
            accel: Accel::Kvm,
            agent: AgentChannel::HybridVsock { cid: 3, port: 1024 },
            ..bare_plan()
        }
    }

    #[test]
    fn a_shared_root_and_two_mounts_are_one_fs_flag() {
        let mut plan = possible();
        for tag in ["root", "data", "src"] {
            plan.shares.push(SharePlan {
                tag: tag.into(),
                socket: format!("/run/x/{tag}.sock").into(),
            });
        }
        let words = command_line(&plan, &newest()).unwrap().encode().unwrap();
        let at = words.iter().position(|word| word == "--fs").unwrap();
        let value = |n: usize, tag: &str| {
            let value =
                format!("tag={tag},socket=/run/x/{tag}.sock,num_queues=1,queue_size=1024,id=share{n}");
            std::ffi::OsString::from(value)
        };
        assert_eq!(
            words[at + 1..at + 4],
            [value(0, "root"), value(1, "data"), value(2, "src")]
        );
        assert_eq!(words.iter().filter(|word| *word == "--fs").count(), 1);
    }

    #[test]
    fn the_console_is_its_output_and_the_other_one_is_off() {
        let check = |device: ConsoleDevice, used: &str, unused: &str| {
            let plan = LaunchPlan {
                console_device: device,
                ..possible()
            };
            let flags = read_flags(&command_line(&plan, &newest()).unwrap().encode().unwrap());
            assert_eq!(values(&flags, used), [pairs(&[("tty", "")])]);
            assert_eq!(values(&flags, unused), [pairs(&[("off", "")])]);
        };
        check(ConsoleDevice::Serial, "serial", "console");
        check(ConsoleDevice::Virtio, "console", "serial");
    }

    #[test]
    fn a_vm_that_is_to_be_saved_has_its_memory_in_a_file() {
        let memory = offshoot_sys::memory_file::create("test", 4096).unwrap();
        let plan = LaunchPlan {
            origin: Origin::KernelInto(std::sync::Arc::new(memory)),
            ..possible()
        };
        let flags = read_flags(&command_line(&plan, &newest()).unwrap().encode().unwrap());
        let zone = [
            ("id", "mem0"),
            ("size", "256M"),
            ("file", "/proc/self/fd/14"),
            ("shared", "on"),
        ];
        assert_eq!(values(&flags, "memory-zone"), [pairs(&zone)]);
        assert_eq!(values(&flags, "memory"), [pairs(&[("size", "0")])]);
        let reports = ("free_page_reporting".to_owned(), "off".to_owned());
        assert!(values(&flags, "balloon")[0].contains(&reports));
        let cold = possible();
        assert_eq!(shape(&plan, &newest()).unwrap(), shape(&cold, &newest()).unwrap());
    }

    #[test]
    fn a_saved_vm_goes_on_with_its_own_taps() {
        let file = || std::sync::Arc::new(offshoot_sys::memory_file::create("test", 4096).unwrap());
        let net = |backend| crate::plan::NetPlan {
            backend,
            mac: offshoot_model::Mac([2, 0, 0, 0, 0, 1]),
        };
        let mut plan = possible();
        plan.origin = Origin::Template(crate::plan::SavedGuest {
            memory: file(),
            state: file(),
            disks: Vec::new(),
        });
        let words = |plan: &LaunchPlan| -> Vec<String> {
            let words = command_line(plan, &newest()).unwrap().encode().unwrap();
            words
                .into_iter()
                .map(|word| word.into_string().unwrap())
                .collect()
        };
        let expected = [
            "--api-socket",
            "fd=10",
            "--event-monitor",
            "fd=12",
            "--seccomp",
            "true",
            "--restore",
            "source_url=file:///run/offshoot/x/own/restore",
        ];
        assert_eq!(words(&plan), expected);
        plan.nets = vec![
            net(NetBackend::TapFd(Default::default())),
            net(NetBackend::Tap("t".into())),
            net(NetBackend::TapFd(Default::default())),
        ];
        let last = words(&plan).pop().unwrap();
        assert_eq!(last, format!("{},net_fds=[net0@[20],net2@[22]]", expected[7]));
    }

    #[test]
    fn what_it_lacks_is_refused() {
        let refuse = |change: &dyn Fn(&mut LaunchPlan), expected: &str| {
            let mut plan = possible();
            command_line(&plan, &newest()).unwrap();
            change(&mut plan);
            let error = command_line(&plan, &newest()).unwrap_err().to_string();
            assert!(
                error.starts_with("Cloud Hypervisor cannot") && error.contains(expected),
                "{error}"
            );
        };
        refuse(&|plan| plan.accel = Accel::Tcg, "without KVM");
        refuse(&|plan| plan.agent = AgentChannel::VirtioSerial, "virtio-serial");
    }
}
