//! Real clients fetch from real binary caches through Muster: nginx over a folder that real Nix wrote, the folder
//! itself, another Muster; and what breaks is made good by the next holder.

mod cache_server;
mod rig;

use std::thread;
use std::time::Duration;

use rig::process::Process;
use rig::{Lab, Line, Machine, Muster, Nix, eventually};
use rustix::process::Signal;

use cache_server::Authority;

const COMPRESSIONS: [&str; 6] = ["xz", "zstd", "bzip2", "gzip", "br", "none"];

/// A machine with Debian's nginx, whatever Nix is under test elsewhere.
fn store(lab: &Lab) -> Machine {
    lab.machine("store", Nix::named("2.8"))
}

fn nginx(store: &Machine) -> Process {
    store.nginx(80, NGINX)
}

/// Writes closures into `/srv/cache/<compression>`.
fn copy(store: &Machine, compression: &str, paths: &[String]) {
    let options = format!("compression={compression}");
    store.copy_to(&format!("/srv/cache/{compression}"), &options, paths);
}

fn fetch(client: &Machine, store: &Machine, path: &str, muster: &Muster<'_>) {
    let got = client.realise(path).ok();
    assert_eq!(got.built(), 0, "{path}: {got}\n{}", muster.log());
    assert_eq!(client.nar_hash(path), store.nar_hash(path), "{path}");
    assert_eq!(client.closure(path), store.closure(path), "{path}");
}

#[test]
fn a_cache_of_every_compression_is_an_upstream() {
    let lab = Lab::new();
    let store = store(&lab);
    let key = store.signs_as("store-1");
    let mut paths: Vec<_> = ["odd", "selfReference", "soft"]
        .iter()
        .map(|attr| store.build_one(attr, ""))
        .collect();
    paths.push(store.build_one("big", "--arg sizeMB 9"));
    paths.push(store.build_one("dag", "--arg n 40"));
    for compression in COMPRESSIONS {
        copy(&store, compression, &paths);
    }
    let _nginx = nginx(&store);
    let client = lab.client(&[]);
    for compression in COMPRESSIONS {
        for upstream in [
            format!("http://store/{compression}?trusted-public-keys={key}"),
            format!("http://store/{compression}?trusted=1"),
        ] {
            let muster = Muster::serve(&client, &format!("--upstream '{upstream}'"));
            client.substitutes_from(&muster);
            client.fresh_store();
            for path in &paths {
                fetch(&client, &store, path, &muster);
            }
            assert!(!muster.log().contains("refused"), "{}", muster.log());
        }
    }
}

#[test]
fn a_cache_that_is_not_trusted_is_not_served_and_floods_no_log() {
    let lab = Lab::new();
    let store = store(&lab);
    store.signs_as("store-1");
    let path = store.build_one("dag", "--arg n 20");
    copy(&store, "zstd", std::slice::from_ref(&path));
    let _nginx = nginx(&store);
    let client = lab.client(&[]);
    let other = "other-1:lzZbJO7cF6BNjZ5MMOyMyF2Y5PAryxIWzx0p/mo8Xbw=";
    let upstream = format!("http://store/zstd?trusted-public-keys={other}");
    let mut muster = Muster::serve(&client, &format!("--upstream '{upstream}'"));
    client.substitutes_from(&muster);
    client.realise(&path).failed();
    for path in store.closure(&path) {
        assert_eq!(muster.narinfo(&path).status, 404);
    }
    let told = muster.log().matches("path info refused").count();
    assert_eq!(told, 1, "{}", muster.log());
}

#[test]
fn a_folder_is_an_upstream() {
    let lab = Lab::new();
    let store = store(&lab);
    let key = store.signs_as("store-1");
    let path = store.build_one("dag", "--arg n 40");
    let drv = store.instantiate("chatty", "").remove(0);
    let chatty = store.build_one("chatty", "");
    let to = "file:///lab/cache?compression=zstd";
    store
        .run(&format!("nix copy --to '{to}' {path} {chatty}"))
        .ok();
    store
        .run(&format!("nix store copy-log --to '{to}' {drv}"))
        .ok();
    let client = lab.client(&[]);
    let upstream = format!("file:///lab/cache?trusted-public-keys={key}");
    let mut muster = Muster::serve(&client, &format!("--upstream '{upstream}'"));
    client.substitutes_from(&muster);
    fetch(&client, &store, &path, &muster);
    let name = drv.trim_start_matches("/nix/store/");
    let log = muster.get(&format!("/log/{name}"));
    assert!(
        log.status == 200 && log.text().contains("line 2000 of"),
        "{}",
        log.status
    );

    // A path that is taken out of the folder is gone; a folder that is taken away is not believed.
    let absent = muster.get("/00000000000000000000000000000001.narinfo");
    assert_eq!(absent.status, 404);
    client.run("mv /lab/cache /lab/elsewhere").ok();
    assert_eq!(
        muster.narinfo(&path).status,
        200,
        "known, though its holder is away"
    );
    client.run("mv /lab/elsewhere /lab/cache").ok();
}

#[test]
fn muster_is_an_upstream_of_muster() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let path = b1.build_one("dag", "--arg n 40");
    let big = b1.build_one("big", "--arg sizeMB 9");
    for compression in ["none", "zstd", "xz"] {
        let far = Muster::serve(
            &b1,
            &format!("--listen 0.0.0.0:5000 --compression {compression}"),
        );
        let client = lab.machine("client", Nix::under_test());
        let upstream = format!("http://b1:5000?trusted-public-keys={}", far.key());
        let mut near = Muster::serve(&client, &format!("--no-machines --upstream '{upstream}'"));
        client.substitutes_from(&near);
        fetch(&client, &b1, &path, &near);
        fetch(&client, &b1, &big, &near);
        // Both have signed.
        let narinfo = near.narinfo(&path).text();
        let signed = |name: &str| {
            narinfo
                .lines()
                .any(|l| l.starts_with(&format!("Sig: {name}-muster-1:")))
        };
        assert!(signed("b1") && signed("client"), "{narinfo}");
    }
}

#[test]
fn credentials_from_files_open_a_cache_and_leave_no_trace() {
    let lab = Lab::new();
    let store = store(&lab);
    let key = store.signs_as("store-1");
    let path = store.build_one("tiny", "");
    copy(&store, "zstd", std::slice::from_ref(&path));
    store.write("/etc/nginx-users", "me:{PLAIN}hunter2\n");
    let _nginx = nginx(&store);
    let client = lab.client(&[]);
    client.write("/etc/credentials", "me:hunter2\n");
    client.write("/etc/token", "hunter2-token\n");
    client.write("/etc/netrc", "machine store login me password hunter2\n");
    for (folder, credentials, status) in [
        ("private", "credentials-file = \"/etc/credentials\"", 200),
        ("private", "netrc-file = \"/etc/netrc\"", 200),
        ("private", "name = \"without\"", 404),
        ("token", "credentials-file = \"/etc/token\"", 200),
        ("token", "credentials-file = \"/etc/credentials\"", 404),
    ] {
        client.wipe_kept();
        let table = format!(
            "[[upstreams]]\nuri = \"http://store/{folder}/zstd\"\ntrusted-public-keys = [\"{key}\"]\n{credentials}\n"
        );
        client.write("/etc/muster.toml", &table);
        let mut muster = Muster::serve(&client, "--config /etc/muster.toml");
        assert_eq!(
            muster.narinfo(&path).status,
            status,
            "{credentials}\n{}",
            muster.log()
        );
        if status == 200 {
            client.fresh_store();
            client.substitutes_from(&muster);
            fetch(&client, &store, &path, &muster);
        } else {
            assert!(
                eventually(5.0, || muster.log().contains("credentials-file")),
                "{}",
                muster.log()
            );
        }
        assert!(!muster.log().contains("hunter2"), "{}", muster.log());
    }
}

#[test]
fn a_transfer_survives_its_cache_and_its_builder() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let store = store(&lab);
    let key = store.signs_as("store-1");
    let client = lab.client(&["b1"]);
    let mut nginx_runs = nginx(&store);
    for compression in ["none", "zstd"] {
        // Which of the two Muster takes is its own affair, so each dies once.
        for victim in ["b1", "store"] {
            let seed = format!("--arg sizeMB 24 --argstr seed {victim}-{compression}");
            let path = b1.build_one("big", &seed);
            assert_eq!(store.build_one("big", &seed), path);
            copy(&store, compression, std::slice::from_ref(&path));
            b1.behind(Line {
                bytes_per_second: 8_000_000,
                ..Line::default()
            });
            let upstream = format!("http://store/slow/{compression}?trusted-public-keys={key}");
            let muster = Muster::serve(&client, &format!("--upstream '{upstream}'"));
            client.substitutes_from(&muster);
            let got = thread::scope(|scope| {
                let transfer = scope.spawn(|| client.realise(&path));
                thread::sleep(Duration::from_millis(1500));
                match victim {
                    "b1" => b1.dead(),
                    _ => store.signal("nginx", Signal::KILL),
                }
                transfer.join().expect("the transfer ends")
            });
            let got = got.ok();
            let counted = (got.built(), got.copied());
            assert_eq!(
                counted,
                (0, 1),
                "{victim}, {compression}: {got}\n{}",
                muster.log()
            );
            assert_eq!(client.nar_hash(&path), store.nar_hash(&path));
            assert!(got.secs > 1.5, "too quick to have been interrupted: {got}");
            b1.heal();
            if victim == "store" {
                _ = nginx_runs.wait(5.0);
                nginx_runs = nginx(&store);
            }
        }
    }
}

#[test]
fn what_nix_and_people_write_beside_narinfos_does_not_disturb() {
    let lab = Lab::new();
    let store = store(&lab);
    let key = store.signs_as("store-1");
    let paths = [store.build_one("odd", ""), store.build_one("soft", "")];
    let options =
        "compression=xz&write-nar-listing=true&index-debug-info=true&parallel-compression=true";
    store.copy_to("/srv/cache/full", options, &paths);
    store.copy_to("/lab/full", options, &paths);
    let listing = store.run("ls /srv/cache/full/*.ls").ok();
    assert!(listing.out.lines().count() >= 2, "{listing}");
    for folder in ["/srv/cache/full", "/lab/full"] {
        let line = format!(
            "cd {folder} && mkdir -p debuginfo log && echo x > README && echo y > nar/notes.txt"
        );
        store.run(&line).ok();
    }
    let _nginx = nginx(&store);
    let client = lab.client(&[]);
    for place in ["http://store/full", "file:///lab/full"] {
        let upstream = format!("{place}?trusted-public-keys={key}");
        let muster = Muster::serve(&client, &format!("--upstream '{upstream}'"));
        client.substitutes_from(&muster);
        client.fresh_store();
        for path in &paths {
            fetch(&client, &store, path, &muster);
        }
        muster.stop();
        client.wipe_kept();
    }
}

#[test]
fn content_addressed_derivations_are_found_in_a_cache() {
    let lab = Lab::new();
    let store = store(&lab);
    let key = store.signs_as("store-1");
    let path = store.build_one("floatingUser", "");
    for folder in ["/srv/cache/ca", "/lab/ca"] {
        let to = format!("file://{folder}?compression=zstd");
        store
            .run(&format!(
                "nix copy --to '{to}' --file /lab/workload.nix floatingUser floatingBase"
            ))
            .ok();
        let known = store.run(&format!("ls {folder}/realisations/*.doi")).ok();
        assert!(known.out.lines().count() >= 2, "{known}");
    }
    let _nginx = nginx(&store);
    let client = lab.client(&[]);
    for place in ["http://store/ca", "file:///lab/ca"] {
        for trust in [format!("trusted-public-keys={key}"), "trusted=1".to_owned()] {
            let upstream = format!("{place}?{trust}");
            let muster = Muster::serve(&client, &format!("--upstream '{upstream}'"));
            client.substitutes_from(&muster);
            client.fresh_store();
            let got = client.realise_attr("floatingUser", "").ok();
            assert_eq!(got.built(), 0, "{upstream}: {got}\n{}", muster.log());
            assert_eq!(got.out.trim(), path);
            muster.stop();
            client.wipe_kept();
        }
    }
}

#[test]
fn a_cache_behind_tls_is_judged_by_the_systems_own_certificates() {
    let lab = Lab::new();
    let store = store(&lab);
    let key = store.signs_as("store-1");
    let paths = [
        store.build_one("dag", "--arg n 20"),
        store.build_one("big", "--arg sizeMB 9"),
    ];
    copy(&store, "zstd", &paths);
    let authority = Authority::new();
    let (certificate, secret) = authority.certify("store", 2100);
    store.write("/etc/tls.crt", &certificate.pem());
    store.write("/etc/tls.key", &secret.serialize_pem());
    let _nginx = store.nginx(
        443,
        "server {\nlisten 443 ssl http2;\nroot /srv/cache;\n\
         ssl_certificate /etc/tls.crt;\nssl_certificate_key /etc/tls.key;\n}\n",
    );
    let roots = std::fs::read_to_string(authority.roots()).expect("read a certificate");
    let client = lab.client(&[]);
    client.write("/etc/own-roots.pem", &roots);
    let upstream = format!("https://store/zstd?trusted-public-keys={key}");
    let args = format!("--upstream '{upstream}'");
    for (system, environment) in [
        (roots.as_str(), ""),
        ("", "SSL_CERT_FILE=/etc/own-roots.pem"),
        ("", "NIX_SSL_CERT_FILE=/etc/own-roots.pem"),
    ] {
        client
            .run("rm -rf /etc/ssl/certs && mkdir -p /etc/ssl/certs")
            .ok();
        client.write("/etc/ssl/certs/ca-certificates.crt", system);
        client.wipe_kept();
        client.fresh_store();
        let muster = Muster::start_with(&client, environment, &args);
        muster.await_log(15.0, "upstream https://store/zstd: well");
        assert!(muster.log().contains("HTTP/2"), "{}", muster.log());
        client.substitutes_from(&muster);
        for path in &paths {
            fetch(&client, &store, path, &muster);
        }
        // Looked at beside the running one.
        client.write(
            "/etc/muster.toml",
            &format!("machines = false\nupstreams = [\"{upstream}\"]\n"),
        );
        let line = format!(
            "env {environment} muster check --config /etc/muster.toml --only '^https://store'"
        );
        let check = client.run(&line);
        assert_eq!(check.rc, 0, "{check}");
        assert!(check.out.contains("https://store/zstd"), "{check}");
        muster.stop();
    }
}

#[test]
fn plain_http_needs_no_certificates() {
    let lab = Lab::new();
    let store = store(&lab);
    let key = store.signs_as("store-1");
    let path = store.build_one("dag", "--arg n 20");
    copy(&store, "zstd", std::slice::from_ref(&path));
    let _nginx = nginx(&store);
    let client = lab.client(&[]);
    client
        .run("rm -rf /etc/ssl/certs && mkdir -p /etc/ssl/certs")
        .ok();
    let args = [
        "http://store/zstd",
        "http://store/slow/zstd",
        "https://store/zstd",
    ]
    .map(|cache| format!("--upstream '{cache}?trusted-public-keys={key}'"))
    .join(" ");
    let muster = Muster::serve(&client, &args);
    client.substitutes_from(&muster);
    fetch(&client, &store, &path, &muster);
    let status = client.run(&format!("muster status --url {}", muster.url()));
    assert!(status.out.contains("http://store/zstd"), "{status}");
    // Said once, and a cache that needs them is left out, which the state shows.
    assert!(
        status.out.contains("left out") && status.out.contains("https://store/zstd"),
        "{status}"
    );
    let told = muster.log().matches("no certificates").count();
    assert_eq!(told, 1, "{}", muster.log());
    assert!(
        muster.log().contains("upstream left out"),
        "{}",
        muster.log()
    );
}

const NGINX: &str = "\
server {
    listen 80;
    root /srv/cache;
    location /slow/ {
        alias /srv/cache/;
        limit_rate 8m;
    }
    location /token/ {
        alias /srv/cache/;
        if ($http_authorization != 'Bearer hunter2-token') {
            return 401;
        }
    }
    location /private/ {
        alias /srv/cache/;
        auth_basic private;
        auth_basic_user_file /etc/nginx-users;
    }
}
";
