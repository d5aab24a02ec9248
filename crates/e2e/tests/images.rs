//! Images from registries and archives, end to end.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

use offshoot_e2e::{Daemon, IMAGE, Layout, names, text, wait_until};

/// Debian's registry on a loopback port of its own.
struct Registry {
    child: Child,
    port: u16,
    _dir: tempfile::TempDir,
}

impl Registry {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // The port is free between the drop and the registry's bind; nothing else here binds fixed ports.
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let config = dir.path().join("config.yml");
        let text = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}/data\nhttp:\n  addr: 127.0.0.1:{port}\n",
            dir.path().display()
        );
        std::fs::write(&config, text).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry, which `make install-deps` installs");
        wait_until("the registry to answer", || {
            std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        Self {
            child,
            port,
            _dir: dir,
        }
    }

    fn push(&self, source: &str, name: &str) {
        let output = Command::new("skopeo")
            .args([
                "--insecure-policy",
                "copy",
                "--dest-tls-verify=false",
                "-q",
                source,
            ])
            .arg(format!("docker://127.0.0.1:{}/{name}", self.port))
            .output()
            .expect("skopeo, which `make install-deps` installs");
        assert!(output.status.success(), "skopeo: {}", text(&output.stderr));
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_image_pushed_by_skopeo_is_pulled_and_runs() {
    let daemon = Daemon::start();
    let registry = Registry::start();
    // On the data's file system, for the hard links.
    let layout = daemon.root().join("layout");
    Layout::of_the_golden_image(&daemon, &layout);
    registry.push(&format!("oci:{}:layout", layout.display()), "team/debian:12");
    let reference = format!("127.0.0.1:{}/team/debian:12", registry.port);
    daemon.ok(["image", "pull", &reference]);
    assert_eq!(
        daemon.ok(["run", "--rm", &reference, "sh", "-c", "echo from a registry"]),
        "from a registry"
    );

    // Like Docker, `run` fetches what is not there.
    daemon.ok(["image", "rm", &reference]);
    assert_eq!(daemon.ok(["run", "--rm", &reference, "echo", "again"]), "again");
    let unknown = format!("127.0.0.1:{}/team/none:1", registry.port);
    let error = daemon.cli(["image", "pull", &unknown]).fails(1);
    assert!(error.contains("hint:"), "{error}");
    let other = daemon
        .cli(["image", "pull", "--platform", "linux/s390x", &reference])
        .fails(1);
    assert!(other.contains("amd64"), "the error lists what there is: {other}");
    daemon.finish();
}

#[test]
fn archives_of_every_kind_become_images_that_run() {
    let daemon = Daemon::start();
    let layout = daemon.root().join("layout");
    Layout::of_the_golden_image(&daemon, &layout);
    let archive = daemon.root().join("docker.tar");
    let output = Command::new("skopeo")
        .args([
            "--insecure-policy",
            "copy",
            "-q",
            &format!("oci:{}:layout", layout.display()),
        ])
        .arg(format!("docker-archive:{}:saved:1", archive.display()))
        .output()
        .unwrap();
    assert!(output.status.success(), "skopeo: {}", text(&output.stderr));

    daemon.ok(["image", "import", archive.to_str().unwrap()]);
    daemon.ok(["image", "import", "--name", "folder:1", layout.to_str().unwrap()]);
    let tar = Command::new("tar")
        .args(["-C", layout.to_str().unwrap(), "-c", "."])
        .output()
        .unwrap();
    daemon
        .cli(["image", "import", "--name", "piped:1", "-"])
        .stdin(tar.stdout)
        .ok();
    for image in ["saved:1", "folder:1", "piped:1"] {
        assert_eq!(
            daemon.ok(["run", "--rm", image, "sh", "-c", "echo it runs"]),
            "it runs",
            "{image}"
        );
    }
    let table = daemon.ok(["image", "ls"]);
    for name in ["saved:1", "folder:1", "piped:1", IMAGE] {
        assert!(table.contains(name), "{table}");
    }
    daemon.finish();
}

#[test]
fn an_image_in_use_stays_and_one_that_nothing_needs_goes() {
    let daemon = Daemon::start();
    daemon.ok(["create", "--name", "user", IMAGE, "true"]);
    let refused = daemon.cli(["image", "rm", IMAGE]).fails(1);
    assert!(refused.contains("`user`"), "{refused}");
    daemon.ok(["rm", "user"]);
    daemon.ok(["image", "rm", IMAGE]);
    assert_eq!(names(&daemon.data().join("bases")), [""; 0]);
    assert_eq!(names(&daemon.data().join("blobs/sha256")), [""; 0]);
    daemon.finish();
}

#[test]
fn the_user_s_own_kernel_boots() {
    let daemon = Daemon::start();
    // Debian's package, unpacked by hand, stands for a kernel of the user's own: a bzImage and a folder of modules.
    let dir = tempfile::tempdir().unwrap();
    let kernels: serde_json::Value =
        serde_json::from_str(&daemon.ok(["kernel", "ls", "--output", "json"])).unwrap();
    let release = kernels[0]["release"].as_str().unwrap();
    let script = format!(
        "cd {} && apt-get -o APT::Sandbox::User=root download -qq linux-image-{release} && dpkg-deb -x *.deb tree",
        dir.path().display()
    );
    let output = Command::new("sh").args(["-ec", &script]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let tree = dir.path().join("tree");
    // Debian 13 keeps modules under /usr.
    let modules = [tree.join("usr/lib/modules"), tree.join("lib/modules")]
        .into_iter()
        .find(|path| path.exists())
        .unwrap();
    let id = daemon.ok([
        "kernel",
        "add",
        "--vmlinux",
        tree.join(format!("boot/vmlinuz-{release}")).to_str().unwrap(),
        "--modules",
        modules.join(release).to_str().unwrap(),
    ]);
    let table = daemon.ok(["kernel", "ls"]);
    let chosen = table.lines().find(|line| line.ends_with('*')).unwrap();
    assert!(chosen.starts_with(&id), "{id} is not the default: {table}");
    assert_eq!(daemon.ok(["run", "--rm", IMAGE, "uname", "-r"]), release);
    let missing = daemon
        .cli(["kernel", "add", "--vmlinux", "/no/such/kernel"])
        .fails(1);
    assert!(
        missing.contains("/no/such/kernel") && missing.contains("hint: "),
        "{missing}"
    );
    daemon.finish();
}
