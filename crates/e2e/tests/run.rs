//! `run` and `exec`: what goes in, what comes out, and with which status.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};

use offshoot_e2e::{Daemon, IMAGE, text, wait_until};

#[test]
fn a_command_runs_in_a_vm_and_its_status_is_ours() {
    let daemon = Daemon::start();
    let release = daemon.ok(["run", "--rm", IMAGE, "cat", "/etc/os-release"]);
    assert!(release.contains("VERSION_CODENAME=bookworm"), "{release}");
    daemon.cli(["run", "--rm", IMAGE, "sh", "-c", "exit 7"]).fails(7);

    let missing = daemon.cli(["run", "--rm", IMAGE, "no-such-program"]).fails(127);
    assert!(missing.contains("no-such-program"), "{missing}");
    daemon.cli(["run", "--rm", IMAGE, "/etc/passwd"]).fails(126);
    daemon.finish();
}

#[test]
fn standard_input_is_piped_through_and_much_output_arrives_whole() {
    let daemon = Daemon::start();
    let echoed = daemon
        .cli(["run", "--rm", "-i", IMAGE, "tr", "a-z", "A-Z"])
        .stdin("hello\nthere\n")
        .ok();
    assert_eq!(echoed, "HELLO\nTHERE");

    let script = "head -c 10000000 /dev/zero | tr '\\0' x; echo problem >&2; exit 3";
    let output = daemon.cli(["run", "--rm", IMAGE, "sh", "-c", script]).run();
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    assert_eq!(output.stdout.len(), 10_000_000);
    assert!(output.stdout.iter().all(|b| *b == b'x'));
    assert_eq!(text(&output.stderr), "problem\n");

    // A megabyte of every byte, there and back.
    let bytes: Vec<u8> = (0..1_000_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let output = daemon
        .cli(["run", "--rm", "-i", IMAGE, "cat"])
        .stdin(bytes.clone())
        .run();
    assert!(
        output.stdout == bytes,
        "{} of {} bytes came back",
        output.stdout.len(),
        bytes.len()
    );
    daemon.finish();
}

#[test]
fn ctrl_c_reaches_the_guest() {
    let daemon = Daemon::start();
    let script = "trap 'echo caught; exit 42' INT; echo ready; while :; do sleep 0.1; done";
    let mut child = daemon.cli(["run", "--rm", IMAGE, "sh", "-c", script]).spawn();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let mut rest = String::new();
    output.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "caught\n");
    assert_eq!(child.wait().unwrap().code(), Some(42));
    daemon.finish();
}

#[test]
fn the_request_goes_over_the_image() {
    let daemon = Daemon::start();
    let script = "id -u; id -g; pwd; echo $COLOUR; hostname; cat /proc/1/comm";
    let seen = daemon.ok([
        "run",
        "--rm",
        "--name",
        "picky",
        "-e",
        "COLOUR=green",
        "-w",
        "/new/dir",
        "-u",
        "www-data",
        "--cpus",
        "2",
        "--memory",
        "256m",
        "--entrypoint",
        "sh",
        IMAGE,
        "-c",
        script,
    ]);
    let mut lines = seen.lines();
    assert_eq!(
        lines.by_ref().take(5).collect::<Vec<_>>(),
        ["33", "33", "/new/dir", "green", "picky"]
    );

    let seen = daemon.ok([
        "run",
        "--rm",
        "--cpus",
        "2",
        "--memory",
        "256m",
        IMAGE,
        "sh",
        "-c",
        "nproc; grep MemTotal /proc/meminfo",
    ]);
    let (cpus, memory) = seen.split_once('\n').unwrap();
    assert_eq!(cpus, "2");
    let kib: u64 = memory.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!((180_000..=262_144).contains(&kib), "{memory}");
    daemon.finish();
}

#[test]
fn exec_enters_a_running_vm() {
    let daemon = Daemon::start();
    let id = daemon.ok([
        "run", "-d", "--name", "box", "-e", "FROM=run", IMAGE, "sleep", "1000",
    ]);
    assert_eq!(id.len(), 12, "{id}");
    assert_eq!(
        daemon.ok(["exec", "-e", "MORE=exec", "box", "sh", "-c", "echo $FROM $MORE"]),
        "run exec"
    );
    daemon.cli(["exec", "box", "sh", "-c", "exit 9"]).fails(9);
    daemon.cli(["exec", "box", "sh", "-c", "kill -9 $$"]).fails(137);
    daemon.cli(["exec", "box", "no-such-program"]).fails(127);
    assert_eq!(
        daemon.cli(["exec", "-i", "box", "sort"]).stdin("b\na\n").ok(),
        "a\nb"
    );
    assert_eq!(
        daemon.ok([
            "exec",
            "-u",
            "nobody",
            "-w",
            "/tmp",
            "box",
            "sh",
            "-c",
            "id -un; pwd"
        ]),
        "nobody\n/tmp"
    );
    // Many at once, one of them slow.
    let children: Vec<_> = (0..8)
        .map(|n| {
            daemon
                .cli(["exec", "box", "sh", "-c", &format!("sleep 0.{n}; echo {n}")])
                .spawn()
        })
        .collect();
    for (n, child) in children.into_iter().enumerate() {
        assert_eq!(text(&child.wait_with_output().unwrap().stdout), format!("{n}\n"));
    }
    daemon.finish();
}

#[test]
fn a_terminal_is_a_terminal() {
    let daemon = Daemon::start();
    daemon.ok(["run", "-d", "--name", "term", IMAGE, "sleep", "1000"]);
    // script(1) gives the CLI a terminal of the size that stty sets.
    let line = format!(
        "stty rows 33 cols 77; {} exec -it term sh -c 'tty; stty size; exit 5'; echo status $?",
        offshoot_e2e::bin_dir().join("offshoot").display()
    );
    let output = std::process::Command::new("script")
        .args(["-qec", &line, "/dev/null"])
        .env("OFFSHOOT_SOCKET", daemon.socket())
        .stdin(std::process::Stdio::piped())
        .output()
        .expect("script(1) is part of Debian");
    let seen = text(&output.stdout).replace('\r', "");
    assert!(seen.contains("/dev/pts/"), "{seen}");
    assert!(seen.contains("33 77"), "{seen}");
    assert!(seen.contains("status 5"), "{seen}");
    daemon.finish();
}

#[test]
fn files_go_in_and_out() {
    let daemon = Daemon::start();
    daemon.ok(["run", "-d", "--name", "files", IMAGE, "sleep", "1000"]);
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    std::fs::create_dir_all(tree.join("sub")).unwrap();
    std::fs::write(tree.join("sub/hello"), "hello").unwrap();
    let big: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    std::fs::write(tree.join("big"), &big).unwrap();
    std::os::unix::fs::symlink("sub/hello", tree.join("link")).unwrap();

    daemon
        .cli(["cp"].into_iter().chain([tree.to_str().unwrap(), "files:/srv"]))
        .ok();
    assert_eq!(daemon.ok(["exec", "files", "cat", "/srv/tree/link"]), "hello");
    assert_eq!(
        daemon.ok(["exec", "files", "readlink", "/srv/tree/link"]),
        "sub/hello"
    );
    daemon.ok(["exec", "files", "sh", "-c", "echo changed > /srv/tree/sub/hello"]);

    let back = dir.path().join("back");
    daemon.ok(["cp", "files:/srv/tree", back.to_str().unwrap()]);
    assert_eq!(
        std::fs::read_to_string(back.join("sub/hello")).unwrap(),
        "changed\n"
    );
    assert!(std::fs::read(back.join("big")).unwrap() == big);
    // One file under another name.
    daemon.ok(["cp", back.join("big").to_str().unwrap(), "files:/root/renamed"]);
    assert_eq!(
        daemon.ok(["exec", "files", "stat", "-c", "%s", "/root/renamed"]),
        "3000000"
    );
    let missing = daemon.cli(["cp", "files:/no/such", "/tmp/"]).fails(1);
    assert!(missing.contains("/no/such"), "{missing}");
    daemon.finish();
}

#[test]
fn logs_keep_what_the_main_process_said() {
    let daemon = Daemon::start();
    let script = "echo one; echo two >&2; sleep 1; echo three; sleep 1000";
    daemon.ok(["run", "-d", "--name", "talker", IMAGE, "sh", "-c", script]);
    let mut follower = daemon.cli(["logs", "-f", "talker"]).spawn();
    let mut lines = BufReader::new(follower.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "one");
    assert_eq!(lines.next().unwrap().unwrap(), "three");
    daemon.ok(["stop", "-t", "1", "talker"]);
    assert!(lines.next().is_none(), "logs -f goes on after the end");
    assert!(follower.wait().unwrap().success());
    let output = daemon.cli(["logs", "talker"]).run();
    assert_eq!(
        (text(&output.stdout), text(&output.stderr)),
        ("one\nthree\n".into(), "two\n".into())
    );
    assert_eq!(daemon.ok(["logs", "-n", "1", "talker"]), "three");
    let stamped = daemon.ok(["logs", "-t", "-n", "1", "talker"]);
    assert!(
        stamped.ends_with("Z three") && stamped.starts_with("20"),
        "{stamped}"
    );
    daemon.finish();
}

#[test]
fn attach_gives_a_running_main_process_its_input() {
    let daemon = Daemon::start();
    daemon.ok([
        "run",
        "-d",
        "-i",
        "--name",
        "reader",
        IMAGE,
        "sh",
        "-c",
        "read line; echo got $line; exit 4",
    ]);
    let output = daemon.cli(["attach", "reader"]).stdin("a line\n").run();
    assert_eq!(text(&output.stdout), "got a line\n");
    assert_eq!(output.status.code(), Some(4));
    assert_eq!(daemon.ok(["wait", "reader"]), "4");
    daemon.finish();
}

#[test]
fn the_image_s_own_init_can_be_pid_1() {
    let daemon = Daemon::start();
    // A stand-in for an init: any program at /sbin/init. It is made by a first VM's command in a second image's place.
    let dir = tempfile::tempdir().unwrap();
    let init = "#!/bin/sh\ntrap 'exit 0' TERM\necho $$ > /run/init.pid\nwhile :; do sleep 1; done\n";
    let rootfs = dir.path().join("rootfs.tar");
    daemon.ok(["run", "-d", "--name", "maker", IMAGE, "sleep", "1000"]);
    std::fs::write(dir.path().join("init"), init).unwrap();
    daemon.ok([
        "cp",
        dir.path().join("init").to_str().unwrap(),
        "maker:/sbin/init",
    ]);
    let tar = daemon
        .cli([
            "exec",
            "maker",
            "sh",
            "-c",
            "chmod 755 /sbin/init; tar -C / --one-file-system -cf - bin sbin lib lib64 usr etc 2>/dev/null",
        ])
        .run();
    assert!(
        tar.stdout.len() > 10_000_000,
        "{} bytes: {}",
        tar.stdout.len(),
        text(&tar.stderr)
    );
    std::fs::File::create(&rootfs)
        .unwrap()
        .write_all(&tar.stdout)
        .unwrap();
    daemon.ok(["image", "import", "--name", "with-init", rootfs.to_str().unwrap()]);
    daemon.ok(["run", "-d", "--name", "init", "--init", "with-init"]);
    wait_until("the init to run", || {
        daemon.cli(["exec", "init", "cat", "/run/init.pid"]).run().stdout == b"1\n"
    });
    daemon.ok(["stop", "-t", "2", "init"]);
    assert_eq!(daemon.state("init"), "stopped");
    daemon.finish();
}
