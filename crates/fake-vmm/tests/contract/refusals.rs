//! A Cloud Hypervisor or a Firecracker that refuses, dies, says nothing or says rubbish, at every request there is: a clear
//! error, and nothing is left.

use std::time::{Duration, Instant};

use offshoot_vmm::plan::SharePlan;
use offshoot_vmm::{ExitCause, LaunchError, MachineError, MachineStatus};

use crate::machines::{End, Rig, Vmm};
use crate::rig::{DISK, HELLO, aborted};

/// Every request of a Firecracker's launch, with what is told of its refusal.
const LAUNCH: [(&str, &str); 6] = [
    ("/machine-config", "set up the machine"),
    ("/boot-source", "load the kernel"),
    ("/drives/data", "open a disk"),
    ("/vsock", "offer vsock"),
    ("/balloon", "offer a balloon"),
    ("/actions", "start the guest"),
];

async fn launch_error(vmm: Vmm, behaviour: &str) -> LaunchError {
    assert!(vmm.is_fake());
    let rig = Rig::with_behaviour(vmm, End::Idle, behaviour).unwrap();
    let launched = rig.driver.launch(&rig.plan).await;
    let error = launched
        .err()
        .unwrap_or_else(|| panic!("it starts with {behaviour}"));
    rig.assert_nothing_left().await;
    error
}

#[tokio::test]
async fn a_firecracker_that_refuses_is_quoted() {
    for (path, doing) in LAUNCH {
        let error = launch_error(Vmm::FakeFirecracker, &format!("refuse={path}")).await;
        assert_eq!(
            error.to_string(),
            format!("the VMM refused to {doing}: this fake refuses {path}")
        );
    }
}

#[tokio::test]
async fn a_firecracker_that_dies_is_told_so() {
    for (path, _) in LAUNCH {
        let error = launch_error(Vmm::FakeFirecracker, &format!("die={path}")).await;
        let LaunchError::Exited { exit, .. } = error else {
            panic!("{path}: {error:?}")
        };
        assert!(aborted(exit), "{exit:?}");
    }
}

#[tokio::test]
async fn a_firecracker_that_says_nothing_is_given_up() {
    for behaviour in ["hang", "silent=/boot-source", "silent=/actions"] {
        let began = Instant::now();
        let error = launch_error(Vmm::FakeFirecracker, behaviour).await;
        assert!(matches!(error, LaunchError::Control { .. }), "{error:?}");
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    }
}

#[tokio::test]
async fn rubbish_is_no_answer() {
    let error = launch_error(Vmm::FakeFirecracker, "garbage").await;
    assert!(matches!(error, LaunchError::Control { .. }), "{error:?}");
    let error = launch_error(Vmm::FakeCloudHypervisor, "garbage").await;
    assert!(matches!(error, LaunchError::Control { .. }), "{error:?}");
}

#[tokio::test]
async fn one_that_exits_at_once_is_quoted() {
    for vmm in [Vmm::FakeFirecracker, Vmm::FakeCloudHypervisor] {
        let error = launch_error(vmm, "exit").await.to_string();
        assert!(
            error.ends_with("status 1: offshoot-fake-vmm: told to exit at start"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_cloud_hypervisor_that_does_not_boot_is_given_up() {
    for behaviour in ["silent=booted", "hang", "silent=/vmm.ping", "refuse=/vmm.ping"] {
        let began = Instant::now();
        let error = launch_error(Vmm::FakeCloudHypervisor, behaviour).await;
        assert!(matches!(error, LaunchError::Control { .. }), "{error:?}");
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    }
    let error = launch_error(Vmm::FakeCloudHypervisor, "die=/vmm.ping").await;
    assert!(matches!(error, LaunchError::Exited { .. }), "{error:?}");
}

#[tokio::test]
async fn a_share_that_nobody_serves_is_told_at_once() {
    let mut rig = Rig::new(Vmm::FakeCloudHypervisor, End::Idle).unwrap();
    let socket = rig.folder.join("share.sock");
    rig.plan.shares.push(SharePlan {
        tag: "root".into(),
        socket: socket.clone(),
    });
    for left in [false, true] {
        if left {
            std::fs::write(&socket, "no socket").unwrap();
        }
        let began = Instant::now();
        let error = rig
            .driver
            .launch(&rig.plan)
            .await
            .err()
            .expect("nobody serves it");
        assert!(matches!(error, LaunchError::NoShare { .. }), "{error:?}");
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        rig.assert_nothing_left().await;
    }
}

#[tokio::test]
async fn one_that_refuses_later_goes_on() {
    for (vmm, path) in [
        (Vmm::FakeFirecracker, "/vm"),
        (Vmm::FakeCloudHypervisor, "/vm.pause"),
    ] {
        let rig = Rig::with_behaviour(vmm, End::Idle, &format!("refuse={path}")).unwrap();
        let machine = rig.launch().await;
        let error = machine.pause().await.unwrap_err();
        let MachineError::Control { source, .. } = &error else {
            panic!("{error:?}")
        };
        assert!(
            source.to_string().ends_with(&format!("this fake refuses {path}")),
            "{source}"
        );
        assert_eq!(machine.status().await.unwrap(), MachineStatus::Running);
        machine.quit().await.unwrap();
        rig.assert_nothing_left().await;
    }
}

#[tokio::test]
async fn a_refused_resize_is_told() {
    let rig = Rig::with_behaviour(Vmm::FakeCloudHypervisor, End::Idle, "refuse=/vm.resize-disk").unwrap();
    let machine = rig.launch().await;
    let size = offshoot_model::ByteSize::from_mib(2);
    let resized = machine.resize_disk(DISK, size).await;
    assert!(
        matches!(resized, Err(MachineError::Control { .. })),
        "{resized:?}"
    );
    machine.kill().await.unwrap();
    rig.assert_nothing_left().await;
}

#[tokio::test]
async fn one_that_dies_is_noticed() {
    for vmm in [Vmm::FakeFirecracker, Vmm::FakeCloudHypervisor] {
        let rig = Rig::with_behaviour(vmm, End::Idle, "die-after-ms=200").unwrap();
        let machine = rig.launch().await;
        let exit = machine.wait_exit().await;
        assert!(exit.cause == ExitCause::Died && aborted(exit.process), "{exit:?}");
        rig.assert_nothing_left().await;
    }
}

#[tokio::test]
async fn one_that_does_not_quit_is_killed() {
    let rig = Rig::with_behaviour(
        Vmm::FakeCloudHypervisor,
        End::Idle,
        &format!("deaf console={HELLO}"),
    )
    .unwrap();
    let machine = rig.launch().await;
    let quit = tokio::time::timeout(Duration::from_millis(300), machine.quit()).await;
    assert!(quit.is_err(), "{quit:?}");
    assert_eq!(machine.status().await.unwrap(), MachineStatus::Running);
    machine.kill().await.unwrap();
    assert_eq!(machine.wait_exit().await.cause, ExitCause::Killed);
    rig.assert_nothing_left().await;
}
