//! The kernel bundle: what the guest boots, and what it is told on its command line.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use offshoot_kernel::{FoundBundle, KernelBundle, KernelError, KernelStore};
use offshoot_model::{Explain as _, Finding, Fix, KernelId, Severity};
use offshoot_store::db::Db;
use offshoot_vmm::plan::ConsoleDevice;

use super::in_use::{self, Needs};
use super::{blocking, chain, finding};
use crate::capability::{Capability, CapabilityError, VmPlan};
use crate::definition::VmRecord;
use crate::paths::VmPaths;

/// What every guest's kernel is told.
///
/// `quiet loglevel=4`: every byte on the console is an exit of the guest. `panic=-1`: a panic resets at once, and the
/// VMM, started with no reboot, ends. `tsc=reliable no_timer_check`: no calibration loops against a virtual timer.
/// `cryptomgr.notests`: self-tests of ciphers take a fifth of an emulated boot. `jent_mod_init`: the self-test of a source
/// of entropy that nothing here draws from takes 0.3 s of 2.4 s of emulated processor time; without it that source is
/// not there. `random.trust_cpu=on`: the pool does not wait; the agent adds the host's entropy before anything runs.
/// `noreplace-smp`, `rcu_expedited`: no patching and no waiting for grace periods that one vCPU has for itself.
const COMMAND_LINE: [&str; 11] = [
    "quiet",
    "loglevel=4",
    "panic=-1",
    "tsc=reliable",
    "no_timer_check",
    "cryptomgr.notests",
    "initcall_blacklist=jent_mod_init",
    "random.trust_cpu=on",
    "noreplace-smp",
    "rcupdate.rcu_expedited=1",
    "8250.nr_uarts=1",
];

/// Chooses kernel and initramfs of the VM's bundle.
pub struct KernelCapability {
    /// All bundles.
    pub kernels: Arc<KernelStore>,
    /// This version's agent, which bundles should have.
    pub agent: PathBuf,
    /// The group that all VMMs have.
    pub gid: u32,
    /// Says which bundles VMs boot.
    pub db: Db,
}

const CAPABILITY: &str = "kernel";

/// What is known of all bundles, read once for all findings.
struct Bundles {
    default: Result<KernelBundle, KernelError>,
    /// Whether the default has this version's agent.
    current: Option<Result<bool, KernelError>>,
    /// A file of the default that VMMs cannot read.
    closed: Option<PathBuf>,
    all: Vec<FoundBundle>,
}

impl Bundles {
    fn look(kernels: &KernelStore, agent: &Path, gid: u32) -> Self {
        let default = kernels.default();
        let bundle = default.as_ref().ok();
        Self {
            current: bundle.map(|bundle| KernelStore::has_agent(bundle, agent)),
            closed: bundle.and_then(|bundle| {
                let mut files = [bundle.vmlinux(), bundle.initramfs()].into_iter();
                files.find(|file| !is_readable(file, gid))
            }),
            // That the folder cannot be read is what `default` says already.
            all: kernels.all().unwrap_or_default(),
            default,
        }
    }
}

/// Whether a process in no group but `gid` can read `file`.
fn is_readable(file: &Path, gid: u32) -> bool {
    std::fs::metadata(file)
        .is_ok_and(|meta| meta.mode() & 0o004 != 0 || (meta.gid() == gid && meta.mode() & 0o040 != 0))
}

fn judge(bundles: &Bundles, vms: &[Needs]) -> Vec<Finding> {
    let mut findings = Vec::new();
    match &bundles.default {
        Ok(bundle) => findings.extend(judge_default(bundle, bundles)),
        Err(error) => findings.push(no_default(error, bundles)),
    }
    let default = bundles.default.as_ref().ok().map(|bundle| &bundle.id);
    let mut needed: Vec<_> = vms
        .iter()
        .map(|vm| &vm.kernel)
        .filter(|id| Some(*id) != default)
        .collect();
    needed.sort();
    needed.dedup();
    findings.extend(needed.into_iter().filter_map(|id| judge_needed(id, bundles, vms)));
    findings
}

fn judge_default(bundle: &KernelBundle, bundles: &Bundles) -> Vec<Finding> {
    let name = format!("kernel {} ({})", bundle.manifest.release, bundle.id);
    let mut findings = Vec::new();
    match &bundles.closed {
        None => findings.push(Finding::ok(CAPABILITY, name.clone()).id("kernel")),
        Some(file) => {
            let message = format!("unprivileged VMMs cannot read {}", file.display());
            let found = finding(
                CAPABILITY,
                Severity::Failure,
                message,
                format!("chmod a+r {}", file.display()),
            );
            findings.push(found.id("kernel-closed").cost("no VM can be started with it"));
        }
    }
    match &bundles.current {
        None | Some(Ok(true)) => {}
        Some(Ok(false)) => findings.push(
            finding(
                CAPABILITY,
                Severity::Warning,
                format!("{name} has the agent of another version"),
                "offshoot doctor --fix",
            )
            .id("kernel-agent-old")
            .cost("guests of new VMs may not know all that this offshootd asks of them")
            .fix(Fix::RefreshKernel),
        ),
        Some(Err(error)) => findings.push(
            finding(
                CAPABILITY,
                Severity::Warning,
                format!("the agent cannot be read: {}", chain(error)),
                "build it with `make build`, or set `agent` in the daemon's config",
            )
            .id("agent-unreadable")
            .cost("no kernel can be added or brought up to date"),
        ),
    }
    let features = &bundle.manifest.features;
    let lacking: Vec<_> = [
        (features.pmem, "no `--root pmem`, which shares memory between VMs"),
        (features.virtiofs, "no `-v` and no `--root virtiofs`"),
    ]
    .into_iter()
    .filter_map(|(has, cost)| (!has).then_some(cost))
    .collect();
    if !lacking.is_empty() {
        findings.push(
            finding(
                CAPABILITY,
                Severity::Warning,
                format!("{name} lacks drivers"),
                "add one that has them with `offshoot kernel add --distro`",
            )
            .id("kernel-lacks-drivers")
            .cost(lacking.join("; ")),
        );
    }
    findings
}

/// A failure where nothing is left that could boot; VMs with another bundle start without a default.
fn no_default(error: &KernelError, bundles: &Bundles) -> Finding {
    let usable = bundles.all.iter().any(|found| found.bundle.is_ok());
    let (severity, cost) = if usable {
        (
            Severity::Warning,
            "no VM can be created; those with another kernel start",
        )
    } else {
        (Severity::Failure, "no VM can be created or started")
    };
    let id = match error {
        KernelError::NoKernel | KernelError::NotFound { .. } => "kernel-missing",
        KernelError::Format { .. } => "kernel-old-format",
        _ => "kernel-damaged",
    };
    let hint = match error.hints().into_iter().next() {
        Some(hint) if id != "kernel-damaged" => hint,
        _ => "add one with `offshoot kernel add --distro`".to_owned(),
    };
    finding(CAPABILITY, severity, chain(error), hint)
        .id(id)
        .cost(cost)
}

/// A bundle that is not the default, but that VMs boot.
fn judge_needed(id: &KernelId, bundles: &Bundles, vms: &[Needs]) -> Option<Finding> {
    let names: Vec<_> = vms
        .iter()
        .filter(|vm| vm.kernel == *id)
        .map(|vm| &vm.name)
        .collect();
    let users = in_use::named(&names);
    let message = match bundles
        .all
        .iter()
        .find(|found| found.id == *id)
        .map(|found| &found.bundle)
    {
        Some(Ok(_)) => return None,
        Some(Err(error)) => chain(error),
        None => format!("there is no kernel {id}"),
    };
    // Only a warning: VMs with other kernels start.
    let hint = "add the same kernel again with `offshoot kernel add`, or make the VMs anew";
    let found = finding(CAPABILITY, Severity::Warning, message, hint);
    Some(
        found
            .id("vm-kernel-unusable")
            .cost(format!("{users} cannot be started")),
    )
}

#[async_trait]
impl Capability for KernelCapability {
    fn name(&self) -> &'static str {
        CAPABILITY
    }

    async fn check(&self) -> Vec<Finding> {
        let vms = in_use::vms(&self.db).await;
        let (kernels, agent, gid) = (Arc::clone(&self.kernels), self.agent.clone(), self.gid);
        blocking(move || judge(&Bundles::look(&kernels, &agent, gid), &vms)).await
    }

    fn plan(&self, vm: &VmRecord, _: &VmPaths, plan: &mut VmPlan) -> Result<(), CapabilityError> {
        let launch = &mut plan.launch;
        let bundle = self
            .kernels
            .get(&vm.kernel_id)
            .map_err(|error| Box::new(error) as CapabilityError)?;
        launch.kernel = bundle.vmlinux();
        launch.initramfs = Some(bundle.initramfs());
        launch.console_device = ConsoleDevice::Serial;
        launch
            .cmdline
            .push(format!("console={}", launch.console_device.kernel_name()));
        launch.cmdline.extend(COMMAND_LINE.map(str::to_owned));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use offshoot_kernel::{BuiltinKnowledge, FileInfo, KernelFeatures, KernelManifest, KernelSource};
    use offshoot_model::{ByteSize, Digest};

    use super::*;
    use crate::capabilities::in_use::tests::needs;

    fn bundle(id: &KernelId) -> KernelBundle {
        let file = FileInfo {
            size: ByteSize::from_mib(1),
            digest: Digest::from_bytes([1; 32]),
        };
        KernelBundle {
            id: id.clone(),
            dir: "/k".into(),
            manifest: KernelManifest {
                format: offshoot_kernel::FORMAT,
                arch: "x86_64".into(),
                release: "6.12".into(),
                source: KernelSource::Files,
                modules: Vec::new(),
                builtin: BuiltinKnowledge::Assumed,
                features: KernelFeatures {
                    pmem: true,
                    virtiofs: true,
                    ..KernelFeatures::default()
                },
                agent: file,
                vmlinux: file,
                initramfs: file,
                created_unix_ms: 0,
            },
        }
    }

    fn found(id: &KernelId, bundle: Result<KernelBundle, KernelError>) -> Vec<FoundBundle> {
        let id = id.clone();
        vec![FoundBundle { id, bundle }]
    }

    /// All is well with one bundle.
    fn well() -> Bundles {
        let id = needs("a").kernel;
        Bundles {
            default: Ok(bundle(&id)),
            current: Some(Ok(true)),
            closed: None,
            all: found(&id, Ok(bundle(&id))),
        }
    }

    fn check(bundles: &Bundles, vms: &[Needs], expected: &[(&str, Severity)]) {
        let findings = judge(bundles, vms);
        let said: Vec<_> = findings
            .iter()
            .map(|found| (found.id.as_str(), found.severity))
            .collect();
        assert_eq!(said, expected);
        for found in findings.iter().filter(|found| found.severity != Severity::Ok) {
            assert!(!found.cost.is_empty() && !found.hint.is_empty(), "{found:?}");
        }
    }

    #[test]
    fn what_is_wrong_with_the_default_is_told() {
        use Severity::{Failure, Ok as Well, Warning};
        check(&well(), &[needs("a")], &[("kernel", Well)]);
        let old = Bundles {
            current: Some(Ok(false)),
            ..well()
        };
        check(&old, &[], &[("kernel", Well), ("kernel-agent-old", Warning)]);
        let no_agent = Bundles {
            current: Some(Err(KernelError::NoKernel)),
            ..well()
        };
        check(&no_agent, &[], &[("kernel", Well), ("agent-unreadable", Warning)]);
        let closed = Bundles {
            closed: Some("/k/vmlinux".into()),
            ..well()
        };
        check(&closed, &[], &[("kernel-closed", Failure)]);
        let mut plain = well();
        if let Ok(bundle) = &mut plain.default {
            bundle.manifest.features = KernelFeatures::default();
        }
        check(
            &plain,
            &[],
            &[("kernel", Well), ("kernel-lacks-drivers", Warning)],
        );
    }

    #[test]
    fn without_a_kernel_nothing_starts() {
        use Severity::{Failure, Warning};
        let none = || Bundles {
            default: Err(KernelError::NoKernel),
            current: None,
            closed: None,
            all: Vec::new(),
        };
        check(&none(), &[], &[("kernel-missing", Failure)]);
        let id = needs("a").kernel;
        let damaged = || KernelError::Damaged {
            id: id.clone(),
            file: "vmlinux",
        };
        let broken = Bundles {
            default: Err(damaged()),
            all: found(&id, Err(damaged())),
            ..none()
        };
        let vms = [needs("a")];
        check(
            &broken,
            &vms,
            &[("kernel-damaged", Failure), ("vm-kernel-unusable", Warning)],
        );
        let other = Bundles {
            default: Err(damaged()),
            ..well()
        };
        check(&other, &vms, &[("kernel-damaged", Warning)]);
        let gone = Bundles {
            default: Ok(bundle(&KernelId::from_bytes(&[9; 8]))),
            all: Vec::new(),
            ..well()
        };
        check(
            &gone,
            &vms,
            &[("kernel", Severity::Ok), ("vm-kernel-unusable", Warning)],
        );
    }

    #[test]
    fn a_file_is_readable_for_all_or_for_the_group() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("vmlinux");
        std::fs::write(&file, "x").unwrap();
        let gid = std::fs::metadata(&file).unwrap().gid();
        let check = |mode, expected: [bool; 2]| {
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(
                [is_readable(&file, gid), is_readable(&file, gid + 1)],
                expected,
                "{mode:o}"
            );
        };
        check(0o644, [true, true]);
        check(0o640, [true, false]);
        check(0o600, [false, false]);
        assert!(!is_readable(&dir.path().join("none"), gid));
    }
}
