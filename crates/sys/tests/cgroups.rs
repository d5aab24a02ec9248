//! Real control groups of this machine, in trees of the tests' own. Needs root.

use std::collections::BTreeSet;
use std::time::Duration;

use offshoot_sys::cgroup::{CPU_PERIOD_US, Controller, Group, GroupLimits, Tree};
use offshoot_sys::process::{DetachedCommand, Exit, PidFd, Signal, spawn_detached};

/// How long a killed process may take.
const PATIENCE: Duration = Duration::from_secs(20);
const MIB: u64 = 1 << 20;

/// A tree that no other test and no daemon has; `None`, and a word about it, where groups cannot be made.
fn tree(test: &str) -> Option<Tree> {
    let root = rustix::process::geteuid().is_root();
    let opened = root.then(|| Tree::open(&format!("offshoot-test-{test}-{}", std::process::id())));
    match opened {
        Some(Ok(tree)) => Some(tree),
        other => {
            let why = other.and_then(Result::err).map(|error| error.to_string());
            #[expect(clippy::print_stderr, reason = "a skipped test says so")]
            {
                eprintln!("SKIPPED: {}", why.unwrap_or_else(|| "needs root".into()));
            }
            None
        }
    }
}

/// Whether the tree can limit this; a word about it where it cannot.
fn limits(tree: &Tree, controller: Controller) -> bool {
    let can = !tree.missing().contains(&controller);
    if !can {
        #[expect(clippy::print_stderr, reason = "a skipped test says so")]
        {
            eprintln!("SKIPPED: no controller `{}`", controller.as_str());
        }
    }
    can
}

fn shell(group: &Group, script: &str) -> DetachedCommand {
    DetachedCommand {
        args: vec!["-c".into(), script.into()],
        env: vec![("PATH".into(), "/usr/bin:/bin".into())],
        cgroups: group.folders(),
        ..DetachedCommand::new("/bin/sh")
    }
}

/// Asks again and again until it is so.
async fn until(what: &str, mut reached: impl FnMut() -> bool) {
    for _ in 0..6000 {
        if reached() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("waited in vain for {what}");
}

/// Nothing of a tree is left.
async fn gone(tree: &Tree, group: &Group) {
    group.kill(PATIENCE).await.unwrap();
    group.remove().await.unwrap();
    assert!(!group.exists());
    assert_eq!(tree.names().unwrap(), BTreeSet::new());
    for (_, parent) in tree.parents() {
        assert!(!parent.join(tree.instance()).exists(), "{}", parent.display());
    }
}

#[tokio::test]
async fn a_process_is_in_its_group_from_its_first_instruction_on() {
    let Some(tree) = tree("enter") else { return };
    let group = tree.group("vm");
    assert!(!group.exists());
    let wanted = GroupLimits {
        cpu_quota_us: Some(150_000).filter(|_| limits(&tree, Controller::Cpu)),
        memory_bytes: Some(64 * MIB).filter(|_| limits(&tree, Controller::Memory)),
        pids: Some(17).filter(|_| limits(&tree, Controller::Pids)),
    };
    for _ in 0..2 {
        group.ensure(&wanted).unwrap();
        assert_eq!(group.limits().unwrap(), wanted);
    }
    assert_eq!(tree.names().unwrap(), ["vm".to_owned()].into());
    assert!(group.members().unwrap().is_empty());

    // What it forks is in it, too, and says in which groups it is.
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let mut command = shell(&group, "cat /proc/self/cgroup; sleep 1000 & echo ready; wait");
    command.log = Some(log.clone());
    let (identity, process) = spawn_detached(command).unwrap();
    let said = || std::fs::read_to_string(&log).unwrap_or_default();
    until("the child to speak", || said().ends_with("ready\n")).await;
    let below = format!("/{}/vm", tree.instance());
    let groups = said().lines().filter(|line| line.ends_with(&below)).count();
    assert_eq!(groups, group.folders().len(), "{}", said());
    until("both processes", || group.members().unwrap().len() == 2).await;
    assert!(group.members().unwrap().contains(&identity.pid));
    let usage = group.usage().unwrap();
    assert_eq!(usage.pids.unwrap_or(2), 2);
    assert!(usage.memory_bytes.is_none_or(|bytes| bytes > 0), "{usage:?}");
    assert!(usage.cpu_us.is_some_and(|time| time > 0), "{usage:?}");
    assert_eq!(usage.oom_kills.unwrap_or(0), 0);

    // A group with processes does not go, and says why.
    let error = group.remove().await.unwrap_err();
    assert!(
        error.to_string().starts_with("cannot remove control group"),
        "{error}"
    );
    assert_eq!(group.kill(PATIENCE).await.unwrap(), 2);
    assert_eq!(process.wait_exit().await, Some(Exit::Signal(9)));
    gone(&tree, &group).await;
    group.remove().await.unwrap();
    let refused = spawn_detached(shell(&group, "true")).unwrap_err();
    assert!(
        refused.to_string().starts_with("cannot enter control group"),
        "{refused}"
    );
}

#[tokio::test]
async fn an_instance_stays_as_long_as_one_of_its_groups() {
    let Some(tree) = tree("two") else { return };
    let (one, two) = (tree.group("one"), tree.group("two"));
    for group in [&one, &two] {
        group.ensure(&GroupLimits::default()).unwrap();
    }
    one.remove().await.unwrap();
    assert!(!one.exists() && two.exists());
    assert_eq!(tree.names().unwrap(), ["two".to_owned()].into());
    gone(&tree, &two).await;
}

#[tokio::test]
async fn whoever_forks_without_end_is_kept_to_its_number_and_killed() {
    let Some(tree) = tree("forks") else { return };
    if !limits(&tree, Controller::Pids) {
        return;
    }
    let group = tree.group("bomb");
    let most = 24;
    let wanted = GroupLimits {
        pids: Some(most),
        ..GroupLimits::default()
    };
    group.ensure(&wanted).unwrap();
    // A shell that cannot fork gives up.
    let (_, process) = spawn_detached(shell(&group, "exec perl -e 'fork while 1'")).unwrap();
    until("the number to be reached", || {
        group.usage().unwrap().pids == Some(most)
    })
    .await;
    for _ in 0..200 {
        assert!(group.usage().unwrap().pids.unwrap() <= most);
    }
    assert!(group.kill(PATIENCE).await.unwrap() > 1);
    assert_eq!(process.wait_exit().await, Some(Exit::Signal(9)));
    assert!(group.members().unwrap().is_empty());
    gone(&tree, &group).await;
}

#[tokio::test]
async fn processor_time_is_given_out_by_the_quota() {
    let Some(tree) = tree("quota") else { return };
    if !limits(&tree, Controller::Cpu) {
        return;
    }
    let group = tree.group("hog");
    let quota = CPU_PERIOD_US / 5;
    let wanted = GroupLimits {
        cpu_quota_us: Some(quota),
        ..GroupLimits::default()
    };
    group.ensure(&wanted).unwrap();
    let script = "for n in 1 2 3; do while :; do :; done & done; wait";
    let (_, process) = spawn_detached(shell(&group, script)).unwrap();
    until("twenty periods with a wait", || {
        group
            .usage()
            .unwrap()
            .cpu_periods_throttled
            .is_some_and(|n| n >= 20)
    })
    .await;
    // The time first: the count of periods may only be later, so the bound only be wider.
    let used = group.usage().unwrap().cpu_us.unwrap();
    let periods = group.usage().unwrap().cpu_periods.unwrap();
    // The kernel hands the quota to each processor in slices of 5 ms, and takes back what was too much in the next period.
    let most = (periods + 2) * quota * 5 / 4;
    assert!(used <= most, "{used} us in {periods} periods of {quota} us");
    assert!(group.kill(PATIENCE).await.unwrap() >= 3);
    process.wait_exit().await;
    gone(&tree, &group).await;
}

#[tokio::test]
async fn whoever_needs_more_memory_than_the_limit_is_killed_and_counted() {
    let Some(tree) = tree("memory") else { return };
    if !limits(&tree, Controller::Memory) {
        return;
    }
    let group = tree.group("glutton");
    let wanted = GroupLimits {
        memory_bytes: Some(32 * MIB),
        ..GroupLimits::default()
    };
    group.ensure(&wanted).unwrap();
    // It keeps the last line, and there is only one.
    let mut command = DetachedCommand {
        args: vec!["/dev/zero".into()],
        cgroups: group.folders(),
        ..DetachedCommand::new("/usr/bin/tail")
    };
    command.limits.clear();
    let (_, process) = spawn_detached(command).unwrap();
    assert_eq!(process.wait_exit().await, Some(Exit::Signal(9)));
    // v2 kills the group as a whole and counts the first one twice.
    assert!(group.usage().unwrap().oom_kills.is_some_and(|kills| kills >= 1));
    assert!(group.usage().unwrap().memory_bytes.unwrap() <= 32 * MIB);
    gone(&tree, &group).await;
}

#[tokio::test]
async fn a_stranger_is_not_killed() {
    let Some(tree) = tree("stranger") else { return };
    let (ours, other) = (tree.group("ours"), tree.group("other"));
    for group in [&ours, &other] {
        group.ensure(&GroupLimits::default()).unwrap();
    }
    let start = |group: &Group| spawn_detached(shell(group, "exec sleep 1000")).unwrap();
    let ((_, mine), (stranger, theirs)) = (start(&ours), start(&other));
    assert_eq!(ours.kill(PATIENCE).await.unwrap(), 1);
    assert!(!mine.is_alive() && theirs.is_alive());
    assert!(PidFd::open(&stranger).unwrap().is_some());
    theirs.send_signal(Signal::KILL).unwrap();
    theirs.wait_exit().await;
    ours.remove().await.unwrap();
    gone(&tree, &other).await;
}
