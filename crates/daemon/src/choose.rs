//! Which VMM and which root a new VM gets: the facts of this host, gathered for the policies, which are pure.

use offshoot_engine::capabilities::{Device, closed};
use offshoot_engine::definition::{Choice, PassedOver};
use offshoot_engine::templates::fit::misfit;
use offshoot_kernel::KernelBundle;
use offshoot_model::{
    Boot, ByteSize, ErrorKind, Explain as _, NetworkChoice, RootRequest, VmConfig, VmmRequest,
};
use offshoot_rootfs::policy::{KernelRootFacts, Missing, RootFacts, VmmRootFacts, decide};
use offshoot_vmm::VmmFeature;
use offshoot_vmm::plan::Accel;
use offshoot_vmm::policy::{self, Candidate, HostFacts, KernelVmmFacts, Needs};

use crate::app::App;
use crate::error::{Answer, Failure};

/// Which VMM, out of the request and what this host has.
pub async fn vmm(app: &App, config: &VmConfig, kernel: &KernelBundle) -> Answer<Choice> {
    let mut candidates = Vec::new();
    let mut order = app.config.vmm_order.clone();
    // One that is not in the order can still be asked for.
    if !order.contains(&config.vmm) && config.vmm != VmmRequest::Auto {
        order.push(config.vmm);
    }
    for kind in order.into_iter().filter_map(policy::name_of) {
        let Some(driver) = app.drivers.get(kind) else {
            continue;
        };
        candidates.push(Candidate {
            kind: driver.kind(),
            facts: driver.probe().await.map_err(|error| policy::Missing {
                remedy: error.hints().into_iter().next().unwrap_or_default(),
                what: error.to_string(),
            }),
        });
    }
    let lacks =
        |device| closed(device, &app.accelerator).map(|(what, remedy)| policy::Missing { what, remedy });
    let host = HostFacts {
        kvm_native: app.accelerator.accel == Accel::Kvm,
        no_kvm: lacks(Device::Kvm),
        no_tun: lacks(Device::Tun),
        kvm_explanation: app.accelerator.probe.explanation.clone(),
    };
    let features = kernel.manifest.features;
    let kernel = KernelVmmFacts {
        release: kernel.manifest.release.clone(),
        vsock: features.vsock,
        mmio: features.mmio,
    };
    let needs = Needs {
        virtiofs: !config.mounts.is_empty() || config.root == RootRequest::Virtiofs,
        pmem: config.root == RootRequest::Pmem,
        network: config.network.network != NetworkChoice::None,
    };
    let decision = policy::decide(config.vmm, &candidates, needs, &host, &kernel)?;
    Ok(Choice {
        chosen: decision.chosen.to_owned(),
        reasons: decision.reasons,
        passed_over: decision
            .passed_over
            .into_iter()
            .map(|(kind, reason)| PassedOver {
                name: kind.to_owned(),
                reason,
            })
            .collect(),
    })
}

/// How the root is shown. `root_size` is the length of `root.erofs`, once the base is there.
pub async fn root(
    app: &App,
    config: &VmConfig,
    vmm: &Choice,
    kernel: &KernelBundle,
    root_size: Option<ByteSize>,
) -> Answer<Choice> {
    let facts = facts(app, config, vmm, kernel, root_size).await?;
    if !config.mounts.is_empty() {
        check_shares(&facts)?;
    }
    let decision = decide(config.root, &facts)?;
    Ok(Choice {
        chosen: decision.chosen.as_str().to_owned(),
        reasons: vec![decision.reason],
        passed_over: decision
            .passed_over
            .into_iter()
            .map(|(kind, reason)| PassedOver {
                name: kind.as_str().to_owned(),
                reason,
            })
            .collect(),
    })
}

/// Refuses `--boot template` for a VM that cannot be restored, before it is made.
pub fn refuse_boot(config: &VmConfig, root: &Choice) -> Answer<()> {
    let kind = root
        .chosen
        .parse()
        .map_err(|_| Failure::broken("the choice of a root"))?;
    match (config.boot, misfit(config, kind)) {
        (Boot::Template, Some(misfit)) => Err(Failure::new(
            ErrorKind::NotPossible,
            format!("the VM cannot be restored from a template: {}", misfit.reason()),
        )
        .hint(misfit.remedy())),
        _ => Ok(()),
    }
}

async fn facts(
    app: &App,
    config: &VmConfig,
    vmm: &Choice,
    kernel: &KernelBundle,
    root_size: Option<ByteSize>,
) -> Answer<RootFacts> {
    let driver = app
        .drivers
        .get(vmm.chosen.as_str())
        .ok_or_else(|| Failure::broken("the choice of a VMM"))?;
    let vmm_facts = driver.probe().await?;
    let has = |feature| vmm_facts.features.contains(&feature);
    // QEMU's lean machine, `microvm`, does not map persistent memory. Emulated, the fuller `q35` and the drivers of
    // persistent memory made a boot of 3.6 s one of 4.6 s. Under KVM guests set themselves up in native time (not
    // measured yet), and there the memory counts for more.
    let slow = (vmm_facts.kind == "qemu" && app.accelerator.accel == Accel::Tcg).then(|| {
        "works, but QEMU's machine with persistent memory boots more slowly when it is emulated".to_owned()
    });
    let no_virtiofsd = app.virtiofsd.probe().await.err().map(|error| Missing {
        remedy: error.hints().into_iter().next().unwrap_or_default(),
        what: error.to_string(),
    });
    let features = kernel.manifest.features;
    Ok(RootFacts {
        vmm: VmmRootFacts {
            name: format!("{} {}", vmm_facts.kind, vmm_facts.version),
            pmem: has(VmmFeature::Pmem),
            virtiofs: has(VmmFeature::Virtiofs),
            pmem_slows_boot: slow,
        },
        kernel: KernelRootFacts {
            release: kernel.manifest.release.clone(),
            pmem: features.pmem,
            virtiofs: features.virtiofs,
        },
        no_virtiofsd,
        root_size,
        memory: config.memory,
        // A choice that is left to us fits a template; only what was asked for by name may not.
        from_template: config.boot == Boot::Template,
    })
}

/// Refuses `-v` where nothing can serve it, before anything is made.
fn check_shares(facts: &RootFacts) -> Answer<()> {
    let missing = match (&facts.vmm, &facts.kernel) {
        (vmm, _) if !vmm.virtiofs => Some(Missing {
            what: format!("{} has no virtiofs", vmm.name),
            remedy: "choose another VMM with `--vmm`, or copy files with `offshoot cp`".into(),
        }),
        (_, kernel) if !kernel.virtiofs => Some(Missing {
            what: format!("kernel {} has no virtiofs", kernel.release),
            remedy: "add one that has it with `offshoot kernel add --distro`".into(),
        }),
        _ => facts.no_virtiofsd.clone(),
    };
    match missing {
        None => Ok(()),
        Some(Missing { what, remedy }) => Err(Failure::new(
            ErrorKind::NotPossible,
            format!("folders cannot be shared: {what}"),
        )
        .hint(remedy)),
    }
}
