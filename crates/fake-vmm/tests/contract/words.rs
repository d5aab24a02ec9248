//! What a VMM says: kept when it has ended, also for a daemon that came later, and never without a limit.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use offshoot_vmm::Driver;
use offshoot_vmm::qemu::{QemuConfig, QemuDriver};

use crate::guest::End;
use crate::rig::{Rig, Vmm};

/// As much as its log has of one run.
const MOST: u64 = 64 << 10;

/// A fake VMM that says 10 MB before it does its work, as one that its guest has taken over might.
fn talkative() -> Option<Rig> {
    let mut rig = Rig::new(Vmm::Fake, End::Idle)?;
    let program = rig.folder.join("talkative");
    let fake = env!("CARGO_BIN_EXE_offshoot-fake-vmm");
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *offshoot-*) /usr/bin/yes rubbish | /usr/bin/head -c 10000000 >&2 ;; esac\n\
         exec {fake} \"$@\"\n"
    );
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    rig.driver = QemuDriver::new(QemuConfig {
        program,
        files: vec![fake.into()],
        // It talks before it answers.
        patience: Duration::from_secs(30),
        ..QemuConfig::default()
    });
    Some(rig)
}

#[tokio::test]
async fn a_vmm_cannot_fill_the_disk_by_talking() {
    let Some(rig) = talkative() else { return };
    let machine = rig.launch().await;
    machine.kill().await.unwrap();
    let log = std::fs::read_to_string(&rig.plan.log).unwrap();
    assert!(log.starts_with("rubbish\n"), "{log:.100}");
    assert_eq!(log.len() as u64, MOST);
    // Another run's words come after those of this one, until the log is full.
    for _ in 0..20 {
        rig.launch().await.kill().await.unwrap();
        assert!(std::fs::metadata(&rig.plan.log).unwrap().len() <= 1 << 20);
    }
    rig.assert_nothing_left().await;
}

#[tokio::test]
async fn the_words_of_a_vmm_that_was_found_again_are_kept() {
    let Some(rig) = talkative() else { return };
    let machine = rig.launch().await;
    let state = machine.state().clone();
    drop(machine);
    assert!(!rig.plan.log.exists(), "it has not ended");
    let again = rig.driver.reopen(&state).await.unwrap().expect("it runs");
    again.kill().await.unwrap();
    assert_eq!(std::fs::metadata(&rig.plan.log).unwrap().len(), MOST);
    rig.assert_nothing_left().await;
}
