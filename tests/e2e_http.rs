//! The HTTP surface over real builders: what clients of all versions ask, and what must be refused.

mod rig;

use rig::muster::narinfo_target;
use rig::{Lab, Muster};

#[test]
fn the_answers_have_the_form_that_clients_need() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1"]);
    let path = b1.build_one("big", "--arg sizeMB 1");
    let mut muster = Muster::serve(&client, "--priority 17");

    let info = muster.get("/nix-cache-info");
    assert_eq!(info.status, 200);
    for line in ["StoreDir: /nix/store", "Priority: 17", "WantMassQuery: 1"] {
        assert!(info.text().lines().any(|l| l == line), "{}", info.text());
    }
    let narinfo = muster.narinfo(&path);
    assert_eq!(
        (narinfo.status, narinfo.header("content-type")),
        (200, Some("text/x-nix-narinfo"))
    );
    let field = |name| {
        narinfo
            .field(name)
            .unwrap_or_else(|| panic!("no {name} in\n{}", narinfo.text()))
    };
    assert_eq!(field("StorePath"), path);
    assert_eq!(field("Compression"), "none", "only loopback is listened on");
    assert!(field("Sig").starts_with("client-muster-1:"));
    let head = muster.request("HEAD", &narinfo_target(&path), &[]);
    assert_eq!((head.status, head.body.len()), (200, 0));

    let url = format!("/{}", field("URL"));
    let nar = muster.get(&url);
    let size: usize = field("NarSize").parse().expect("NarSize is a number");
    assert!(
        nar.status == 200 && nar.complete && nar.body.len() == size,
        "{} of {size}",
        nar.body.len()
    );
    assert_eq!(nar.header("accept-ranges"), Some("bytes"));
    let part = muster.request("GET", &url, &[("Range", "bytes=1000000-")]);
    assert_eq!(part.status, 206);
    assert_eq!(Some(part.body.as_slice()), nar.body.get(1_000_000..));
    let range = format!("bytes 1000000-{}/{size}", size - 1);
    assert_eq!(part.header("content-range"), Some(range.as_str()));

    for target in ["/healthz", "/public-key"] {
        assert_eq!(muster.get(target).status, 200, "{target}");
    }
    assert!(muster.get("/public-key").text().contains(&muster.key()));
}

#[test]
fn no_question_is_answered_with_what_makes_clients_abort() {
    let lab = Lab::new();
    let client = lab.client(&[]);
    let mut muster = Muster::serve(&client, "");
    let absent = [
        "/00000000000000000000000000000000.narinfo",
        "/short.narinfo",
        "/eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee.narinfo",
        "/%ff.narinfo",
        "/../../etc/passwd",
        "/nar/../../etc/passwd",
        "/nar/none.nar",
        "/nar/",
        "/log/none.drv",
        "/log/00000000000000000000000000000000-x.drv",
        "/realisations/sha256:00!out.doi",
        "/realisations/sha256:0000000000000000000000000000000000000000000000000000000000000000%21out.doi",
        "/build-trace-v2/00000000000000000000000000000000-x.drv/out.doi",
        "/00000000000000000000000000000000.ls",
        "/",
        "/favicon.ico",
    ];
    for target in absent {
        let answer = muster.get(target);
        let kind = if target == "/" {
            [404, 200]
        } else {
            [404, 404]
        };
        assert!(kind.contains(&answer.status), "{target}: {}", answer.status);
    }
    for target in [
        "/nix-cache-info",
        "/00000000000000000000000000000000.narinfo",
        "/nar/x.nar.xz",
    ] {
        let put = muster.request("PUT", target, &[("Content-Length", "0")]);
        assert_eq!(put.status, 405, "PUT {target}");
    }
    let long = format!("/{}", "a".repeat(100_000));
    let answer = muster.get(&long);
    assert!(
        (400..500).contains(&answer.status) && answer.status != 429,
        "{}",
        answer.status
    );
}

#[test]
fn several_addresses_and_a_unix_socket_are_listened_on() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let path = b1.build_one("tiny", "");
    let proxy = lab.client(&["b1"]);
    let args = "--listen 0.0.0.0:5001 --listen 127.0.0.1:5002 --listen unix:/lab/muster.sock";
    let muster = Muster::serve(&proxy, args);
    proxy.await_port(5001);
    proxy.await_port(5002);
    let answer = rig::http::request(
        &lab.share().join("muster.sock"),
        "GET",
        "/nix-cache-info",
        &[],
    );
    assert_eq!(answer.status, 200);

    let other = lab.machine("other", rig::Nix::under_test());
    let lines = format!(
        "extra-substituters = http://client:5001\nextra-trusted-public-keys = {}",
        muster.key()
    );
    other.configure(&lines);
    let got = other.realise(&path).ok();
    assert_eq!((got.built(), got.copied()), (0, 1), "{got}");
    let sig = rig::http::request(
        &lab.share().join("muster.sock"),
        "GET",
        &narinfo_target(&path),
        &[],
    );
    assert!(
        sig.text().contains("Compression: zstd"),
        "others than loopback listen: {}",
        sig.text()
    );
}
