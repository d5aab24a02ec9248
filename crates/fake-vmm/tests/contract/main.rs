//! What every VMM must do, asked of real QEMU (without KVM, with guests of a few bytes) and of the fake.

mod confinement;
mod devices;
mod fake_guest;
mod guest;
mod machines;
mod refusals;
mod rig;
mod shares;
mod words;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use offshoot_model::{ByteSize, ErrorKind, Explain};
use offshoot_sys::process::{Exit, PidFd, Signal};
use offshoot_vmm::{
    AgentEndpoint, Driver, ExitCause, LaunchError, MachineError, MachineState, MachineStatus, ReopenError,
    VmmFeature,
};

use guest::End;
use rig::{DISK, DISK_SIZE, HELLO, Rig, Vmm};

/// Makes one test per VMM from each function of the contract.
macro_rules! contract {
    ($($name:ident($end:expr);)*) => {
        mod on_qemu {
            $(#[tokio::test]
            async fn $name() {
                let Some(rig) = super::Rig::new(super::Vmm::Qemu, $end) else { return };
                super::$name(&rig, super::Vmm::Qemu).await;
                rig.assert_nothing_left().await;
            })*
        }
        mod on_the_fake {
            $(#[tokio::test]
            async fn $name() {
                let Some(rig) = super::Rig::new(super::Vmm::Fake, $end) else { return };
                super::$name(&rig, super::Vmm::Fake).await;
                rig.assert_nothing_left().await;
            })*
        }
    };
}

contract! {
    it_says_what_it_can_do(super::End::Idle);
    it_pauses_resumes_and_quits(super::End::Idle);
    it_is_killed(super::End::Idle);
    it_is_found_again_after_its_handle_was_dropped(super::End::Idle);
    a_crash_is_noticed(super::End::Idle);
    a_guest_that_switches_itself_off_is_noticed_and_its_last_words_kept(super::End::PowerOff);
    a_guest_that_ends_while_nobody_watches_is_found_ended(super::End::PowerOff);
    a_guest_that_resets_is_not_started_again(super::End::Reset);
    a_launch_that_fails_says_why_in_the_vmms_words(super::End::Idle);
    a_launch_that_is_given_up_leaves_nothing(super::End::Idle);
    a_disk_grows_and_never_shrinks(super::End::Idle);
    the_console_is_kept(super::End::Idle);
    the_agents_link_can_be_connected(super::End::Idle);
    what_the_process_gets_is_no_more_than_it_needs(super::End::Idle);
}

async fn it_says_what_it_can_do(rig: &Rig, _: Vmm) {
    let facts = rig.driver.probe().await.unwrap();
    assert_eq!((facts.kind.as_str(), rig.driver.kind()), ("qemu", "qemu"));
    assert!(
        facts.version.starts_with(|c: char| c.is_ascii_digit()),
        "{}",
        facts.version
    );
    for feature in [
        VmmFeature::Tcg,
        VmmFeature::Pmem,
        VmmFeature::Virtiofs,
        VmmFeature::VirtioSerial,
        VmmFeature::Snapshots,
    ] {
        assert!(facts.features.contains(&feature), "{feature:?} in {facts:?}");
    }
}

async fn it_pauses_resumes_and_quits(rig: &Rig, _: Vmm) {
    let machine = rig.launch().await;
    assert_eq!(machine.status().await.unwrap(), MachineStatus::Running);
    for _ in 0..2 {
        machine.pause().await.unwrap();
        assert_eq!(machine.status().await.unwrap(), MachineStatus::Paused);
    }
    for _ in 0..2 {
        machine.resume().await.unwrap();
        assert_eq!(machine.status().await.unwrap(), MachineStatus::Running);
    }
    machine.power_button().await.unwrap();
    assert!(machine.snapshots().is_some());
    machine.quit().await.unwrap();
    let exit = machine.wait_exit().await;
    assert_eq!((exit.cause, exit.process), (ExitCause::Quit, Some(Exit::Code(0))));
    rig.assert_nothing_left().await;
    // Asked again, it is still gone.
    machine.quit().await.unwrap();
    machine.kill().await.unwrap();
    assert!(matches!(machine.pause().await, Err(MachineError::Gone)));
}

async fn it_is_killed(rig: &Rig, _: Vmm) {
    let machine = rig.launch().await;
    let (killed, exit) = tokio::join!(machine.kill(), machine.wait_exit());
    killed.unwrap();
    assert_eq!(
        (exit.cause, exit.process),
        (ExitCause::Killed, Some(Exit::Signal(9)))
    );
}

async fn it_is_found_again_after_its_handle_was_dropped(rig: &Rig, _: Vmm) {
    let machine = rig.launch().await;
    let state = machine.state().clone();
    assert_eq!(
        MachineState::load(&rig.plan.run_dir).unwrap().as_ref(),
        Some(&state)
    );
    machine.pause().await.unwrap();
    drop(machine);
    let stored = serde_json::to_string(&state).unwrap();
    let stored: MachineState = serde_json::from_str(&stored).unwrap();
    for _ in 0..3 {
        let again = rig.driver.reopen(&stored).await.unwrap().expect("it runs");
        assert_eq!(again.state(), &state);
        assert_eq!(again.status().await.unwrap(), MachineStatus::Paused);
    }
    let again = rig.driver.reopen(&stored).await.unwrap().expect("it runs");
    again.resume().await.unwrap();
    assert_eq!(again.status().await.unwrap(), MachineStatus::Running);
    again.kill().await.unwrap();
    assert_eq!(again.wait_exit().await.cause, ExitCause::Killed);
    rig.assert_nothing_left().await;
    assert!(rig.driver.reopen(&stored).await.unwrap().is_none());
    let foreign = MachineState {
        driver: "another".into(),
        ..stored
    };
    assert!(matches!(
        rig.driver.reopen(&foreign).await,
        Err(ReopenError::Driver { .. })
    ));
}

async fn a_crash_is_noticed(rig: &Rig, _: Vmm) {
    let machine = rig.launch().await;
    let process = PidFd::open(&machine.state().process).unwrap().unwrap();
    process.send_signal(Signal::KILL).unwrap();
    let exit = machine.wait_exit().await;
    assert_eq!(
        (exit.cause, exit.process),
        (ExitCause::Died, Some(Exit::Signal(9)))
    );
    assert!(matches!(machine.status().await, Err(MachineError::Gone)));
    rig.assert_nothing_left().await;

    // And when nobody looked: the sockets are still there until somebody does.
    let machine = rig.launch().await;
    let state = machine.state().clone();
    drop(machine);
    let process = PidFd::open(&state.process).unwrap().unwrap();
    process.send_signal(Signal::KILL).unwrap();
    process.wait_exit().await;
    assert!(state.control.exists());
    assert!(rig.driver.reopen(&state).await.unwrap().is_none());
}

async fn a_guest_that_switches_itself_off_is_noticed_and_its_last_words_kept(rig: &Rig, _: Vmm) {
    let machine = rig.launch().await;
    assert_eq!(machine.wait_exit().await.cause, ExitCause::GuestPowerOff);
    assert_eq!(machine.console_tail(100).await.unwrap(), HELLO.as_bytes());
    assert_eq!(std::fs::read(&rig.plan.console).unwrap(), HELLO.as_bytes());
}

async fn a_guest_that_ends_while_nobody_watches_is_found_ended(rig: &Rig, _: Vmm) {
    let machine = rig.launch().await;
    let state = machine.state().clone();
    drop(machine);
    let control = state.control.clone();
    tokio::task::spawn_blocking(move || wait_until_shutdown(&control))
        .await
        .unwrap();
    let again = rig.driver.reopen(&state).await.unwrap().expect("it waits for us");
    assert_eq!(again.wait_exit().await.cause, ExitCause::GuestPowerOff);
    assert_eq!(std::fs::read(&rig.plan.console).unwrap(), HELLO.as_bytes());
}

/// Asks QMP itself, beside the driver, until the guest has ended.
fn wait_until_shutdown(control: &Path) {
    let stream = UnixStream::connect(control).unwrap();
    let mut writer = stream.try_clone().unwrap();
    let mut lines = BufReader::new(stream).lines();
    writer
        .write_all(b"{\"execute\": \"qmp_capabilities\"}\n")
        .unwrap();
    loop {
        writer
            .write_all(b"{\"execute\": \"query-status\", \"id\": 1}\n")
            .unwrap();
        let answer = lines.find(|line| {
            line.as_ref().unwrap().contains("\"id\": 1") || line.as_ref().unwrap().contains("\"id\":1")
        });
        if answer.unwrap().unwrap().contains("shutdown") {
            return;
        }
        #[expect(
            clippy::disallowed_methods,
            reason = "between two questions about the state that is waited for"
        )]
        std::thread::sleep(Duration::from_millis(10));
    }
}

async fn a_guest_that_resets_is_not_started_again(rig: &Rig, vmm: Vmm) {
    let machine = rig.launch().await;
    let expected = match vmm {
        Vmm::Qemu => ExitCause::GuestReset,
        // It has no processor to reset; its guest switches itself off.
        Vmm::Fake => ExitCause::GuestPowerOff,
    };
    assert_eq!(machine.wait_exit().await.cause, expected);
}

async fn a_launch_that_fails_says_why_in_the_vmms_words(rig: &Rig, _: Vmm) {
    std::fs::write(&rig.plan.log, "words of an earlier run\n").unwrap();
    let mut plan = rig.plan.clone();
    plan.kernel = rig.folder.join("no-such-kernel");
    for _ in 0..2 {
        let error = rig.driver.launch(&plan).await.err().expect("there is no kernel");
        let LaunchError::Exited {
            exit: Some(Exit::Code(1)),
            said,
            ..
        } = &error
        else {
            panic!("{error:?}")
        };
        assert!(said.contains("no-such-kernel"), "{said}");
        assert!(!said.contains("earlier run") && !said.contains('\n'), "{said}");
        assert_eq!(error.kind(), ErrorKind::Internal);
        assert!(error.hints()[0].contains("vmm.log"));
        rig.assert_nothing_left().await;
    }
    plan.cpus = 0;
    assert!(matches!(
        rig.driver.launch(&plan).await,
        Err(LaunchError::Plan { .. })
    ));
    plan = rig.plan.clone();
    plan.run_dir = rig.folder.join("no-such-folder");
    assert!(matches!(
        rig.driver.launch(&plan).await,
        Err(LaunchError::Prepare { .. })
    ));
}

async fn a_launch_that_is_given_up_leaves_nothing(rig: &Rig, _: Vmm) {
    rig.driver.facts().await.unwrap();
    {
        let mut launch = rig.driver.launch(&rig.plan);
        // Up to its first wait: the process has been made.
        let first =
            std::future::poll_fn(|context| std::task::Poll::Ready(launch.as_mut().poll(context))).await;
        assert!(first.is_pending());
        let state = MachineState::load(&rig.plan.run_dir)
            .unwrap()
            .expect("it is recorded");
        rig.remember(state.process.pid);
    }
}

async fn a_disk_grows_and_never_shrinks(rig: &Rig, _: Vmm) {
    let machine = rig.launch().await;
    let grown = ByteSize::from_mib(8);
    machine.resize_disk(DISK, grown).await.unwrap();
    assert_eq!(
        std::fs::metadata(&rig.plan.disks[0].path).unwrap().len(),
        grown.bytes()
    );
    machine.resize_disk(DISK, grown).await.unwrap();
    let error = machine.resize_disk(DISK, DISK_SIZE).await.unwrap_err();
    assert!(matches!(error, MachineError::Shrink { .. }), "{error:?}");
    let error = machine.resize_disk("other", grown).await.unwrap_err();
    assert!(matches!(error, MachineError::NoDisk { .. }), "{error:?}");
    assert_eq!(
        std::fs::metadata(&rig.plan.disks[0].path).unwrap().len(),
        grown.bytes()
    );
    machine.quit().await.unwrap();
}

async fn the_console_is_kept(rig: &Rig, _: Vmm) {
    let machine = rig.launch().await;
    // The guest needs a moment to speak; what is waited for is its words.
    while machine.console_tail(100).await.unwrap() != HELLO.as_bytes() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(machine.console_tail(7).await.unwrap(), b"console");
    assert_eq!(std::fs::read(&rig.plan.console).unwrap(), HELLO.as_bytes());
    machine.kill().await.unwrap();
    assert_eq!(
        machine.console_tail(7).await.unwrap(),
        b"console",
        "the log outlives the process"
    );
}

async fn the_agents_link_can_be_connected(rig: &Rig, _: Vmm) {
    let machine = rig.launch().await;
    let AgentEndpoint::UnixLink(path) = machine.agent_endpoint() else {
        panic!("not over virtio-serial")
    };
    let first = UnixStream::connect(path).unwrap();
    drop(first);
    UnixStream::connect(path).unwrap().write_all(b"x").unwrap();
    machine.quit().await.unwrap();
}

async fn what_the_process_gets_is_no_more_than_it_needs(rig: &Rig, vmm: Vmm) {
    if rig.plan.identity.is_none() {
        #[expect(clippy::print_stderr, reason = "a skipped test says so")]
        {
            eprintln!("SKIPPED: needs root");
        }
        return;
    }
    let machine = rig.launch().await;
    let status = std::fs::read_to_string(format!("/proc/{}/status", machine.state().process.pid)).unwrap();
    let field = |name: &str| {
        let line = status
            .lines()
            .find(|line| line.starts_with(name))
            .unwrap_or_else(|| panic!("no {name}"));
        line.split_once(':').unwrap().1.trim().to_owned()
    };
    assert_eq!(field("Uid"), "65534\t65534\t65534\t65534");
    assert_eq!(field("Groups"), "");
    assert_eq!(field("CapEff"), "0000000000000000");
    assert_eq!(field("NoNewPrivs"), "1");
    if vmm == Vmm::Qemu {
        assert_eq!(field("Seccomp:"), "2");
    }
    machine.quit().await.unwrap();
}

/// What only the fake can be told to do.
mod a_bad_vmm {
    use super::*;

    async fn launch_error(behaviour: &str) -> LaunchError {
        let rig = Rig::with_behaviour(Vmm::Fake, End::Idle, behaviour).unwrap();
        let error = rig
            .driver
            .launch(&rig.plan)
            .await
            .err()
            .expect("it does not start");
        rig.assert_nothing_left().await;
        error
    }

    #[tokio::test]
    async fn that_exits_at_once_is_quoted() {
        let error = launch_error("exit").await;
        assert!(
            error
                .to_string()
                .ends_with("status 1: offshoot-fake-vmm: told to exit at start"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn that_hangs_is_given_up() {
        let error = launch_error("hang").await;
        assert!(matches!(error, LaunchError::Control { .. }), "{error:?}");
    }

    #[tokio::test]
    async fn that_speaks_something_else_is_given_up() {
        let error = launch_error("garbage").await;
        assert!(matches!(error, LaunchError::Control { .. }), "{error:?}");
    }

    #[tokio::test]
    async fn that_refuses_is_quoted_and_goes_on() {
        let rig = Rig::with_behaviour(Vmm::Fake, End::Idle, "refuse=stop").unwrap();
        let machine = rig.launch().await;
        let error = machine.pause().await.unwrap_err();
        let MachineError::Control { source, .. } = &error else {
            panic!("{error:?}")
        };
        assert_eq!(source.to_string(), "the VMM refused: this fake refuses stop");
        assert_eq!(machine.status().await.unwrap(), MachineStatus::Running);
        machine.quit().await.unwrap();
        rig.assert_nothing_left().await;
    }

    #[tokio::test]
    async fn that_dies_is_noticed() {
        let rig = Rig::with_behaviour(Vmm::Fake, End::Idle, "die-after-ms=200").unwrap();
        let machine = rig.launch().await;
        let exit = machine.wait_exit().await;
        assert!(
            exit.cause == ExitCause::Died && rig::aborted(exit.process),
            "{exit:?}"
        );
        rig.assert_nothing_left().await;
    }

    #[tokio::test]
    async fn that_does_not_quit_can_be_killed() {
        let rig = Rig::with_behaviour(Vmm::Fake, End::Idle, "deaf").unwrap();
        let machine = rig.launch().await;
        // The answer to `quit` comes; the end does not, and the wait for it is cut short.
        let quit = tokio::time::timeout(Duration::from_millis(300), machine.quit()).await;
        assert!(quit.is_err(), "{quit:?}");
        assert_eq!(machine.status().await.unwrap(), MachineStatus::Running);
        machine.kill().await.unwrap();
        assert_eq!(machine.wait_exit().await.cause, ExitCause::Killed);
        rig.assert_nothing_left().await;
    }
}
