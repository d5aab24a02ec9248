//! Which VMM and which root a new VM gets: the facts of this host, gathered for the policies, which are pure.

use offshoot_engine::definition::{Choice, PassedOver};
use offshoot_kernel::KernelBundle;
use offshoot_model::{ByteSize, ErrorKind, Explain as _, VmConfig, VmmRequest};
use offshoot_rootfs::policy::{KernelRootFacts, Missing, RootFacts, VmmRootFacts, decide};
use offshoot_vmm::VmmFeature;
use offshoot_vmm::plan::Accel;

use crate::app::App;
use crate::error::{Answer, Failure};

/// Which VMM, out of the request and what this build has.
pub fn vmm(app: &App, request: VmmRequest) -> Answer<Choice> {
    let refuse = |name: &str| {
        Err(Failure::new(
            ErrorKind::NotPossible,
            format!("this offshootd has no driver for {name}"),
        )
        .hint("leave `--vmm` out, or use `--vmm qemu`"))
    };
    match request {
        VmmRequest::CloudHypervisor => return refuse("Cloud Hypervisor"),
        VmmRequest::Firecracker => return refuse("Firecracker"),
        VmmRequest::Auto | VmmRequest::Qemu => {}
    }
    let how = match app.accelerator.accel {
        Accel::Kvm => "on KVM",
        Accel::Tcg => "emulated in software",
    };
    let first = match request {
        VmmRequest::Auto => "the only VMM this version drives".to_owned(),
        _ => "asked for".to_owned(),
    };
    Ok(Choice {
        chosen: "qemu".into(),
        reasons: vec![first, format!("{how}: {}", app.accelerator.probe.explanation)],
        passed_over: Vec::new(),
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
        from_template: false,
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
