//! Store URIs as people write them, and what becomes of them.

use super::*;

#[test]
fn every_kind_is_read_and_written() {
    for (text, written, id) in [
        ("daemon", "daemon", "daemon"),
        ("auto", "daemon", "daemon"),
        ("unix://", "daemon", "daemon"),
        (
            "unix:///nix/var/nix/daemon-socket/socket",
            "unix:///nix/var/nix/daemon-socket/socket",
            "daemon",
        ),
        ("unix:///run/x", "unix:///run/x", "unix:///run/x"),
        (
            "unix:///run/a%20b",
            "unix:///run/a%20b",
            "unix:///run/a%20b",
        ),
        ("local", "local", "daemon"),
        ("local?root=/mnt", "/mnt", "/mnt"),
        ("/mnt", "/mnt", "/mnt"),
        ("local:///mnt", "/mnt", "/mnt"),
        (
            "file:///var/cache",
            "file:///var/cache",
            "file:///var/cache",
        ),
        (
            "https://h.example/a/",
            "https://h.example/a",
            "https://h.example/a",
        ),
        (
            "http://[::1]:5000",
            "http://[::1]:5000",
            "http://[::1]:5000",
        ),
        (
            "ssh-ng://nix@h:22",
            "ssh-ng://nix@h:22",
            "ssh \"nix\" h 22 \"\"",
        ),
        ("mounted-ssh-ng://h", "ssh-ng://h", "ssh \"\" h 0 \"\""),
        ("ssh://H/", "ssh://H", "ssh \"\" h 0 \"\""),
        ("h", "ssh://h", "ssh \"\" h 0 \"\""),
        ("nix@h:22", "ssh://nix@h:22", "ssh \"nix\" h 22 \"\""),
        (
            "h?compress=true",
            "ssh://h?compress=true",
            "ssh \"\" h 0 \"\"",
        ),
        ("ssh://::1", "ssh://[::1]", "ssh \"\" [::1] 0 \"\""),
        ("ssh://localhost", "daemon", "daemon"),
        ("localhost", "daemon", "daemon"),
        (
            "ssh://u@localhost",
            "ssh://u@localhost",
            "ssh \"u\" localhost 0 \"\"",
        ),
        (
            "ssh-ng://localhost?remote-store=/x",
            "ssh-ng://localhost?remote-store=/x",
            "ssh \"\" localhost 0 \"/x\"",
        ),
    ] {
        let uri = StoreUri::parse(text).unwrap();
        assert_eq!(uri.to_string(), written, "{text}");
        assert_eq!(uri.id().to_string(), id, "{text}");
        fuzz(text.as_bytes());
    }
}

#[test]
fn what_cannot_be_asked_is_told_from_what_is_malformed() {
    for (text, scheme) in [("s3://b", "s3"), ("SSH://h", "SSH"), ("dummy://", "dummy")] {
        let uri = StoreUri::parse(text).unwrap();
        assert_eq!(*uri.kind(), StoreKind::Unsupported(scheme.to_owned()));
    }
    for (text, words) in [
        ("", "empty"),
        ("ssh://", "empty"),
        ("ssh://-oProxyCommand=x", "starts with '-'"),
        ("ssh://h/store", "remote-store"),
        ("u@h/x", "absolute"),
        ("./store", "absolute"),
        ("unix://run/x", "absolute"),
        ("local?root=mnt", "absolute"),
        ("http://u@h", "user"),
        ("http://u:secret@h", "password"),
        ("http://h/a b", "percent"),
        ("h?compress=maybe", "compress"),
        ("h?remote-store=%zz", "percent"),
        ("h?remote-store=a%0Ab", "control"),
        ("h?max-connections=many", "max-connections"),
        ("h?trusted-public-keys=x", "colon"),
        ("h?base64-ssh-public-host-key=!", "base64"),
    ] {
        let error = StoreUri::parse(text).unwrap_err().to_string();
        assert!(error.contains(words), "{text}: {error}");
        assert!(!error.contains("secret"), "{text}: {error}");
    }
}

#[test]
fn parameters_have_types() {
    let uri = StoreUri::parse(
        "ssh-ng://h?ssh-key=/k%20ey&compress=1&remote-program=sudo%20nix-daemon&\
         remote-store=/x&max-connections=0&trusted=no&priority=-5&dropped&\
         ssh-key=/other&base64-ssh-public-host-key=c3NoLXJzYSBBQUFB&remote-progam=x&\
         trusted-public-keys=test-1:lzZbJO7cF6BNjZ5MMOyMyF2Y5PAryxIWzx0p/mo8Xbw=",
    )
    .unwrap();
    let settings = uri.settings();
    assert_eq!(settings.ssh_key.as_deref(), Some("/k ey"));
    assert_eq!(settings.host_key.as_ref().unwrap().as_str(), "ssh-rsa AAAA");
    assert!(settings.compress);
    assert_eq!(settings.remote_program, ["sudo", "nix-daemon"]);
    assert_eq!(settings.remote_store.as_deref(), Some("/x"));
    assert_eq!(settings.max_connections.unwrap().get(), 1);
    assert_eq!(settings.trusted, Some(false));
    assert_eq!(settings.trusted_public_keys.len(), 1);
    assert_eq!(settings.priority, Some(-5));
    assert_eq!(uri.unknown_params().collect::<Vec<_>>(), ["remote-progam"]);
    assert_eq!(uri.name(), "ssh-ng://h?remote-store=/x");
    assert_eq!(uri.param("dropped"), None);
}

#[test]
fn parameters_from_elsewhere_win() {
    let uri = StoreUri::parse_with("h?ssh-key=/a&compress=true", &[("ssh-key", "/b")]);
    let uri = uri.unwrap();
    assert_eq!(uri.settings().ssh_key.as_deref(), Some("/b"));
    assert_eq!(uri.to_string(), "ssh://h?ssh-key=/b&compress=true");
}
