//! SSH into real VMs by OpenSSH's own programs: into an image that is one static program, and by tools that need more.

use std::fs::{File, Permissions};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use offshoot_e2e::{Daemon, SshClient, bin_dir, comes_true, sha256, succeeds, tar_of, text, wait_until};
use serde_json::{Value, json};

/// The one program of [`bare`] images: many tools in one static file, and no shell by the name that servers look for.
const TOOLS: &str = "/bin/busybox";

/// Ends when the test does.
struct Background(Child);

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Imports an image that is one static program, as the name `bare`.
fn bare(daemon: &Daemon) {
    let tar = daemon.root().join("bare.tar");
    tar_of(&tar, |dir| {
        std::fs::create_dir_all(dir.join("bin")).expect("a folder");
        let program = ["/bin/busybox", "/usr/bin/busybox"].map(Path::new);
        let program = program.iter().find(|path| path.exists());
        let program = program.expect("busybox-static is not installed; run scripts/install-deps");
        std::fs::copy(program, dir.join("bin/busybox")).expect("copy");
        std::fs::set_permissions(dir.join("bin/busybox"), Permissions::from_mode(0o755)).expect("chmod");
    });
    daemon.ok(["image", "import", "--name", "bare", tar.to_str().expect("a path")]);
    std::fs::remove_file(tar).expect("remove");
}

fn sleeps(daemon: &Daemon, name: &str) {
    daemon.ok(["run", "-d", "--name", name, "bare", TOOLS, "sleep", "100000"]);
}

fn random_file(path: &Path, bytes: u64) {
    let mut source = File::open("/dev/urandom").expect("urandom").take(bytes);
    std::io::copy(&mut source, &mut File::create(path).expect("a file")).expect("copy");
}

#[test]
fn openssh_works_with_an_image_that_is_one_static_program() {
    let daemon = Daemon::start();
    bare(&daemon);
    sleeps(&daemon, "bare");
    let dir = tempfile::tempdir().unwrap();

    // Our own command: status, output, input.
    assert_eq!(daemon.ok(["ssh", "bare", TOOLS, "echo", "hello"]), "hello");
    daemon.cli(["ssh", "bare", TOOLS, "ls", "/nowhere"]).fails(1);
    daemon.cli(["ssh", "bare", "/no/such/program"]).fails(127);
    let echoed = daemon
        .cli(["ssh", "-q", "root@bare.vm.internal", TOOLS, "cat"])
        .stdin("in and out\n");
    assert_eq!(echoed.ok(), "in and out");

    // The user's own programs, by the name that is always right and by the short one.
    let client = SshClient::of(&daemon);
    assert_eq!(client.ok("ssh", ["bare.vm.internal", TOOLS, "id", "-u"]), "0");
    assert_eq!(client.ok("ssh", ["bare", TOOLS, "hostname"]), "bare");
    assert_eq!(client.run("ssh", ["bare", TOOLS, "false"]).status.code(), Some(1));

    let (small, back) = (dir.path().join("small"), dir.path().join("back"));
    std::fs::write(&small, "copied\n").unwrap();
    client.ok("scp", [small.to_str().unwrap(), "bare.vm.internal:/root/small"]);
    client.ok("scp", ["bare.vm.internal:/root/small", back.to_str().unwrap()]);
    assert_eq!(std::fs::read_to_string(&back).unwrap(), "copied\n");
    let batch = dir.path().join("batch");
    let lines = format!(
        "mkdir /root/d\nput {} /root/d/one\nrename /root/d/one /root/d/two\nls -1 /root/d\n",
        small.display()
    );
    std::fs::write(&batch, lines).unwrap();
    let said = client.ok("sftp", ["-b", batch.to_str().unwrap(), "bare.vm.internal"]);
    assert!(said.contains("/root/d/two"), "{said}");

    // To a server in the guest, and from it to one on this side.
    let (local, remote) = (dir.path().join("local.sock"), dir.path().join("remote.sock"));
    client.ok("ssh", ["bare", TOOLS, "mkdir", "/root/www"]);
    client.ok("scp", [small.to_str().unwrap(), "bare:/root/www/index.html"]);
    daemon.ok([
        "exec",
        "-d",
        "bare",
        TOOLS,
        "httpd",
        "-p",
        "127.0.0.1:8080",
        "-h",
        "/root/www",
    ]);
    let forwards = [
        format!("-L{}:127.0.0.1:8080", local.display()),
        format!("-R127.0.0.1:9000:{}", remote.display()),
    ];
    let listener = UnixListener::bind(&remote).unwrap();
    let mut forwarding = client.command("ssh", ["-v", "-N", "-oExitOnForwardFailure=yes"]);
    let child = forwarding
        .args(&forwards)
        .arg("bare")
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let _forwarding = Background(child);
    let page = |answer: &mut String| {
        let Ok(mut stream) = UnixStream::connect(&local) else {
            return false;
        };
        answer.clear();
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").is_ok()
            && stream.read_to_string(answer).is_ok()
            && !answer.is_empty()
    };
    let mut answer = String::new();
    wait_until("an answer through -L", || page(&mut answer));
    assert!(answer.ends_with("copied\n"), "{answer}");
    let answering = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"from outside\n").unwrap();
    });
    assert_eq!(
        client.ok("ssh", ["bare", TOOLS, "nc", "127.0.0.1", "9000"]),
        "from outside"
    );
    answering.join().unwrap();

    // Without a file of its own to look at, the fragment also works as an include of the user's.
    let said = daemon.ok(["ssh-config", "--install"]);
    assert!(said.contains(" now: "), "{said}");
    assert!(daemon.ok(["ssh-config", "--install"]).contains(" already: "));
    let installed = daemon.root().join(".ssh/config");
    let included = SshClient::with(&daemon, &std::fs::read_to_string(&installed).unwrap());
    assert_eq!(
        included.ok("ssh", ["bare.vm.internal", TOOLS, "echo", "included"]),
        "included"
    );
    daemon.ok(["ssh-config", "--uninstall"]);
    assert_eq!(std::fs::read_to_string(&installed).unwrap(), "");
    let unknown = client.run("ssh", ["nobody.vm.internal", "true"]);
    assert_eq!(unknown.status.code(), Some(255));
    assert!(
        text(&unknown.stderr).contains("nobody"),
        "{}",
        text(&unknown.stderr)
    );
    daemon.finish();
}

#[test]
fn a_hundred_megabytes_arrive_whole_both_ways() {
    let daemon = Daemon::start();
    bare(&daemon);
    sleeps(&daemon, "bare");
    let client = SshClient::of(&daemon);
    let dir = tempfile::tempdir().unwrap();
    let (there, back) = (dir.path().join("there"), dir.path().join("back"));
    random_file(&there, 100_000_000);
    client.ok("scp", [there.to_str().unwrap(), "bare:/root/large"]);
    let inside = client.ok("ssh", ["bare", TOOLS, "sha256sum", "/root/large"]);
    let expected = sha256(&there);
    assert!(inside.starts_with(&expected), "{inside} is not {expected}");
    client.ok("scp", ["bare:/root/large", back.to_str().unwrap()]);
    assert_eq!(sha256(&back), expected);

    // Through a pipe as well, where nothing knows how much comes.
    let (input, output) = (File::open(&there).unwrap(), File::create(&back).unwrap());
    let mut through = client.command("ssh", ["bare", TOOLS, "cat"]);
    succeeds(through.stdin(input).stdout(output));
    assert_eq!(sha256(&back), expected);
    daemon.finish();
}

/// A key pair in a folder.
fn key_pair(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    succeeds(
        Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-f"])
            .arg(&path),
    );
    path
}

#[test]
fn only_the_right_keys_get_in_on_either_side() {
    let daemon = Daemon::start();
    bare(&daemon);
    let (right, wrong) = (key_pair(daemon.root(), "right"), key_pair(daemon.root(), "wrong"));
    let given = format!("{}.pub", right.display());
    daemon.ok([
        "run",
        "-d",
        "--name",
        "closed",
        "--no-ssh-keys",
        "--ssh-key",
        &given,
        "bare",
        TOOLS,
        "sleep",
        "100000",
    ]);
    let config = daemon.ok(["ssh-config"]);
    let own = daemon.root().join(".config/offshoot/id_ed25519");
    let own = own.to_str().unwrap();
    let is_in = |text: &str| {
        let client = SshClient::with(&daemon, text);
        let output = client.run("ssh", ["-oBatchMode=yes", "closed.vm.internal", TOOLS, "true"]);
        (output.status.code(), self::text(&output.stderr))
    };
    // Ours comes along with the connection; the one that was given is the VM's own.
    assert_eq!(is_in(&config).0, Some(0));
    assert_eq!(is_in(&config.replace(own, right.to_str().unwrap())).0, Some(0));
    let (status, said) = is_in(&config.replace(own, wrong.to_str().unwrap()));
    assert_eq!(status, Some(255), "{said}");
    assert!(said.contains("Permission denied (publickey)"), "{said}");
    // No password is ever asked for.
    let asking = config.replace("publickey", "password,keyboard-interactive");
    assert_eq!(is_in(&asking).0, Some(255));

    // A host that has another key than the VM is none that anybody talks to.
    let other = std::fs::read_to_string(format!("{}.pub", wrong.display())).unwrap();
    let lines = config.lines().map(|line| match line.trim().split_once(' ') {
        Some(("KnownHostsCommand", _)) => {
            format!("KnownHostsCommand /bin/echo closed.vm.internal {}", other.trim())
        }
        _ => line.to_owned(),
    });
    let (status, said) = is_in(&lines.collect::<Vec<_>>().join("\n"));
    assert_eq!(status, Some(255), "{said}");
    assert!(said.contains("Host key verification failed"), "{said}");

    // Over the network only the VM's own key counts.
    let details = daemon.get_json("/v1/ssh?vm=closed");
    let host = &details["vms"][0];
    let address = host["ipv4"].as_str().expect("an address");
    let known = daemon.root().join("known_hosts");
    std::fs::write(
        &known,
        format!("{address} {}\n", host["host_key"].as_str().expect("a key")),
    )
    .unwrap();
    let over_tcp = |key: &Path| {
        let mut ssh = daemon.inside("ssh");
        ssh.args([
            "-F",
            "none",
            "-oBatchMode=yes",
            "-oIdentitiesOnly=yes",
            "-oIdentityAgent=none",
        ])
        .arg(format!("-oUserKnownHostsFile={}", known.display()))
        .args(["-oStrictHostKeyChecking=yes", "-i"])
        .arg(key)
        .arg(format!("root@{address}"))
        .args([TOOLS, "echo", "in"])
        .stdin(Stdio::null());
        ssh.output().expect("ssh")
    };
    let (in_, out) = (over_tcp(&right), over_tcp(Path::new(own)));
    assert_eq!(text(&in_.stdout), "in\n", "{}", text(&in_.stderr));
    assert_eq!(out.status.code(), Some(255), "{}", text(&out.stderr));

    // What is no key is refused before there is a VM.
    for keys in [
        json!(["nonsense"]),
        json!(vec!["x"; 65]),
        json!([format!("restrict {}", other.trim())]),
    ] {
        let (status, error) = daemon.post(
            "/v1/vms",
            &json!({"image": "bare", "cmd": ["x"], "ssh": {"keys": keys}}),
        );
        assert_eq!(status, 400, "{error}");
        assert!(error["message"].as_str().unwrap().contains("SSH"), "{error}");
    }
    daemon
        .cli(["run", "--ssh-key", "/no/such/file", "bare", TOOLS])
        .fails(1);
    daemon.finish();
}

/// What `ssh` is told to expect of a VM, by the name that is always right.
fn known_host(daemon: &Daemon, vm: &str) -> String {
    daemon.ok(["ssh-known-hosts", &format!("{vm}.vm.internal")])
}

#[test]
fn a_host_key_is_the_vm_s_for_life() {
    let daemon = Daemon::start();
    bare(&daemon);
    daemon.ok(["create", "--name", "one", "bare", TOOLS, "sleep", "100000"]);
    let early = daemon.cli(["ssh", "one", TOOLS, "true"]).fails(1);
    assert!(early.contains("hint: `offshoot start one`"), "{early}");
    daemon.cli(["ssh-known-hosts", "one"]).fails(1);
    daemon.ok(["start", "one"]);
    sleeps(&daemon, "two");
    let (one, two) = (known_host(&daemon, "one"), known_host(&daemon, "two"));
    assert!(one.starts_with("one.vm.internal ssh-ed25519 AAAA"), "{one}");
    assert_ne!(one.split(' ').nth(2), two.split(' ').nth(2));
    let file =
        PathBuf::from(daemon.inspect("one")["directory"].as_str().unwrap()).join("ssh_host_ed25519_key");
    let mode = std::fs::metadata(&file).expect("a host key").permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);

    // The server has the very key: the client takes no other.
    let works = || daemon.ok(["ssh", "one", TOOLS, "echo", "works"]);
    assert_eq!(works(), "works");
    daemon.ok(["stop", "-t", "1", "one"]);
    daemon.ok(["start", "one"]);
    assert_eq!(
        (known_host(&daemon, "one"), works()),
        (one.clone(), "works".into())
    );
    daemon.ok(["reset", "-f", "one"]);
    daemon.ok(["start", "one"]);
    assert_eq!(
        (known_host(&daemon, "one"), works()),
        (one.clone(), "works".into())
    );
    daemon.ok(["rm", "-f", "one"]);
    assert!(!file.exists());
    sleeps(&daemon, "one");
    assert_ne!(known_host(&daemon, "one"), one);
    assert_eq!(works(), "works");
    daemon.finish();
}

/// `offshoot WORDS` in a terminal; gives all that is shown there.
fn in_a_terminal(daemon: &Daemon, words: &str) -> String {
    let line = format!("{} {words}; echo status $?", bin_dir().join("offshoot").display());
    let output = Command::new("script")
        .args(["-qec", &line, "/dev/null"])
        .env("OFFSHOOT_SOCKET", daemon.socket())
        .env("HOME", daemon.root())
        .env("SHELL", "/bin/sh")
        .stdin(Stdio::null())
        .output()
        .expect("script(1) is part of Debian");
    text(&output.stdout).replace('\r', "")
}

fn sessions(daemon: &Daemon, vm: &str) -> (u64, u64) {
    let open = &daemon.inspect(vm)["sessions"];
    (open["ssh"].as_u64().unwrap(), open["exec"].as_u64().unwrap())
}

#[test]
fn open_sessions_are_shown_and_the_end_of_one_reminds() {
    let daemon = Daemon::start();
    bare(&daemon);
    sleeps(&daemon, "web");
    daemon.ok([
        "run", "-d", "--rm", "--name", "short", "bare", TOOLS, "sleep", "100000",
    ]);

    let alone = in_a_terminal(&daemon, &format!("ssh -t web {TOOLS} sh -c '\"exit 7\"'"));
    let line = "VM `web` is still running; stop it with `offshoot stop web`";
    assert!(alone.contains(&format!("{line}\nstatus 7")), "{alone}");
    for quiet in [
        format!("ssh -q web {TOOLS} true"),
        format!("ssh short {TOOLS} true"),
        format!("ssh web {TOOLS} true 2>/dev/null"),
    ] {
        let said = in_a_terminal(&daemon, &quiet);
        assert!(
            said.contains("status 0") && !said.contains("still running"),
            "{quiet}: {said}"
        );
    }
    wait_until("the last of them to be gone", || {
        sessions(&daemon, "web") == (0, 0)
    });
    assert!(daemon.ok(["ps"]).contains("SESSIONS"));

    let mut open = Vec::new();
    for verb in ["ssh", "exec"] {
        let script = "echo ready; sleep 100000";
        // ssh(1) makes one line of its words, as a shell reads it.
        let script = if verb == "ssh" {
            format!("'{script}'")
        } else {
            script.to_owned()
        };
        let mut child = daemon.cli([verb, "web", TOOLS, "sh", "-c", &script]).spawn();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert_eq!(line, "ready\n", "{verb}");
        open.push(Background(child));
    }
    wait_until("both to be counted", || sessions(&daemon, "web") == (1, 1));
    assert!(daemon.ok(["ps"]).contains("1 ssh, 1 exec"));
    let rows: Value = serde_json::from_str(&daemon.ok(["ps", "--output", "json"])).unwrap();
    let row = rows
        .as_array()
        .unwrap()
        .iter()
        .find(|row| row["name"] == "web")
        .unwrap();
    assert_eq!(row["sessions"], json!({"ssh": 1, "exec": 1}));
    let others = in_a_terminal(&daemon, &format!("ssh web {TOOLS} true"));
    assert!(
        others.contains("still running, with 2 other sessions; stop it"),
        "{others}"
    );
    drop(open);
    wait_until("nobody to be there", || sessions(&daemon, "web") == (0, 0));
    daemon.finish();
}

#[test]
fn a_vm_without_a_network_is_entered_all_the_same() {
    let daemon = Daemon::start();
    bare(&daemon);
    let (status, vm) = daemon.post(
        "/v1/vms",
        &json!({"name": "alone", "image": "bare", "cmd": [TOOLS, "sleep", "100000"], "network": {"network": "none"}}),
    );
    assert_eq!(status, 201, "{vm}");
    daemon.ok(["start", "alone"]);
    assert_eq!(daemon.ok(["ssh", "alone", TOOLS, "echo", "here"]), "here");
    let client = SshClient::of(&daemon);
    assert_eq!(
        client.ok("ssh", ["alone.vm.internal", TOOLS, "echo", "there"]),
        "there"
    );
    let links = client.ok("ssh", ["alone", TOOLS, "ls", "/sys/class/net"]);
    assert_eq!(links, "lo");

    // A daemon that was killed finds it again, and so do clients.
    let mut daemon = daemon;
    daemon.kill();
    daemon.start_again();
    let entered = comes_true(|| daemon.cli(["ssh", "alone", TOOLS, "true"]).run().status.success());
    assert!(entered, "nobody gets in after a restart of the daemon");
    daemon.finish();
}

/// A tar of Debian with rsync and Python; made once.
fn debian_with_tools() -> PathBuf {
    let folder = bin_dir().parent().expect("target").join("e2e");
    std::fs::create_dir_all(&folder).expect("target/e2e");
    let lock = File::create(folder.join("tools.lock")).expect("a lock file");
    lock.lock().expect("the lock");
    let tar = folder.join("tools.tar");
    if !tar.exists() {
        let fresh = folder.join("tools.tar.new");
        succeeds(
            Command::new("mmdebstrap")
                .args([
                    "--variant=minbase",
                    "--include=rsync,python3",
                    "--mode=root",
                    "--format=tar",
                    "bookworm",
                ])
                .arg(&fresh),
        );
        std::fs::rename(&fresh, &tar).expect("rename");
    }
    tar
}

#[test]
fn rsync_and_ansible_work_with_what_the_image_has() {
    let tar = debian_with_tools();
    let daemon = Daemon::start();
    daemon.ok(["image", "import", "--name", "tools", tar.to_str().unwrap()]);
    daemon.ok(["run", "-d", "--name", "managed", "tools", "sleep", "100000"]);
    let client = SshClient::of(&daemon);
    let dir = tempfile::tempdir().unwrap();
    let (tree, back) = (dir.path().join("tree"), dir.path().join("back"));
    std::fs::create_dir_all(tree.join("a/b")).unwrap();
    for n in 0..20 {
        random_file(&tree.join(format!("a/b/{n}")), 1000 * n);
    }
    let rsync = |from: &str, to: &str| {
        let shell = format!("ssh -F {}", client.config().display());
        let mut rsync = Command::new("rsync");
        rsync
            .args(["-a", "-e", &shell, from, to])
            .env("HOME", daemon.root());
        succeeds(&mut rsync);
    };
    rsync(&format!("{}/", tree.display()), "managed.vm.internal:/root/tree/");
    rsync("managed.vm.internal:/root/tree/", &format!("{}/", back.display()));
    succeeds(Command::new("diff").arg("-r").args([&tree, &back]));

    let mut ansible = Command::new("ansible");
    ansible
        .args(["-i", "managed.vm.internal,", "all", "-m", "ping"])
        .arg(format!("--ssh-common-args=-F {}", client.config().display()))
        .current_dir(dir.path())
        .env("HOME", daemon.root())
        .env("ANSIBLE_NOCOLOR", "1")
        .env("LC_ALL", "C.UTF-8")
        .env("ANSIBLE_SSH_CONTROL_PATH_DIR", dir.path().join("cp"))
        .env("ANSIBLE_SSH_ARGS", "-o ControlMaster=no");
    let said = succeeds(&mut ansible);
    assert!(said.contains("SUCCESS") && said.contains("\"pong\""), "{said}");

    // A shell with a terminal, as people have it.
    let shell = in_a_terminal(
        &daemon,
        "ssh -tt managed 'test -t 0 && stty size && echo $SSH_TTY'",
    );
    assert!(shell.contains("/dev/pts/"), "{shell}");
    // Whoever has a name and a shell in the image can be somebody else.
    daemon.ok(["exec", "managed", "useradd", "-m", "-s", "/bin/sh", "dev"]);
    assert_eq!(daemon.ok(["ssh", "-l", "dev", "managed", "id", "-un"]), "dev");
    let refused = daemon.cli(["ssh", "-l", "nobody", "managed", "id", "-un"]).run();
    assert_eq!(refused.status.code(), Some(1), "its shell is nologin(8)");
    daemon.finish();
}
