//! Builders keep what was served to a client, for as long as was said, and no longer.

mod rig;

use rig::{Lab, Muster, eventually};

#[test]
fn what_is_served_outlives_a_garbage_collection_until_its_roots_lapse() {
    let lab = Lab::new();
    let b1 = lab.builder("b1");
    let client = lab.client(&["b1"]);
    let served = b1.build_one("tiny", "--argstr seed served");
    let asked_by_nobody = b1.build_one("tiny", "--argstr seed alone");
    client.write("/etc/muster.toml", "roots-lifetime = 8\n");
    let mut muster = Muster::serve(&client, "--config /etc/muster.toml");
    assert_eq!(muster.narinfo(&served).status, 200);
    // The answer does not wait for it, and the roots' connection logs in on its own.
    let rooted = eventually(20.0, || {
        let found = format!("grep --quiet --text {served} /nix/var/nix/temproots/*");
        b1.run(&found).rc == 0
    });
    assert!(rooted, "{}", muster.log());

    b1.run("nix-store --gc").ok();
    assert!(b1.valid(&served), "promised to a client\n{}", muster.log());
    assert!(!b1.valid(&asked_by_nobody), "never promised");

    let freed = eventually(40.0, || {
        b1.run("nix-store --gc").ok();
        !b1.valid(&served)
    });
    assert!(freed, "two generations of 8 s are over\n{}", muster.log());
}
