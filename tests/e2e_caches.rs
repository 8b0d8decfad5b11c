//! Real clients fetch from real binary caches through Muster: nginx over a folder that real Nix wrote, the folder
//! itself, another Muster; and what breaks is made good by the next holder.

mod rig;

use std::thread;
use std::time::Duration;

use rig::process::Process;
use rig::{Lab, Line, Machine, Muster, Nix, eventually};
use rustix::process::Signal;

const COMPRESSIONS: [&str; 6] = ["xz", "zstd", "bzip2", "gzip", "br", "none"];

/// A machine with Debian's nginx, whatever Nix is under test elsewhere.
fn store(lab: &Lab) -> Machine {
    let store = lab.machine("store", Nix::named("2.8"));
    store.write("/etc/nginx-lab.conf", NGINX);
    store.run("mkdir -p /srv/cache /tmp/nginx").ok();
    store
}

fn nginx(store: &Machine) -> Process {
    let nginx = store.spawn("nginx", "/usr/sbin/nginx -c /etc/nginx-lab.conf");
    store.await_port(80);
    nginx
}

/// Writes closures into `/srv/cache/<compression>`.
fn copy(store: &Machine, compression: &str, paths: &[String]) {
    let to = format!("file:///srv/cache/{compression}?compression={compression}");
    let paths = paths.join("' '");
    store
        .run_for(120.0, &format!("nix copy --to '{to}' '{paths}'"))
        .ok();
    store.run("chmod -R a+rX /srv/cache").ok();
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
    client.write("/etc/netrc", "machine store login me password hunter2\n");
    for (credentials, status) in [
        ("credentials-file = \"/etc/credentials\"", 200),
        ("netrc-file = \"/etc/netrc\"", 200),
        ("name = \"without\"", 404),
    ] {
        let table = format!(
            "[[upstreams]]\nuri = \"http://store/private/zstd\"\ntrusted-public-keys = [\"{key}\"]\n{credentials}\n"
        );
        client.write("/etc/muster.toml", &table);
        let mut muster = Muster::serve(&client, "--config /etc/muster.toml");
        assert_eq!(
            muster.narinfo(&path).status,
            status,
            "{credentials}\n{}",
            muster.log()
        );
        if status != 200 {
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

const NGINX: &str = "\
daemon off;
user root;
worker_processes 1;
error_log /tmp/nginx/error;
pid /tmp/nginx/pid;
events {}
http {
    access_log off;
    client_body_temp_path /tmp/nginx/body;
    proxy_temp_path /tmp/nginx/proxy;
    fastcgi_temp_path /tmp/nginx/fastcgi;
    uwsgi_temp_path /tmp/nginx/uwsgi;
    scgi_temp_path /tmp/nginx/scgi;
    server {
        listen 80;
        root /srv/cache;
        location /slow/ {
            alias /srv/cache/;
            limit_rate 8m;
        }
        location /private/ {
            alias /srv/cache/;
            auth_basic private;
            auth_basic_user_file /etc/nginx-users;
        }
    }
}
";
