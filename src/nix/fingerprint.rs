//! The text that a signature covers.
//!
//! For a path: `1;<path>;<NAR hash>;<NAR size>;<references, by commas>`, all paths with their
//! directory. Source: `ValidPathInfo::fingerprint` in `libstore/path-info.cc`.

use super::path_info::PathInfo;
use super::store_path::StoreDir;

/// Writes the fingerprint of a path info; its references must be sorted, each once.
pub fn of_path(info: &PathInfo, store_dir: &StoreDir) -> String {
    let mut text = String::with_capacity(200 + info.references.len() * 80);
    text.push_str("1;");
    push_path(&mut text, store_dir, info.path.as_str());
    text.push(';');
    text.push_str(&info.nar_hash.to_string());
    text.push(';');
    text.push_str(&info.nar_size.to_string());
    text.push(';');
    for (place, reference) in info.references.iter().enumerate() {
        if place > 0 {
            text.push(',');
        }
        push_path(&mut text, store_dir, reference.as_str());
    }
    text
}

fn push_path(text: &mut String, store_dir: &StoreDir, path: &str) {
    text.push_str(store_dir.as_str());
    text.push('/');
    text.push_str(path);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::hash::NarHash;
    use crate::nix::signature::{PublicKey, Signature};

    #[test]
    fn what_nix_signed_verifies() {
        // A path with one reference, signed by `nix store sign` of Nix 2.8.
        let info = PathInfo {
            path: "6pry51sldxhiwgi5qwm4c58gfvxg227y-ref".parse().unwrap(),
            nar_hash: NarHash::parse("sha256:05iba2pz81lz2qig23xwl0hzznlk7zwz8sgag1hdilw9pn0hs3a2")
                .unwrap(),
            nar_size: 168,
            references: vec!["i4f75pn3bxkxdk2kld86k5qazq4cqj8i-hello".parse().unwrap()],
            deriver: None,
            signatures: vec![],
            ca: None,
        };
        let key = PublicKey::parse("test-1:lzZbJO7cF6BNjZ5MMOyMyF2Y5PAryxIWzx0p/mo8Xbw=").unwrap();
        let signature = Signature::parse("test-1:c8nyGTWpN5vyeD9T9CiehFDy0Mjrc7mgLOAmJJnVbAJlQMdkJxDAFew2M7J7tfPGzuPVzgTyUknWuW54fNWxBw==").unwrap();
        let fingerprint = of_path(&info, &StoreDir::default());
        assert_eq!(
            fingerprint,
            "1;/nix/store/6pry51sldxhiwgi5qwm4c58gfvxg227y-ref;\
             sha256:05iba2pz81lz2qig23xwl0hzznlk7zwz8sgag1hdilw9pn0hs3a2;168;\
             /nix/store/i4f75pn3bxkxdk2kld86k5qazq4cqj8i-hello"
        );
        assert!(key.verifies(&fingerprint, &signature));
    }
}
