//! The life of VMs on a host that exists only in memory.

mod doll;

use std::sync::Arc;
use std::time::Duration;

use doll::{Host, engine, lock, until, vm};
use offshoot_engine::engine::Engine;
use offshoot_engine::error::VmError;
use offshoot_engine::operation;
use offshoot_engine::owner::Request;
use offshoot_model::{
    EventAction, ExitReason, Explain as _, KernelObject, ObjectKind, OperationId, RestartPolicy, VmState,
};
use offshoot_store::db::{Db, EventFilter};

const STOP: Request = Request::Stop(Duration::from_secs(5));

async fn actions(engine: &Engine) -> Vec<EventAction> {
    let mut follower = engine.events().follow(EventFilter::default());
    let events = follower.ready().await.unwrap();
    events.into_iter().map(|event| event.action).collect()
}

fn state(engine: &Engine, name: &str) -> VmState {
    engine.find(name).unwrap().view.borrow().life.state
}

#[tokio::test]
async fn hooks_run_in_order_to_start_and_backwards_to_stop() {
    let (folder, host) = (tempfile::tempdir().unwrap(), Arc::new(Host::default()));
    let engine = engine(folder.path(), &host).await;
    let web = engine.create(vm("web", |_| ())).await.unwrap();
    assert_eq!(host.take_notes(), [""; 0], "creating makes nothing");
    web.ask(Request::Start).await.unwrap();
    assert_eq!(
        host.take_notes(),
        [
            "root.prepare",
            "vmm.prepare",
            "main.prepare",
            "root.after_boot",
            "vmm.after_boot",
            "main.after_boot"
        ]
    );
    let rows = engine.db().objects().unwrap();
    assert_eq!(rows.len(), 3, "what a running VM has is recorded");
    web.ask(Request::Pause).await.unwrap();
    web.ask(STOP).await.unwrap();
    assert_eq!(
        host.take_notes(),
        ["pause", "resume", "main.stop", "vmm.stop", "root.stop"],
        "a guest that stands still is let go on to stop"
    );
    assert_eq!(engine.db().objects().unwrap(), []);
    web.ask(Request::Remove(false)).await.unwrap();
    assert_eq!(
        host.take_notes(),
        ["main.clean_up", "vmm.clean_up", "root.clean_up"]
    );
    use EventAction as A;
    assert_eq!(
        actions(&engine).await,
        [A::Create, A::Start, A::Pause, A::Stop, A::Exit, A::Remove]
    );
    assert!(matches!(
        web.ask(Request::Start).await,
        Err(VmError::Removed { .. })
    ));
}

#[tokio::test]
async fn a_start_that_fails_is_undone_backwards_and_explained() {
    let (folder, host) = (tempfile::tempdir().unwrap(), Arc::new(Host::default()));
    let engine = engine(folder.path(), &host).await;
    let web = engine.create(vm("web", |_| ())).await.unwrap();
    *lock(&host.fails) = Some("vmm.prepare");
    let error = web.ask(Request::Start).await.unwrap_err();
    assert_eq!(error.to_string(), "cannot start VM `web`: vmm.prepare failed");
    assert_eq!(
        host.take_notes(),
        ["root.prepare", "vmm.prepare", "vmm.stop", "root.stop"]
    );
    let life = web.view.borrow().life.clone();
    assert_eq!((life.state, life.failure.len()), (VmState::Failed, 2));
    assert_eq!(engine.db().objects().unwrap(), []);

    // The check of the same capability explains it, and the next start is refused before anything is made.
    *lock(&host.fails) = Some("root.prepare");
    *lock(&host.broken) = Some("there is no root");
    let error = web.ask(Request::Start).await.unwrap_err();
    let hints = error.hints().join("\n");
    assert!(
        hints.contains("`offshoot doctor` finds: there is no root; mend the root"),
        "{hints}"
    );
    host.take_notes();
    let error = web.ask(Request::Start).await.unwrap_err();
    assert_eq!(error.to_string(), "cannot start VM `web`: there is no root");
    assert_eq!(host.take_notes(), [""; 0]);
    *lock(&host.broken) = None;
    *lock(&host.fails) = None;
    web.ask(Request::Start).await.unwrap();
}

#[tokio::test]
async fn a_start_that_is_cancelled_leaves_the_vm_as_it_was() {
    let (folder, host) = (tempfile::tempdir().unwrap(), Arc::new(Host::default()));
    let engine = engine(folder.path(), &host).await;
    let web = engine.create(vm("web", |_| ())).await.unwrap();
    for (before, ending) in [(VmState::Created, Request::Cancel), (VmState::Created, STOP)] {
        *lock(&host.hangs) = Some("vmm.prepare");
        let start = tokio::spawn({
            let web = web.clone();
            async move { web.ask(Request::Start).await }
        });
        until("the start", || state(&engine, "web") == VmState::Starting).await;
        web.ask(ending).await.unwrap();
        let error = start.await.unwrap().unwrap_err();
        assert!(matches!(error, VmError::Cancelled { .. }), "{error}");
        assert_eq!(state(&engine, "web"), before);
        assert_eq!(engine.db().objects().unwrap(), []);
        let notes = host.take_notes();
        assert_eq!(notes[notes.len() - 2..], ["vmm.stop", "root.stop"]);
    }
    *lock(&host.hangs) = None;
    web.ask(Request::Start).await.unwrap();
    web.ask(Request::Cancel).await.unwrap();
    assert_eq!(
        state(&engine, "web"),
        VmState::Running,
        "there is nothing to cancel any more"
    );
}

#[tokio::test]
async fn requests_to_one_vm_are_ordered_and_different_vms_do_not_wait() {
    let (folder, host) = (tempfile::tempdir().unwrap(), Arc::new(Host::default()));
    let engine = engine(folder.path(), &host).await;
    let slow = engine.create(vm("slow", |_| ())).await.unwrap();
    let quick = engine.create(vm("quick", |_| ())).await.unwrap();
    *lock(&host.hangs) = Some("vmm.prepare");
    let ask = |request: Request| {
        let slow = slow.clone();
        tokio::spawn(async move { slow.ask(request).await.map(|vm| vm.life.state) })
    };
    let start = ask(Request::Start);
    until("the start", || state(&engine, "slow") == VmState::Starting).await;
    *lock(&host.hangs) = None;
    // The other VM is served while this one hangs.
    quick.ask(Request::Start).await.unwrap();
    // Three requests wait their turn: each sees what the one before it left.
    let pause = ask(Request::Pause);
    tokio::task::yield_now().await;
    let kill = ask(Request::Kill);
    assert!(matches!(start.await.unwrap(), Err(VmError::Cancelled { .. })));
    let refused = pause.await.unwrap().unwrap_err();
    assert!(
        matches!(&refused, VmError::WrongState { state: "created", .. }),
        "{refused}"
    );
    assert_eq!(
        kill.await.unwrap().unwrap(),
        VmState::Created,
        "it ended the start"
    );
    assert_eq!(state(&engine, "quick"), VmState::Running);
}

#[tokio::test]
async fn what_a_client_began_ends_without_it_and_carries_its_operation() {
    let (folder, host) = (tempfile::tempdir().unwrap(), Arc::new(Host::default()));
    let engine = engine(folder.path(), &host).await;
    let web = engine.create(vm("web", |_| ())).await.unwrap();
    let id = OperationId::from_bytes(&[7; 4]);
    let asked = operation::within(id.clone(), async {
        let ask = web.ask(Request::Start);
        // Long enough to be sent, then dropped.
        tokio::time::timeout(Duration::from_millis(1), ask).await.is_ok()
    })
    .await;
    until("the start", || state(&engine, "web") == VmState::Running).await;
    let mut follower = engine.events().follow(EventFilter::default());
    let events = follower.ready().await.unwrap();
    let start = events.iter().find(|event| event.action == EventAction::Start);
    assert_eq!(start.unwrap().operation, Some(id), "asked: {asked}");
}

#[tokio::test]
async fn what_a_daemon_left_is_found_finished_or_started_again() {
    let (folder, host) = (tempfile::tempdir().unwrap(), Arc::new(Host::default()));
    let first = engine(folder.path(), &host).await;
    let policy = |policy| move |config: &mut offshoot_model::VmConfig| config.restart = policy;
    for (name, restart) in [
        ("runs", RestartPolicy::No),
        ("lost", RestartPolicy::No),
        ("lost-again", RestartPolicy::OnFailure),
        ("held", RestartPolicy::UnlessStopped),
        ("always", RestartPolicy::Always),
        ("doomed", RestartPolicy::No),
    ] {
        let handle = first.create(vm(name, policy(restart))).await.unwrap();
        handle.ask(Request::Start).await.unwrap();
    }
    for name in ["held", "always"] {
        first.find(name).unwrap().ask(STOP).await.unwrap();
    }
    // The VMMs of two die, one is about to be removed, and the daemon is gone.
    for name in ["lost", "lost-again"] {
        let id = first.find(name).unwrap().view.borrow().id.clone();
        lock(&host.running).remove(&id);
    }
    let doomed = first.find("doomed").unwrap().view.borrow().clone();
    let mut life = doomed.life.clone();
    life.removing = true;
    let db = Db::open(folder.path()).unwrap();
    db.update_vm_run(&doomed.id, &life.to_update(), &Default::default())
        .unwrap();
    *lock(&host.litter) = vec![KernelObject {
        kind: ObjectKind::Folder,
        name: "/doll/of-nobody".into(),
    }];

    let second = engine(folder.path(), &host).await;
    for (name, expected) in [
        ("runs", VmState::Running),
        ("lost", VmState::Stopped),
        ("lost-again", VmState::Running),
        ("held", VmState::Stopped),
        ("always", VmState::Running),
    ] {
        until(name, || {
            state(&second, name) == expected && {
                // A VM that was started again was seen to stop or to start.
                let view = second.find(name).unwrap().view.borrow().clone();
                view.life.state != VmState::Running || lock(&host.running).contains(&view.id)
            }
        })
        .await;
    }
    until("the removal", || second.find("doomed").is_err()).await;
    assert!(!lock(&host.running).contains(&doomed.id));
    let lost = second.find("lost").unwrap().view.borrow().life.exit.unwrap();
    assert_eq!((lost.code, lost.reason), (255, ExitReason::Lost));
    assert_eq!(*lock(&host.litter), []);
    let told = actions(&second).await;
    assert!(
        told.contains(&EventAction::Adopt) && told.contains(&EventAction::Repair),
        "{told:?}"
    );
}

#[tokio::test]
async fn a_life_that_cannot_be_written_is_written_later() {
    let (folder, host) = (tempfile::tempdir().unwrap(), Arc::new(Host::default()));
    let engine = engine(folder.path(), &host).await;
    let web = engine.create(vm("web", |_| ())).await.unwrap();
    web.ask(Request::Start).await.unwrap();
    // As on a full disk: nothing can be added to the database.
    let outside = rusqlite::Connection::open(folder.path().join("offshoot.db")).unwrap();
    outside
        .execute_batch(
            "CREATE TRIGGER full BEFORE INSERT ON events BEGIN SELECT RAISE(ABORT, 'disk full'); END;",
        )
        .unwrap();
    web.ask(STOP).await.unwrap_err();
    assert!(lock(&host.running).is_empty(), "it was ended all the same");
    web.ask(Request::Start).await.unwrap_err();
    outside.execute_batch("DROP TRIGGER full").unwrap();
    web.ask(Request::Tend).await.unwrap();
    assert_eq!(state(&engine, "web"), VmState::Stopped);
    let life = web.view.borrow().life.clone();
    assert_eq!(
        life.exit.unwrap().reason,
        ExitReason::Stopped,
        "and how it ended is known"
    );
    assert!(life.held);
    web.ask(Request::Start).await.unwrap();
}

#[tokio::test]
async fn a_vm_that_is_to_go_when_it_stops_goes_however_it_was_stopped() {
    let (folder, host) = (tempfile::tempdir().unwrap(), Arc::new(Host::default()));
    let engine = engine(folder.path(), &host).await;
    for (name, ending) in [("one", STOP), ("two", Request::Kill)] {
        let handle = engine
            .create(vm(name, |config| config.auto_remove = true))
            .await
            .unwrap();
        handle.ask(Request::Start).await.unwrap();
        // A restart is no end.
        handle
            .ask(Request::Restart(Duration::from_secs(5)))
            .await
            .unwrap();
        assert_eq!(state(&engine, name), VmState::Running);
        handle.ask(ending).await.unwrap();
        assert!(engine.find(name).is_err(), "{name}");
    }
    assert!(lock(&host.running).is_empty());
}
