//! `run`, `exec` and their like, against a daemon with chosen answers.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::fake::{Fake, answer, exited, hear, image, lines, not_found, say, session, signal, text, vm};
use offshoot_api::channel;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use serde_json::json;

const ID: &str = "abababababab";

fn details(state: &str, tty: bool) -> serde_json::Value {
    let mut details = vm(state);
    let more = json!({"config": {"image": "img", "tty": tty, "stdin": true}, "image_digest": "", "base": "", "kernel": "",
        "process": null, "vmm": {"chosen": "", "reasons": []}, "root": {"chosen": "", "reasons": []}, "pid": null,
        "failure": [], "directory": "", "disk_bytes": 0, "timings": []});
    details
        .as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    details
}

#[test]
fn run_attaches_before_it_starts_and_ends_with_the_status() {
    let polls = Arc::new(AtomicUsize::new(0));
    let fake = Fake::start(move |line, request| match line {
        "GET /v1/images?reference=img" => answer(200, &json!([image("img:latest")])),
        "POST /v1/vms" => answer(201, &vm("created")),
        "GET /v1/vms/abababababab/attach?logs=false&stdin=false" => {
            session(request, |mut socket| async move {
                say(&mut socket, channel::STDOUT, b"out\n").await;
                say(&mut socket, channel::STDERR, b"err\n").await;
                for _ in 0..160 {
                    say(&mut socket, channel::STDOUT, &[b'x'; 65536]).await;
                }
                exited(&mut socket, 7).await;
            })
        }
        "POST /v1/vms/abababababab/start" => answer(200, &vm("running")),
        // The VM is still there for a moment.
        "GET /v1/vms/abababababab" if polls.fetch_add(1, Ordering::Relaxed) < 2 => {
            answer(200, &details("stopping", false))
        }
        _ => not_found("no such VM"),
    });
    let output = fake.run(&["run", "--rm", "img", "sh", "-c", "exit 7"]);
    assert_eq!(output.status.code(), Some(7), "{}", text(&output.stderr));
    assert_eq!(output.stdout.len(), 4 + 160 * 65536);
    assert!(output.stdout.starts_with(b"out\nxxx"));
    assert_eq!(text(&output.stderr), "err\n");
    assert_eq!(
        fake.requests(),
        [
            "GET /v1/images?reference=img",
            "POST /v1/vms",
            "GET /v1/vms/abababababab/attach?logs=false&stdin=false",
            "POST /v1/vms/abababababab/start",
            "GET /v1/vms/abababababab",
            "GET /v1/vms/abababababab",
            "GET /v1/vms/abababababab",
        ]
    );
}

#[test]
fn input_is_piped_through_while_output_comes() {
    let fake = Fake::start(|line, request| match line {
        "GET /v1/images?reference=img" => answer(200, &json!([image("img:latest")])),
        "POST /v1/vms" => answer(201, &vm("created")),
        "POST /v1/vms/abababababab/start" => answer(200, &vm("running")),
        _ => session(request, |mut socket| async move {
            // `cat`: what comes in goes out, until the end.
            while let Some((channel, data)) = hear(&mut socket).await {
                match channel {
                    channel::STDIN => say(&mut socket, channel::STDOUT, &data).await,
                    channel::CLOSE => {
                        assert_eq!(data, [channel::STDIN]);
                        return exited(&mut socket, 0).await;
                    }
                    other => panic!("channel {other}"),
                }
            }
            panic!("the client left");
        }),
    });
    let input: Vec<u8> = (0..10_000_000u32)
        .map(|i| i.to_le_bytes()[i as usize % 3])
        .collect();
    let output = fake.run_with_input(&["run", "-i", "img", "cat"], &input);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""));
    assert!(output.stdout == input);
    // Without -i nothing is passed on, whatever there is.
    let fake = Fake::start(|line, request| match line {
        "GET /v1/images?reference=img" => answer(200, &json!([image("img:latest")])),
        "POST /v1/vms" => answer(201, &vm("created")),
        "POST /v1/vms/abababababab/start" => answer(200, &vm("running")),
        _ => session(request, |mut socket| async move {
            let heard = tokio::time::timeout(std::time::Duration::from_millis(200), hear(&mut socket)).await;
            exited(&mut socket, i32::from(heard.is_ok())).await;
        }),
    });
    assert_eq!(
        fake.run_with_input(&["run", "img", "cat"], b"input")
            .status
            .code(),
        Some(0)
    );
}

#[test]
fn signals_go_to_the_process() {
    let fake = Fake::start(|line, request| match line {
        "GET /v1/images?reference=img" => answer(200, &json!([image("img:latest")])),
        "POST /v1/vms" => answer(201, &vm("created")),
        "POST /v1/vms/abababababab/start" => answer(200, &vm("running")),
        _ => session(request, |mut socket| async move {
            say(&mut socket, channel::STDOUT, b"ready\n").await;
            let mut numbers = Vec::new();
            while numbers.len() < 2 {
                let (channel, data) = hear(&mut socket).await.unwrap();
                assert_eq!(channel, channel::SIGNAL);
                numbers.push(String::from_utf8(data).unwrap());
                say(&mut socket, channel::STDOUT, b"got one\n").await;
            }
            assert_eq!(numbers, ["10", "2"]);
            exited(&mut socket, 130).await;
        }),
    });
    let mut child = fake
        .offshoot(&["run", "img"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut read = |expected: &str| {
        let mut buffer = vec![0; expected.len()];
        stdout.read_exact(&mut buffer).unwrap();
        assert_eq!(text(&buffer), expected);
    };
    read("ready\n");
    signal(&child, "USR1");
    read("got one\n");
    signal(&child, "INT");
    read("got one\n");
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn a_signal_does_not_wait_behind_input_that_nobody_reads() {
    let fake = Fake::start(|line, request| match line {
        "GET /v1/images?reference=img" => answer(200, &json!([image("img:latest")])),
        "POST /v1/vms" => answer(201, &vm("created")),
        "POST /v1/vms/abababababab/start" => answer(200, &vm("running")),
        line if line.contains("/attach") => session(request, |mut socket| async move {
            say(&mut socket, channel::STDOUT, b"ready\n").await;
            std::future::pending::<()>().await;
        }),
        _ => answer(200, &vm("running")),
    });
    let mut command = fake.offshoot(&["run", "-i", "img"]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut ready = [0; 6];
    child.stdout.take().unwrap().read_exact(&mut ready).unwrap();
    // Everything on the way is full when the pipe takes no more. What fits into a ready pipe is never blocked.
    let full = rustix::event::Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    };
    while poll(&mut [PollFd::new(&stdin, PollFlags::OUT)], Some(&full)).unwrap() == 1 {
        stdin.write_all(&[0; 4096]).unwrap();
    }
    signal(&child, "TERM");
    fake.wait_for("POST /v1/vms/abababababab/kill?signal=15");
    // Three in a row mean: let me out.
    signal(&child, "INT");
    fake.wait_for("POST /v1/vms/abababababab/kill?signal=2");
    signal(&child, "INT");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("left the session"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn an_interrupt_while_starting_leaves_nothing() {
    for background in [true, false] {
        let fake = Fake::start(|line, request| match line {
            "GET /v1/images?reference=img" => answer(200, &json!([image("img:latest")])),
            "POST /v1/vms" => answer(201, &vm("created")),
            "POST /v1/vms/abababababab/start" => Box::pin(std::future::pending()),
            "DELETE /v1/vms/abababababab?force=true" => crate::fake::now(crate::fake::response(204, "")),
            _ => session(request, |mut socket| async move { drop(hear(&mut socket).await) }),
        });
        let words = if background {
            &["run", "-d", "img"][..]
        } else {
            &["run", "img"]
        };
        let mut child = fake.offshoot(words).stdin(Stdio::null()).spawn().unwrap();
        fake.wait_for("POST /v1/vms/abababababab/start");
        signal(&child, "INT");
        assert_eq!(child.wait().unwrap().code(), Some(130));
        assert_eq!(
            fake.requests().last().unwrap(),
            "DELETE /v1/vms/abababababab?force=true"
        );
    }
}

#[test]
fn a_start_that_fails_removes_the_vm_with_rm_only() {
    let start = |rm: bool, exit_status: serde_json::Value| {
        let fake = Fake::start(move |line, request| match line {
            "GET /v1/images?reference=img" => answer(200, &json!([image("img:latest")])),
            "POST /v1/vms" => answer(201, &vm("created")),
            "POST /v1/vms/abababababab/start" => answer(
                422,
                &json!({"kind": "not-possible", "message": "cannot start VM `web`", "causes": [], "hints": [],
                    "exit_status": exit_status}),
            ),
            "DELETE /v1/vms/abababababab?force=true" => crate::fake::now(crate::fake::response(204, "")),
            _ => session(request, |mut socket| async move { drop(hear(&mut socket).await) }),
        });
        let output = fake.run(if rm {
            &["run", "--rm", "img"]
        } else {
            &["run", "img"]
        });
        assert_eq!(text(&output.stderr), "error: cannot start VM `web`\n");
        (
            output.status.code().unwrap(),
            fake.requests()
                .iter()
                .any(|request| request.starts_with("DELETE")),
        )
    };
    assert_eq!(start(true, json!(null)), (1, true));
    assert_eq!(start(false, json!(127)), (127, false));
}

#[test]
fn a_missing_image_is_pulled_once() {
    let fake = Fake::start(|line, _| match line {
        "GET /v1/images?reference=img" => answer(200, &json!([])),
        "GET /v1/images?reference=other" => answer(200, &json!([image("other:latest")])),
        "POST /v1/images/pull" => lines(&[json!({"type": "done", "result": image("img:latest")})]),
        "POST /v1/vms" => answer(201, &vm("created")),
        "POST /v1/vms/abababababab/start" => answer(200, &vm("running")),
        _ => not_found("no such VM"),
    });
    let output = fake.run(&["run", "-d", "img"]);
    assert_eq!(
        (output.status.code(), text(&output.stdout)),
        (Some(0), format!("{ID}\n").as_str())
    );
    assert_eq!(
        text(&output.stderr),
        "Unable to find image `img` in the store, pulling it\n"
    );
    let expected = [
        "GET /v1/images?reference=img",
        "POST /v1/images/pull",
        "POST /v1/vms",
        "POST /v1/vms/abababababab/start",
    ];
    assert_eq!(fake.requests(), expected);
    // What is prepared costs one small request; what is pulled anyway costs none.
    fake.run(&["create", "other"]);
    fake.run(&["create", "--pull", "always", "other"]);
    assert_eq!(
        fake.requests()[expected.len()..],
        [
            "GET /v1/images?reference=other",
            "POST /v1/vms",
            "POST /v1/images/pull",
            "POST /v1/vms"
        ]
    );
    // The daemon says that it is missing when it shall not be pulled.
    let fake = Fake::start(|line, _| match line {
        "POST /v1/vms" => not_found("no such image: `img`"),
        _ => answer(200, &json!([])),
    });
    let output = fake.run(&["run", "-d", "--pull", "never", "img"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        text(&output.stderr),
        "error: no such image: `img`\nhint: run `offshoot ps -a`\n"
    );
    assert_eq!(fake.requests(), ["GET /v1/images?reference=img", "POST /v1/vms"]);
}

#[test]
fn an_image_that_is_not_prepared_is_prepared_first() {
    let unprepared = || {
        let mut unprepared = image("img:latest");
        unprepared["prepared"] = json!(false);
        answer(200, &json!([unprepared]))
    };
    let fails = Arc::new(AtomicBool::new(false));
    let fake = Fake::start({
        let fails = Arc::clone(&fails);
        move |line, _| match line {
            "GET /v1/images?reference=img" => unprepared(),
            "POST /v1/images/prepare?force=false&reference=img" if fails.load(Ordering::Relaxed) => {
                lines(&[json!({"type": "failed", "error": {"kind": "bad-content",
                    "message": "cannot prepare image 0a0a", "causes": ["a layer is damaged"], "hints": []}})])
            }
            "POST /v1/images/prepare?force=false&reference=img" => lines(&[
                json!({"type": "progress", "progress": {"event": "message",
                    "text": "waiting for another preparation of image 0a0a"}}),
                json!({"type": "done", "result": image("img:latest")}),
            ]),
            "POST /v1/vms" => answer(201, &vm("created")),
            _ => not_found("no such VM"),
        }
    });
    let output = fake.run(&["create", "img"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(
        fake.requests(),
        [
            "GET /v1/images?reference=img",
            "POST /v1/images/prepare?force=false&reference=img",
            "POST /v1/vms"
        ]
    );
    fails.store(true, Ordering::Relaxed);
    let output = fake.run(&["create", "--quiet", "img"]);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), ""));
    assert_eq!(
        text(&output.stderr),
        "error: cannot prepare image 0a0a\n  caused by: a layer is damaged\n"
    );
    assert_eq!(fake.requests().len(), 5, "nothing is created after that");
}

#[test]
fn verbose_says_what_was_decided_and_why() {
    let fake = Fake::start(|line, _| match line {
        "GET /v1/images?reference=img" => answer(200, &json!([image("img:latest")])),
        "POST /v1/vms" => answer(201, &vm("created")),
        "GET /v1/vms/abababababab" => {
            let mut details = details("created", false);
            details["vmm"] = json!({"chosen": "qemu", "reasons": ["emulated in software: no /dev/kvm"],
                "passed_over": [{"name": "firecracker", "reason": "it needs KVM"}]});
            // A daemon that knows nothing of what was passed over.
            details["root"] = json!({"chosen": "block", "reasons": ["asked for"]});
            answer(200, &details)
        }
        _ => not_found("no such VM"),
    });
    let output = fake.run(&["create", "--verbose", "img"]);
    assert_eq!(
        (output.status.code(), text(&output.stdout)),
        (Some(0), format!("{ID}\n").as_str())
    );
    insta::assert_snapshot!(text(&output.stderr), @"
    vmm: qemu (emulated in software: no /dev/kvm); not firecracker: it needs KVM
    root: block (asked for)
    ");
}

#[test]
fn exec_says_what_to_run_and_ends_with_its_status() {
    let fake = Fake::start(|line, request| {
        assert_eq!(line, "GET /v1/vms/web/exec");
        session(request, |mut socket| async move {
            let (_, start) = hear(&mut socket).await.unwrap();
            let start: serde_json::Value = serde_json::from_slice(&start).unwrap();
            if start["process"]["argv"] == json!(["nope"]) {
                let status = json!({"status": "failed", "code": 127, "error": {"kind": "not-found",
                    "message": "cannot run `nope`", "causes": ["no such file or directory"], "hints": []}});
                return say(&mut socket, channel::STATUS, status.to_string().as_bytes()).await;
            }
            assert_eq!(
                start,
                json!({"process": {"argv": ["ls", "-l"], "env": ["A=1"], "working_dir": "/w", "user": "me", "tty": false,
                    "stdin": false}, "window": null, "detach": start["detach"]})
            );
            exited(&mut socket, if start["detach"] == json!(true) { 0 } else { 3 }).await;
        })
    });
    let words = ["-e", "A=1", "-w", "/w", "-u", "me", "web", "ls", "-l"];
    assert_eq!(fake.run(&[&["exec"], &words[..]].concat()).status.code(), Some(3));
    assert_eq!(
        fake.run(&[&["exec", "-d"], &words[..]].concat()).status.code(),
        Some(0)
    );
    let output = fake.run(&["exec", "web", "nope"]);
    assert_eq!(output.status.code(), Some(127));
    assert_eq!(
        text(&output.stderr),
        "error: cannot run `nope`\n  caused by: no such file or directory\n"
    );
    let output = fake.run(&["exec", "-it", "web", "sh"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("leave out `-t`"));
}

#[test]
fn a_session_that_is_cut_off_is_an_error() {
    let fake =
        Fake::start(|_, request| session(request, |mut socket| async move { drop(hear(&mut socket).await) }));
    let output = fake.run(&["exec", "web", "ls"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("closed the session"),
        "{}",
        text(&output.stderr)
    );
    // A refused session tells why, like any other request.
    let fake = Fake::start(|_, _| not_found("no VM `web`"));
    let output = fake.run(&["exec", "web", "ls"]);
    assert_eq!(
        text(&output.stderr),
        "error: no VM `web`\nhint: run `offshoot ps -a`\n"
    );
}

/// A terminal of its own: the end that a person would hold, and the end for the program.
pub(crate) fn terminal() -> (File, OwnedFd) {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
    let slave = rustix::fs::open(name.as_c_str(), flags, rustix::fs::Mode::empty()).unwrap();
    tcsetwinsize(
        &slave,
        Winsize {
            ws_col: 100,
            ws_row: 30,
            ws_xpixel: 0,
            ws_ypixel: 0,
        },
    )
    .unwrap();
    (File::from(master), slave)
}

#[test]
fn a_terminal_is_raw_and_is_given_back() {
    let fake = Fake::start(|line, request| match line {
        "GET /v1/vms/web" => answer(200, &details("running", true)),
        "GET /v1/vms/abababababab/attach?logs=false&stdin=true" => {
            session(request, |mut socket| async move {
                let resize = hear(&mut socket).await.unwrap();
                assert_eq!(
                    resize,
                    (channel::RESIZE, b"{\"Width\":100,\"Height\":30}".to_vec())
                );
                say(&mut socket, channel::STDOUT, b"$ ").await;
                let mut typed = Vec::new();
                while let Some((channel, data)) = hear(&mut socket).await {
                    assert_eq!(channel, channel::STDIN);
                    typed.extend_from_slice(&data);
                    say(&mut socket, channel::STDOUT, &data).await;
                }
                // Ctrl-C came as a byte, Ctrl-P because something else followed, and the detach keys not at all.
                assert_eq!(typed, b"ls\r\x03\x10x");
            })
        }
        _ => not_found("no"),
    });
    let (mut person, slave) = terminal();
    let mode = || {
        tcgetattr(&slave).unwrap().local_modes & (LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG)
    };
    let before = mode();
    assert!(before.contains(LocalModes::ICANON));
    let stdio = || Stdio::from(slave.try_clone().unwrap());
    let mut command = fake.offshoot(&["attach", "web"]);
    let mut child = command
        .stdin(stdio())
        .stdout(stdio())
        .stderr(stdio())
        .spawn()
        .unwrap();
    let mut shown = [0; 2];
    person.read_exact(&mut shown).unwrap();
    assert_eq!(&shown, b"$ ");
    assert!(mode().is_empty());
    person.write_all(b"ls\r\x03\x10x").unwrap();
    let mut echo = [0; 6];
    person.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"ls\r\x03\x10x");
    person.write_all(b"\x10").unwrap();
    person.write_all(b"\x11").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(mode(), before);
}
