//! Requests that are malformed, huge, slow or never finished: refused in the one error shape where HTTP got far enough,
//! the daemon's memory stays, and other clients are answered meanwhile.

use std::io::Write as _;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use offshoot_e2e::{Daemon, Random, answer_of, read_answer, wait_until};

/// Short, so that the tests see the end of who is slow.
const SHORT_PATIENCE: &str = "api_head_timeout_s = 2\napi_body_timeout_s = 2";

/// How much more memory the daemon may have after everything was done to it several times more than after the first time.
/// What it leaks would grow with every round: one round alone sends some hundred MiB. What the allocator keeps for itself
/// does not, but differs by some tens of MiB with how the threads met.
const GROWTH: u64 = 64 << 20;

fn post(path: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\n{headers}\r\n");
    [head.as_bytes(), body].concat()
}

const JSON: &str = "content-type: application/json\r\n";
const CHUNKED: &str = "content-type: application/json\r\ntransfer-encoding: chunked\r\n";

/// Another client's request, which must be answered whatever goes on.
fn others_are_answered(daemon: &Daemon) {
    let answer = daemon.get("/v1/vms");
    assert_eq!((answer.status, answer.body.as_str()), (200, "[]"));
}

/// Bytes that are no HTTP, or nearly.
fn garbage(daemon: &Daemon, random: &mut Random) {
    for round in 0..60 {
        let length = 1 + random.below(if round % 10 == 0 { 200_000 } else { 2_000 });
        let byte = |_| u8::try_from(random.below(256)).unwrap();
        let mut bytes: Vec<u8> = (0..length).map(byte).collect();
        match round % 3 {
            // Lines that look like a request's.
            1 => bytes
                .splice(0..0, b"GET /v1/vms HTTP/1.1\r\n".iter().copied())
                .for_each(drop),
            2 => bytes
                .splice(0..0, b"POST /v1/vms HTTP/1.1\r\nhost: ".iter().copied())
                .for_each(drop),
            _ => {}
        }
        bytes.extend_from_slice(b"\r\n\r\n");
        let mut stream = daemon.connect();
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(Shutdown::Write);
        if let Some(answer) = read_answer(&mut stream) {
            answer.refused(answer.status);
            assert!((400..500).contains(&answer.status), "{answer:?}");
        }
    }
}

/// A good request, cut off at every few bytes, with the client gone or silent at the other end.
fn cut_off(daemon: &Daemon) {
    let body = br#"{"image": "debian:bookworm", "cmd": ["true"]}"#;
    let request = post(
        "/v1/vms",
        &format!("{JSON}content-length: {}\r\n", body.len()),
        body,
    );
    for end in (1..request.len()).step_by(7) {
        drop({
            let mut stream = daemon.connect();
            stream.write_all(&request[..end]).unwrap();
            stream
        });
        let mut stream = daemon.connect();
        stream.write_all(&request[..end]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        // It ends; what it says, if anything, is a refusal.
        if let Some(answer) = read_answer(&mut stream) {
            answer.refused(answer.status);
        }
    }
}

/// Heads and bodies with one thing wrong.
fn wrong(daemon: &Daemon) {
    let check = |request: &[u8], status: u16| {
        let answer = daemon.send(request);
        let shown = String::from_utf8_lossy(&request[..request.len().min(120)]);
        answer
            .unwrap_or_else(|| panic!("no answer to {shown}"))
            .refused(status);
    };
    let json = |body: &[u8]| {
        post(
            "/v1/vms",
            &format!("{JSON}content-length: {}\r\n", body.len()),
            body,
        )
    };
    check(
        &post(
            "/v1/vms",
            &format!("{JSON}content-length: {}\r\n", 1u64 << 30),
            b"{}",
        ),
        413,
    );
    check(
        &post("/v1/vms", &format!("{JSON}content-length: -1\r\n"), b""),
        400,
    );
    check(
        &post(
            "/v1/vms",
            &format!("{JSON}content-length: 99999999999999999999999\r\n"),
            b"",
        ),
        400,
    );
    check(
        &post(
            "/v1/vms",
            &format!("{JSON}content-length: 2\r\ncontent-length: 3\r\n"),
            b"{}",
        ),
        400,
    );
    check(&post("/v1/vms", CHUNKED, b"zz\r\n{}\r\n0\r\n\r\n"), 400);
    check(&post("/v1/vms", CHUNKED, b"fffffffffffffffff\r\n{}"), 400);
    check(
        format!("GET /v1/vms HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(10_000)).as_bytes(),
        431,
    );
    check(
        format!("GET /v1/vms HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(1 << 20)).as_bytes(),
        431,
    );
    check(
        format!("GET /v1/{} HTTP/1.1\r\n\r\n", "y".repeat(1 << 20)).as_bytes(),
        431,
    );
    check(b"GET /v1/vms/%00 HTTP/1.1\r\nconnection: close\r\n\r\n", 400);
    check(b"GET /v1/vms/%FF%FE HTTP/1.1\r\nconnection: close\r\n\r\n", 400);
    check(b"GET /v1/vms/\xff HTTP/1.1\r\nconnection: close\r\n\r\n", 400);
    check(b"GET /v1/vms/\0 HTTP/1.1\r\nconnection: close\r\n\r\n", 400);
    check(
        b"GET /v1/vms?all=perhaps HTTP/1.1\r\nconnection: close\r\n\r\n",
        400,
    );
    check(b"BREW /v1/vms HTTP/1.1\r\nconnection: close\r\n\r\n", 405);
    check(
        b"GET /../../etc/passwd HTTP/1.1\r\nconnection: close\r\n\r\n",
        404,
    );
    for (body, status) in [
        (&b"["[..], 400),
        ("[".repeat(1 << 20).as_bytes(), 400),
        ("{\"a\":".repeat(300_000).as_bytes(), 400),
        (b"\xff\xfe{}", 400),
        (b"{\"image\":\"\xc3\x28\"}", 400),
        (b"{\"image\":\"a\", \"cpus\": -1}", 400),
        (b"{\"image\":\"a\", \"cpus\": 1e999}", 400),
        (b"{\"image\":\"a\\u0000b\"}", 400),
        (b"\0\0\0\0", 400),
        (&vec![b' '; (2 << 20) + 1], 413),
    ] {
        check(&closing(&json(body)), status);
    }
    let text = post(
        "/v1/vms",
        "content-type: text/plain\r\ncontent-length: 2\r\nconnection: close\r\n",
        b"{}",
    );
    check(&text, 415);
    let none = post("/v1/vms", "content-length: 2\r\nconnection: close\r\n", b"{}");
    check(&none, 415);
}

/// The same request, after which the daemon closes.
fn closing(request: &[u8]) -> Vec<u8> {
    let end = request
        .iter()
        .position(|byte| *byte == b'\n')
        .expect("a first line")
        + 1;
    [&request[..end], b"connection: close\r\n", &request[end..]].concat()
}

/// A body without an end is given up once it is too long, while it is still coming.
fn endless(daemon: &Daemon) {
    let mut stream = daemon.connect();
    stream.write_all(&post("/v1/vms", CHUNKED, b"")).unwrap();
    let chunk = [b"10000\r\n".as_slice(), &[b' '; 0x10000], b"\r\n"].concat();
    // 1 GiB would come if nobody stopped it.
    let sent = (0..16_384)
        .take_while(|_| stream.write_all(&chunk).is_ok())
        .count();
    assert!(sent < 16_384, "it took everything");
    read_answer(&mut stream).expect("an answer").refused(413);
}

/// Many requests at once on one connection are answered one after the other.
fn pipelined(daemon: &Daemon) {
    let mut stream = daemon.connect();
    let one = "GET /v1/vms HTTP/1.1\r\nhost: x\r\n\r\n";
    let last = "GET /v1/nowhere HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    stream
        .write_all(format!("{}{last}", one.repeat(200)).as_bytes())
        .unwrap();
    read_answer(&mut stream).expect("answers").refused(404);
}

/// Connections that say half of something. They are held open while others are answered.
fn half_said(daemon: &Daemon, said: &[u8], count: usize) -> Vec<UnixStream> {
    (0..count)
        .map(|_| {
            let mut stream = daemon.connect();
            stream.set_write_timeout(Some(Duration::from_millis(20))).unwrap();
            // What the daemon does not take stays with us.
            let _ = stream.write_all(said);
            stream
        })
        .collect()
}

/// Heads that come byte by byte.
fn slow_heads(daemon: &Daemon) {
    let mut slow = half_said(daemon, b"", 200);
    for byte in b"GET /v1/vms HTTP/1.1\r\nx: " {
        for stream in &mut slow {
            stream.write_all(&[*byte]).unwrap();
        }
        if byte.is_ascii_uppercase() {
            others_are_answered(daemon);
        }
    }
    for mut stream in slow {
        read_answer(&mut stream).expect("an answer").refused(408);
    }
}

/// Bodies that stop before their end: small ones, and large ones that would fill the memory together.
fn slow_bodies(daemon: &Daemon) {
    let length = 2 << 20;
    let headers = format!("{JSON}content-length: {length}\r\n");
    let before = daemon.resident();
    let slow = [
        half_said(daemon, &post("/v1/vms", &headers, b"{"), 50),
        half_said(daemon, &post("/v1/vms", &headers, &vec![b' '; length - 1]), 40),
    ];
    others_are_answered(daemon);
    let growth = daemon.resident().saturating_sub(before);
    assert!(growth < GROWTH, "half-sent bodies take {} MiB", growth >> 20);
    for mut stream in slow.into_iter().flatten() {
        read_answer(&mut stream).expect("an answer").refused(408);
    }
}

/// Uploads that do not move. They have threads, so they are counted; others go on.
fn slow_uploads(daemon: &Daemon) {
    let upload = post("/v1/images/import?name=x", "content-length: 1000000\r\n", b"");
    let slow = half_said(daemon, &upload, 64);
    // They may overtake each other, so that one of the first is the one too many.
    let mut more = Vec::new();
    wait_until("uploads to be too many", || {
        let mut one_more = daemon.connect();
        one_more.write_all(&upload).unwrap();
        others_are_answered(daemon);
        let full = read_first(&mut one_more).is_some_and(|answer| answer.starts_with("HTTP/1.1 503"));
        more.push(one_more);
        full
    });
    for mut stream in slow {
        let answer = read_answer(&mut stream).expect("an answer");
        if answer.status == 503 {
            answer.refused(503);
            continue;
        }
        assert!(answer.body.contains("\"type\":\"failed\""), "{answer:?}");
    }
}

/// What comes first, if it comes soon.
fn read_first(stream: &mut UnixStream) -> Option<String> {
    use std::io::Read as _;
    stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let mut piece = [0; 4096];
    let read = stream.read(&mut piece).ok()?;
    Some(String::from_utf8_lossy(&piece[..read]).into_owned())
}

/// More connections than the daemon takes: those beyond are told so, and the room comes back.
fn too_many(daemon: &Daemon) {
    let mut open = half_said(daemon, b"GET", 1100);
    let mut last = open.pop().unwrap();
    read_answer(&mut last).expect("an answer").refused(503);
    drop(open);
    wait_until("room for another connection", || {
        daemon
            .send(b"GET /v1/vms HTTP/1.1\r\nconnection: close\r\n\r\n")
            .is_some_and(|answer| answer.status == 200)
    });
}

fn everything(daemon: &Daemon, random: &mut Random) {
    garbage(daemon, random);
    others_are_answered(daemon);
    cut_off(daemon);
    others_are_answered(daemon);
    wrong(daemon);
    endless(daemon);
    pipelined(daemon);
    slow_heads(daemon);
    slow_bodies(daemon);
    slow_uploads(daemon);
    too_many(daemon);
}

/// This process holds more connections than it may by default.
fn allow_many_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    let current = maximum.map_or(4096, |most| most.min(4096));
    assert!(current >= 2048, "this test needs 2048 open files");
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: Some(current),
            maximum,
        },
    )
    .unwrap();
}

#[test]
fn no_request_hurts_the_daemon_or_other_clients() {
    allow_many_files();
    let daemon = Daemon::start_empty_with(SHORT_PATIENCE);
    let mut random = Random::seeded();
    let pid = daemon.pid();
    everything(&daemon, &mut random);
    let before = daemon.resident();
    for _ in 0..3 {
        everything(&daemon, &mut random);
    }
    let growth = daemon.resident().saturating_sub(before);
    assert!(growth < GROWTH, "the daemon grew by {} MiB", growth >> 20);
    others_are_answered(&daemon);
    assert_eq!(daemon.pid(), pid);
    let log = daemon.log();
    assert!(!log.contains("panicked"), "{log}");
    daemon.finish();
}

#[test]
fn an_end_is_not_held_up_by_open_connections() {
    let mut daemon = Daemon::start_empty();
    let mut half = daemon.connect();
    half.write_all(b"GET /v1/vms HTTP/1.1\r\n").unwrap();
    let mut upload = daemon.connect();
    upload
        .write_all(&post(
            "/v1/images/import?name=x",
            "content-length: 1000000\r\n",
            b"xx",
        ))
        .unwrap();
    let status = daemon.terminate();
    assert!(status.success(), "{status}: {}", daemon.log());
    assert!(!daemon.socket().exists());
    daemon.start_again();
    daemon.finish();
}

#[test]
fn answers_are_told_apart() {
    let two = b"HTTP/1.1 200 OK\r\na: b\r\n\r\n[]HTTP/1.1 404 Not Found\r\nC: D\r\n\r\n{}";
    let answer = answer_of(two).unwrap();
    assert_eq!(
        (answer.status, answer.head.ends_with("c: d"), answer.body.as_str()),
        (404, true, "{}")
    );
    assert_eq!(answer_of(b""), None);
}
