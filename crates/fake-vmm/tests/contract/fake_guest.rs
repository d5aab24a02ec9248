//! The fake's guest, through the real driver and the real agent client.

use std::time::Duration;

use offshoot_agent_proto::client::{AgentClient, CallError, MainStart, OutputStream, ProcessEvent};
use offshoot_agent_proto::v1;
use offshoot_vmm::{AgentEndpoint, ExitCause, Machine};

use crate::guest::End;
use crate::rig::{DISK, Rig, Vmm};

fn rig() -> Rig {
    Rig::new(Vmm::Fake, End::Idle).expect("the fake is always there")
}

async fn connect(machine: &dyn Machine) -> AgentClient {
    let AgentEndpoint::UnixLink(path) = machine.agent_endpoint() else {
        panic!("not over virtio-serial")
    };
    AgentClient::connect_unix_link(path).await.unwrap()
}

/// Connects, and makes the guest a VM.
async fn boot(rig: &Rig, machine: &dyn Machine) -> AgentClient {
    let agent = connect(machine).await;
    let request = v1::ConfigureRequest {
        vm_id: rig.plan.vm.to_string(),
        root: Some(v1::configure_request::Root::RootCopySerial(DISK.into())),
        ..v1::ConfigureRequest::default()
    };
    agent.configure(request).await.unwrap();
    agent
}

fn process(argv: &[&str]) -> v1::Process {
    v1::Process {
        argv: argv.iter().map(ToString::to_string).collect(),
        ..v1::Process::default()
    }
}

async fn start_main(agent: &AgentClient, argv: &[&str]) -> MainStart {
    let what = v1::start_main_request::What::Process(process(argv));
    agent.start_main(what).await.unwrap()
}

/// Everything the main process writes to standard output from `offset` on, and its status.
async fn main_output(agent: &AgentClient, offset: u64) -> (String, i32) {
    let mut events = agent.main_output(offset).await.unwrap();
    let mut text = String::new();
    while let Some(event) = events.next().await {
        match event.unwrap() {
            ProcessEvent::Output { stream, data, .. } => {
                assert_eq!(stream, OutputStream::Stdout);
                text.push_str(std::str::from_utf8(&data).unwrap());
            }
            ProcessEvent::Exited { status } => return (text, status),
            other => panic!("{other:?}"),
        }
    }
    panic!("no status")
}

async fn exec(agent: &AgentClient, argv: &[&str]) -> Vec<ProcessEvent> {
    let mut session = agent.exec(process(argv)).await.unwrap();
    let mut events = Vec::new();
    while let Some(event) = session.events.next().await {
        events.push(event.unwrap());
    }
    events
}

#[tokio::test]
async fn the_main_process_writes_and_ends() {
    let rig = rig();
    let machine = rig.launch().await;
    let agent = boot(&rig, &*machine).await;
    let started = start_main(&agent, &["sh", "-c", "echo some words; exit 3"]).await;
    assert!(matches!(started, MainStart::Started { .. }), "{started:?}");
    assert_eq!(main_output(&agent, 0).await, ("some words\n".into(), 3));
    // Another daemon goes on where the last one was.
    drop(agent);
    let agent = connect(&*machine).await;
    assert_eq!(main_output(&agent, 5).await, ("words\n".into(), 3));
    assert_eq!(agent.hello().await.unwrap().main, v1::MainState::Exited);
    machine.quit().await.unwrap();
    rig.assert_nothing_left().await;
}

#[tokio::test]
async fn processes_run_beside_the_main_process_until_it_is_signalled() {
    let rig = rig();
    let machine = rig.launch().await;
    let agent = boot(&rig, &*machine).await;
    start_main(&agent, &["nginx"]).await;
    let echo = exec(&agent, &["echo", "hello"]).await;
    assert!(
        matches!(&echo[..], [ProcessEvent::Started { .. }, ProcessEvent::Output { data, offset: 0, .. },
            ProcessEvent::Exited { status: 0 }] if data == "hello\n"),
        "{echo:?}"
    );
    let failed = exec(&agent, &["sh", "-c", "exit 9"]).await;
    assert!(
        matches!(failed.last(), Some(ProcessEvent::Exited { status: 9 })),
        "{failed:?}"
    );
    let missing = exec(&agent, &["/nonexistent/tool"]).await;
    assert!(
        matches!(&missing[..], [ProcessEvent::Refused(refusal)] if refusal.status == 127),
        "{missing:?}"
    );
    agent.signal_main(15).await.unwrap();
    assert_eq!(main_output(&agent, 0).await, (String::new(), 143));
    assert!(matches!(
        agent.signal_main(15).await,
        Err(CallError::Refused { .. })
    ));
    machine.kill().await.unwrap();
    rig.assert_nothing_left().await;
}

#[tokio::test]
async fn a_paused_guest_is_silent_until_it_goes_on() {
    let rig = rig();
    let machine = rig.launch().await;
    let agent = boot(&rig, &*machine).await;
    machine.pause().await.unwrap();
    {
        let hello = agent.hello();
        tokio::pin!(hello);
        assert!(
            tokio::time::timeout(Duration::from_millis(100), &mut hello)
                .await
                .is_err()
        );
        machine.resume().await.unwrap();
        assert_eq!(hello.await.unwrap().vm_id, rig.plan.vm.to_string());
    }
    machine.quit().await.unwrap();
    rig.assert_nothing_left().await;
}

#[tokio::test]
async fn it_ends_in_every_way_a_guest_can() {
    for (way, expected) in [
        ("poweroff", ExitCause::GuestPowerOff),
        ("reboot", ExitCause::GuestReset),
        ("echo c > /proc/sysrq-trigger", ExitCause::GuestPanic),
    ] {
        let rig = rig();
        let machine = rig.launch().await;
        let agent = boot(&rig, &*machine).await;
        let session = agent.exec(process(&["sh", "-c", way])).await;
        assert_eq!(machine.wait_exit().await.cause, expected, "{way}");
        drop(session);
        rig.assert_nothing_left().await;
    }
}

#[tokio::test]
async fn it_shuts_down_when_its_agent_or_its_power_button_says_so() {
    for button in [false, true] {
        let rig = rig();
        let machine = rig.launch().await;
        let agent = boot(&rig, &*machine).await;
        start_main(&agent, &["nginx"]).await;
        if button {
            machine.power_button().await.unwrap();
        } else {
            assert!(agent.shutdown(Duration::from_secs(1)).await.unwrap());
            assert_eq!(main_output(&agent, 0).await, (String::new(), 143));
        }
        assert_eq!(machine.wait_exit().await.cause, ExitCause::GuestPowerOff);
        rig.assert_nothing_left().await;
    }
}
