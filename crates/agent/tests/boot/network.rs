//! The guest on a network, without one, and entered by OpenSSH over the channel.

use super::*;

/// QEMU's own network answers to echo requests for its gateway, and lets nothing out.
const NIC: [&str; 4] = [
    "-netdev",
    "user,id=net,restrict=on,net=10.99.7.0/24,host=10.99.7.1,ipv6-net=fd00:99:7::/64,ipv6-host=fd00:99:7::1",
    "-device",
    "virtio-net-pci,netdev=net,mac=02:00:0a:63:07:05",
];

fn on_a_network() -> v1::ConfigureRequest {
    let texts = |texts: [&str; 2]| texts.map(str::to_owned).to_vec();
    v1::ConfigureRequest {
        network: Some(v1::NetworkInterface {
            mac: "02:00:0a:63:07:05".into(),
            addresses: texts(["10.99.7.5/24", "fd00:99:7::5/64"]),
            gateways: texts(["10.99.7.1", "fd00:99:7::1"]),
            nameservers: texts(["10.99.7.1", "fd00:99:7::1"]),
            domain: "vm.internal".into(),
        }),
        ..configuration()
    }
}

/// A shell's words for the fields of a file below /sys or /proc.
async fn file(client: &AgentClient, path: &str) -> String {
    out(client, &format!("cat {path}")).await
}

#[test]
#[ignore = "boots a VM: set OFFSHOOT_TEST_KERNEL, OFFSHOOT_TEST_INITRAMFS, OFFSHOOT_TEST_ROOT"]
fn a_vm_on_a_network() {
    let Some(images) = images("OFFSHOOT_TEST_ROOT") else {
        return;
    };
    let mut machine = Machine::boot_with(&images, &NIC);
    run(async {
        let client = machine.connect().await;
        let bad = v1::ConfigureRequest {
            network: Some(v1::NetworkInterface::default()),
            ..on_a_network()
        };
        assert!(client.configure(bad).await.is_err());
        let stages = client.configure(on_a_network()).await.unwrap();
        machine.log(&format!("configured: {stages:?}"));
        for name in ["network-device", "network", "network-link"] {
            assert!(
                format!("{stages:?}").contains(&format!("\"{name}\"")),
                "{stages:?}"
            );
        }
        assert_eq!(
            file(&client, "/sys/class/net/eth0/address").await,
            "02:00:0a:63:07:05\n"
        );
        // Renamed, says the kernel: udev keeps it.
        assert_eq!(
            file(
                &client,
                "/sys/class/net/eth0/operstate /sys/class/net/eth0/name_assign_type"
            )
            .await,
            "up\n4\n"
        );
        // /proc/net/route: destination, gateway and mask of 10.99.7.0/24 and of the default, as little-endian hex.
        let routes = "awk '$1 == \"eth0\" {print $2, $3, $8}' /proc/net/route | sort";
        assert_eq!(
            out(&client, routes).await,
            "00000000 0107630A 00000000\n0007630A 00000000 00FFFFFF\n"
        );
        // /proc/net/if_inet6: nothing is tentative (0x40); scope 00 is global, 20 is of the link.
        let addresses = "awk '$6 == \"eth0\" {print $1, $3, $4, $5}' /proc/net/if_inet6 | sort";
        assert_eq!(
            out(&client, addresses).await,
            "fd000099000700000000000000000005 40 00 82\nfe8000000000000000000afffe630705 40 20 80\n"
        );
        let default6 = "awk '$10 == \"eth0\" && $2 == \"00\" {print $5}' /proc/net/ipv6_route";
        assert_eq!(out(&client, default6).await, "fd000099000700000000000000000001\n");
        assert_eq!(
            file(&client, "/etc/resolv.conf").await,
            "# Written at every start of the VM.\nnameserver 10.99.7.1\nnameserver fd00:99:7::1\nsearch vm.internal\n"
        );
        assert_eq!(
            out(
                &client,
                "getent ahosts pebble | awk '{print $1}' | sort -u; hostname -f"
            )
            .await,
            "10.99.7.5\nfd00:99:7::5\npebble.vm.internal\n"
        );
        // A server on a port below 1024, and a packet there and back through the gateway's echo, both without privileges.
        let as_nobody = |script: &str| v1::Process {
            user: "nobody".into(),
            ..shell(script)
        };
        let echo = "perl -MSocket -e 'socket(S, PF_INET, SOCK_DGRAM, 1) or die $!; \
            connect(S, sockaddr_in(0, inet_aton(\"10.99.7.1\"))) or die $!; \
            syswrite(S, pack(\"CCnnn\", 8, 0, 0, 0, 1)) or die $!; alarm 60; sysread(S, my $b, 99) or die $!; \
            print unpack(\"C\", $b), \"\\n\"; \
            socket(T, PF_INET, SOCK_STREAM, 0) or die $!; bind(T, sockaddr_in(80, INADDR_ANY)) or die $!'";
        assert_eq!(
            exec(&client, as_nobody(echo)).await,
            Ended {
                status: 0,
                out: "0\n".into(),
                err: String::new()
            }
        );
        assert!(client.shutdown(Duration::from_secs(5)).await.unwrap());
    });
    machine.wait_for_power_off();
}

/// Makes a key pair; returns the private key's file.
fn make_key(folder: &Path, name: &str) -> PathBuf {
    let file = folder.join(name);
    let made = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-f"])
        .arg(&file)
        .status();
    assert!(made.unwrap().success());
    file
}

/// A port on loopback whose connections go over the agent's channel, with a key that is good there.
async fn ssh_port(client: &AgentClient, key: String) -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let client = client.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (client, key) = (client.clone(), key.clone());
            tokio::spawn(async move {
                stream.set_nodelay(true).unwrap();
                let mut connection = client.ssh(vec![key]).await.unwrap();
                // Either side may go first.
                drop(tokio::io::copy_bidirectional(&mut stream, &mut connection).await);
            });
        }
    });
    port
}

#[test]
#[ignore = "boots a VM: set OFFSHOOT_TEST_KERNEL, OFFSHOOT_TEST_INITRAMFS, OFFSHOOT_TEST_ROOT"]
fn without_a_network_there_is_loopback_alone() {
    let Some(images) = images("OFFSHOOT_TEST_ROOT") else {
        return;
    };
    let mut machine = Machine::boot(&images);
    run(async {
        let client = machine.connect().await;
        client.configure(configuration()).await.unwrap();
        let seen =
            "ls /sys/class/net; grep virtio_net /proc/modules; grep 'every start' /etc/resolv.conf; true";
        assert_eq!(exec(&client, shell(seen)).await.out, "lo\n");
        assert!(client.shutdown(Duration::from_secs(5)).await.unwrap());
    });
    machine.wait_for_power_off();
}

#[test]
#[ignore = "boots a VM: set OFFSHOOT_TEST_KERNEL, OFFSHOOT_TEST_INITRAMFS, OFFSHOOT_TEST_ROOT"]
fn a_device_that_is_not_there_is_named() {
    let Some(images) = images("OFFSHOOT_TEST_ROOT") else {
        return;
    };
    let machine = Machine::boot(&images);
    run(async {
        let client = machine.connect().await;
        let error = client.configure(on_a_network()).await.unwrap_err();
        let said = format!("{error:?}");
        assert!(said.contains("the network device 02:00:0a:63:07:05"), "{said}");
    });
}

#[test]
#[ignore = "boots a VM: set OFFSHOOT_TEST_KERNEL, OFFSHOOT_TEST_INITRAMFS, OFFSHOOT_TEST_ROOT"]
fn openssh_comes_in_over_the_channel() {
    let Some(images) = images("OFFSHOOT_TEST_ROOT") else {
        return;
    };
    let mut machine = Machine::boot(&images);
    let folder = tempfile::tempdir().unwrap();
    let (host, user) = (make_key(folder.path(), "host"), make_key(folder.path(), "user"));
    let read = |path: &Path| std::fs::read_to_string(path).unwrap();
    run(async {
        let client = machine.connect().await;
        let ssh = v1::SshServer {
            host_key: read(&host),
            port: 22,
            ..v1::SshServer::default()
        };
        let request = v1::ConfigureRequest {
            ssh: Some(ssh),
            ..configuration()
        };
        client.configure(request).await.unwrap();
        let port = ssh_port(&client, read(&user.with_extension("pub"))).await;
        std::fs::write(
            folder.path().join("known_hosts"),
            format!("vm {}", read(&host.with_extension("pub"))),
        )
        .unwrap();
        let command = |program: &str| {
            let mut command = tokio::process::Command::new(program);
            command
                .args([
                    "-F",
                    "/dev/null",
                    "-o",
                    "BatchMode=yes",
                    "-o",
                    "HostKeyAlias=vm",
                    "-o",
                ])
                .arg(format!(
                    "UserKnownHostsFile={}",
                    folder.path().join("known_hosts").display()
                ))
                .args(["-o", &format!("Port={port}"), "-i"])
                .arg(&user)
                .env_remove("SSH_AUTH_SOCK")
                .stdin(Stdio::null())
                .kill_on_drop(true);
            command
        };
        let ssh = async |words: &[&str]| {
            let output = command("ssh")
                .arg("root@127.0.0.1")
                .args(words)
                .output()
                .await
                .unwrap();
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            (output.status.code(), text(&output.stdout), text(&output.stderr))
        };
        let first = ssh(&["echo out; echo err >&2; hostname; exit 7"]).await;
        assert_eq!(first, (Some(7), "out\npebble\n".into(), "err\n".into()));
        assert!(ssh(&["-tt", "tty"]).await.1.starts_with("/dev/pts/"));
        let mut times: Vec<Duration> = Vec::new();
        for _ in 0..11 {
            let start = Instant::now();
            assert_eq!(ssh(&["true"]).await.0, Some(0));
            times.push(start.elapsed());
        }
        times.sort();
        machine.log(&format!("a command over SSH: {:?} (median of 11)", times[5]));
        // The port on the guest's own addresses, through itself.
        let banner = command("ssh")
            .args(["-W", "127.0.0.1:22", "root@127.0.0.1"])
            .stdin(Stdio::piped())
            .output();
        let banner = String::from_utf8_lossy(&banner.await.unwrap().stdout).into_owned();
        assert!(banner.starts_with("SSH-2.0-Offshoot"), "{banner}");
        // Files, as somebody else.
        let large: Vec<u8> = (0..5_000_000_u32).flat_map(u32::to_le_bytes).collect();
        let (there, back) = (folder.path().join("there"), folder.path().join("back"));
        std::fs::write(&there, &large).unwrap();
        let start = Instant::now();
        for (from, to) in [
            (there.to_str().unwrap(), "www-data@127.0.0.1:/tmp/there"),
            ("www-data@127.0.0.1:/tmp/there", back.to_str().unwrap()),
        ] {
            let output = command("scp").args([from, to]).output().await.unwrap();
            assert!(output.status.success(), "{output:?}");
        }
        machine.log(&format!("20 MB there and back: {:?}", start.elapsed()));
        assert!(std::fs::read(back).unwrap() == large);
        assert_eq!(out(&client, "stat -c %U /tmp/there").await, "www-data\n");
        // An open session and an open forward hold nothing up at the end.
        let mut counts = client.sessions().await.unwrap();
        let mut held = command("ssh");
        held.args(["-A", "-R", "/tmp/r.sock:/nowhere", "root@127.0.0.1", "sleep 1000"]);
        let mut held = held.spawn().unwrap();
        while counts.next().await.unwrap().unwrap().ssh == 0 {}
        out(&client, "until [ -S /tmp/r.sock ]; do sleep 0.1; done").await;
        assert!(
            client.shutdown(Duration::from_millis(500)).await.unwrap(),
            "not clean: {}",
            machine.console()
        );
        held.wait().await.unwrap();
    });
    machine.wait_for_power_off();
    machine.check_overlay();
}
