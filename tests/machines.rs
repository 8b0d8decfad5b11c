//! The machines file against what Nix was seen to read, and against bytes that nobody would write.

use muster::nix::machines::{Column, Machine, Machines, MachinesError, Quirk, Systems};
use muster::nix::store_uri::StoreKind;
use proptest::prelude::*;

fn read(text: &str) -> Machines {
    Machines::parse(text, "/m", &mut |path| match path {
        "/file" => Ok(Some("# included\nh8\nh7 - - x\n".to_owned())),
        "/deep" => Ok(Some("@/file".to_owned())),
        "/loop" => Ok(Some("h6\n@/m".to_owned())),
        "/secret" => Err("permission denied".to_owned()),
        path if path.starts_with("/down/") => Ok(Some(format!("@{path}x"))),
        "/many" => Ok(Some("@/file\n".repeat(200))),
        _ => Ok(None),
    })
}

/// URI, systems, jobs, speed, supported and mandatory features of each machine.
fn summary(machines: &[Machine]) -> Vec<String> {
    let list = |set: &std::collections::BTreeSet<String>| {
        set.iter().cloned().collect::<Vec<_>>().join(",")
    };
    let one = |m: &Machine| {
        let systems = match &m.systems {
            Systems::Local => "local".to_owned(),
            Systems::Listed(systems) => format!("[{}]", list(systems)),
        };
        let (supported, mandatory) = (list(&m.supported), list(&m.mandatory));
        format!(
            "{} {systems} {} {} [{supported}] [{mandatory}]",
            m.uri, m.max_jobs, m.speed
        )
    };
    machines.iter().map(one).collect()
}

/// What 2.8 and later versions were seen to read; the last column is what differs between them.
#[test]
fn lines_are_read_as_by_nix() {
    const KEY: &str = "c3NoLWVkMjU1MTkgQUFBQQ==";
    let full = format!("nix@h1:2222 x86_64-linux,i686-linux /k 8 3 kvm,big-parallel kvm {KEY}");
    let key = format!("base64-ssh-public-host-key={KEY}");
    let full_read = format!(
        "ssh://nix@h1:2222?ssh-key=/k&{key} [i686-linux,x86_64-linux] 8 3 [big-parallel,kvm] [kvm]"
    );
    let h1 = "ssh://h1 local 1 1 [] []";
    let h2 = "ssh://h2 local 1 1 [] []";
    let ssk = |systems| format!("ssh://h1?base64-ssh-public-host-key=c3Nr {systems} 1 1 [] []");
    let vectors: Vec<(&str, Vec<&str>, Option<Quirk>)> = vec![
        ("h1", vec![h1], None),
        ("h1 - - - - - - -", vec![h1], None),
        (&full, vec![&full_read], Some(Quirk::Port(2222))),
        ("h1;h2", vec![h1, h2], None),
        ("h1 ; h2;", vec![h1, h2], None),
        (
            "# c ; h9\nh1",
            vec![h1],
            Some(Quirk::EntryInComment("h9".to_owned())),
        ),
        (
            "h1 a # note ; still",
            vec!["ssh://h1 [a] 1 1 [] []"],
            Some(Quirk::EntryInComment("still".to_owned())),
        ),
        ("  \nh1", vec![h1], Some(Quirk::BlankEntry)),
        ("\t# c\nh1", vec![h1], Some(Quirk::BlankEntry)),
        (" @/none\nh1", vec![h1], Some(Quirk::IndentedInclude)),
        ("@ /none\nh1", vec![h1], None),
        ("@/nonexistent;h1", vec![h1], None),
        ("h1#c", vec![h1], None),
        ("h1 - - 0", vec!["ssh://h1 local 0 1 [] []"], None),
        ("h1 - - +2", vec!["ssh://h1 local 2 1 [] []"], None),
        ("h1 - - 007", vec!["ssh://h1 local 7 1 [] []"], None),
        (
            "h1 - - 1 1.5",
            vec!["ssh://h1 local 1 1.5 [] []"],
            Some(Quirk::FractionalSpeed("1.5".to_owned())),
        ),
        ("h1 - - 1 0", vec![h1], None),
        (
            "h1 a,,b - - - f,,g",
            vec!["ssh://h1 [a,b] 1 1 [f,g] []"],
            None,
        ),
        ("h1 , - 1", vec!["ssh://h1 [] 1 1 [] []"], None),
        (
            "h1?compress=true",
            vec!["ssh://h1?compress=true local 1 1 [] []"],
            None,
        ),
        ("h1 a\r\nh2\r\n", vec!["ssh://h1 [a] 1 1 [] []", h2], None),
        ("h1\ta\t-\t2", vec!["ssh://h1 [a] 2 1 [] []"], None),
        (
            "ssh-ng://[::1]:22",
            vec!["ssh-ng://[::1]:22 local 1 1 [] []"],
            Some(Quirk::Port(22)),
        ),
        (
            "ssh://::1",
            vec!["ssh://[::1] local 1 1 [] []"],
            Some(Quirk::BareIpv6),
        ),
        ("localhost", vec!["daemon local 1 1 [] []"], None),
        (
            "h1 - k",
            vec!["ssh://h1?ssh-key=k local 1 1 [] []"],
            Some(Quirk::RelativeSshKey("k".to_owned())),
        ),
        (
            "h1?ssh-key=/a - /b",
            vec!["ssh://h1?ssh-key=/b local 1 1 [] []"],
            None,
        ),
        (
            "daemon builtin /k",
            vec!["daemon [builtin] 1 1 [] []"],
            None,
        ),
        ("", vec![], None),
        ("\n\n;;\n", vec![], None),
    ];
    for (text, machines, quirk) in vectors {
        let found = read(text);
        assert_eq!(found.errors, [], "{text:?}");
        assert_eq!(summary(&found.machines), machines, "{text:?}");
        let quirks = found.warnings.into_iter().map(|w| w.quirk);
        assert_eq!(
            quirks.collect::<Vec<_>>(),
            Vec::from_iter(quirk),
            "{text:?}"
        );
    }
    // What the host key decodes to is text, but no key: ssh is left to refuse it.
    for (text, systems) in [
        ("h1 - - 1 1 - - c3Nr=x", "local"),
        ("h1 a - 1 1 - - c3Nr extra", "[a]"),
    ] {
        let found = read(text);
        let read = ssk(systems).replace(
            "c3Nr ",
            if systems == "local" {
                "c3Nr=x "
            } else {
                "c3Nr "
            },
        );
        assert_eq!(summary(&found.machines), [read]);
        assert_eq!(found.warnings[0].quirk, Quirk::HostKeyForm);
    }
}

#[test]
fn a_bad_line_is_named_by_line_character_and_column() {
    for (text, place, column, words) in [
        ("- a", "1:1", Column::Uri, "cannot be left out"),
        ("h0\nh1 - - -1", "2:8", Column::MaxJobs, "\"-1\""),
        ("h1 - - 1.5", "1:8", Column::MaxJobs, "\"1.5\""),
        ("h1 - - 0x10", "1:8", Column::MaxJobs, "\"0x10\""),
        (
            "h1 - - 99999999999",
            "1:8",
            Column::MaxJobs,
            "\"99999999999\"",
        ),
        ("h1 - - 1 -1", "1:10", Column::Speed, "\"-1\""),
        ("h1 - - 1 nan", "1:10", Column::Speed, "\"nan\""),
        ("h1 - - 1 inf", "1:10", Column::Speed, "\"inf\""),
        ("h1 - - 1 1 - - !!!", "1:16", Column::HostKey, "base64"),
        (
            "h1 - - 1 1 - - YQpi",
            "1:16",
            Column::HostKey,
            "more than one line",
        ),
        (
            " h0 ;\tssh-ng://-oProxyCommand=x",
            "1:7",
            Column::Uri,
            "'-'",
        ),
        ("ä;u@h1/x", "1:3", Column::Uri, "absolute"),
        ("SSH://h", "1:1", Column::Uri, "\"SSH\""),
        ("s3://bucket", "1:1", Column::Uri, "\"s3\""),
        ("h1\u{b}", "1:1", Column::Uri, "control"),
    ] {
        let found = read(text);
        let [error @ MachinesError::Column { column: actual, .. }] = &found.errors[..] else {
            panic!("{text:?}: {:?}", found.errors);
        };
        let shown = error.to_string();
        let start = format!("/m:{place}: column {} ({column}): ", column as usize);
        assert!(
            shown.starts_with(&start) && shown.contains(words),
            "{text:?}: {shown}"
        );
        assert_eq!(*actual, column, "{text:?}");
        assert!(read(text).strict().is_err());
    }
}

#[test]
fn the_rest_of_a_file_with_a_bad_line_is_used() {
    let found = read("h1\nh2 - - x\nh3");
    assert_eq!(found.machines.len(), 2);
    assert_eq!(found.machines[1].place.to_string(), "/m:3:1");
    assert_eq!(found.errors.len(), 1);
}

#[test]
fn includes_are_followed_within_bounds() {
    let found = read("h1\n@/deep\n");
    assert_eq!(
        summary(&found.machines),
        ["ssh://h1 local 1 1 [] []", "ssh://h8 local 1 1 [] []"]
    );
    assert_eq!(found.errors[0].place().to_string(), "/file:3:8");

    for (text, place, words) in [
        ("@/loop", "/loop:2:1", "includes itself"),
        ("h1\n @/secret", "/m:2:2", "permission denied"),
        ("@", "/m:1:1", "no path"),
        ("@/down/", "/down/xxxxxxxxx:1:1", "10 deep"),
        ("@/many", "/many:100:1", "100 includes"),
    ] {
        let found = read(text);
        let shown = found.errors.iter().map(ToString::to_string);
        let shown = shown.filter(|e| !e.contains("/file:")).collect::<Vec<_>>();
        assert!(
            shown[0].starts_with(&format!("{place}: ")) && shown[0].contains(words),
            "{text}: {shown:?}"
        );
    }
    let large = Machines::parse(&"#\n".repeat(600_000), "/m", &mut |_| Ok(None));
    assert_eq!(
        large.errors[0].to_string(),
        "/m:1:1: the file has more than 1 MiB"
    );
}

#[test]
fn lines_of_one_store_are_one_builder() {
    let found = read(
        "ssh-ng://nix@h1 x86_64-linux /a\nh2\nssh://nix@H1 i686-linux,x86_64-linux /b\n\
         ssh-ng://nix@h1:22\nh2?remote-store=/x\nnix@h1 - - 0\n",
    );
    let builders = found.builders();
    let uris: Vec<_> = builders.iter().map(|b| b.uri.name()).collect();
    assert_eq!(
        uris,
        [
            "ssh-ng://nix@h1",
            "ssh://h2",
            "ssh-ng://nix@h1:22",
            "ssh://h2?remote-store=/x"
        ]
    );
    let first = &builders[0];
    assert_eq!(
        Vec::from_iter(&first.systems),
        ["i686-linux", "x86_64-linux"]
    );
    assert!(first.local_system);
    let lines: Vec<_> = first.places.iter().map(|p| p.line).collect();
    assert_eq!(lines, [1, 3, 6]);
    assert_eq!(first.uri.settings().ssh_key.as_deref(), Some("/a"));
    assert!(matches!(first.uri.kind(), StoreKind::SshNg(_)));
}

/// What NixOS writes for `nix.buildMachines`.
#[test]
fn what_nixos_writes_is_read_without_a_warning() {
    let found = read(
        "ssh://nix@b1 x86_64-linux,aarch64-linux /root/.ssh/id 4 1 kvm,big-parallel kvm \
         c3NoLWVkMjU1MTkgQUFBQQo=\nb2 x86_64-linux - 1 1 - - -\n",
    );
    assert_eq!(
        (
            found.machines.len(),
            found.errors.len(),
            found.warnings.len()
        ),
        (2, 0, 0)
    );
    let key = found.machines[0].uri.settings().host_key.as_ref();
    assert_eq!(key.unwrap().as_str(), "ssh-ed25519 AAAA");
}

const SAMPLE: &str = "# builders; all\nssh-ng://nix@h1:22?compress=true&remote-store=%2Fx x86_64-linux,i686-linux \
    /k 8 1.5 kvm f c3NoLWVkMjU1MTkgQUFBQQ==\n@other;@self ; @unreadable\r\nh2 - - x\n\
    ssh://u@[fe80::1%25eth0]:22 , - 0 0\n unix:///run/x?root=/mnt#c\nlocalhost;/mnt;http://h/x";

proptest! {
    #[test]
    fn mutated_bytes_never_panic(edits in prop::collection::vec((0..SAMPLE.len(), any::<u8>(), 0..3u8), 0..24)) {
        let mut bytes = SAMPLE.as_bytes().to_vec();
        for (at, byte, edit) in edits {
            let at = at.min(bytes.len() - 1);
            match edit {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                _ => { bytes.remove(at); }
            }
        }
        muster::nix::machines::fuzz(&bytes);
    }

    #[test]
    fn words_of_the_grammar_never_panic(words in prop::collection::vec(
        prop::sample::select(vec![
            "h", "ssh://", "ssh-ng://", "unix://", "http://", "@", "self", "-", ":", "22", "[::1]", "%", "%2d",
            "?", "=", "&", "ssh-key", "root", "trusted", "remote-store", "/x", "localhost", "daemon", "local",
            " ", "\t", "\r", "\n", ";", "#", ",", "c3Nr", "é", "0", "1e3", "\u{0}",
        ]), 0..40,
    )) {
        let text = words.concat();
        muster::nix::machines::fuzz(text.as_bytes());
        muster::nix::store_uri::fuzz(text.as_bytes());
    }
}
