//! What follows from all answers: which NAR is served, why the others are not, who takes it.
//!
//! Plain decisions over what was heard.

use super::client::Client;
use super::target::Target;
use super::upstreams::Claim;
use crate::config::{Config, Upstream};
use crate::nix::fingerprint;
use crate::nix::hash::NarHash;
use crate::nix::path_info::{Basis, PathInfo};
use crate::nix::signature::PublicKey;
use crate::nix::store_path::StorePathHash;

/// The whole answer.
pub(super) struct Verdict {
    pub(super) hash: StorePathHash,
    /// The path with its directory, where it is known.
    pub(super) path: Option<String>,
    pub(super) holders: Vec<Holder>,
    /// The running Muster.
    pub(super) server_url: Option<String>,
    /// The NAR that it serves now.
    pub(super) server_nar_hash: Option<NarHash>,
    pub(super) server_says: String,
    /// Whether a client here would take it; `None`: it cannot be told.
    pub(super) accepted: Option<bool>,
    pub(super) client_says: String,
}

/// One upstream's part.
pub(super) struct Holder {
    pub(super) upstream: String,
    pub(super) claim: Claim,
    /// Names of the keys that signed, and whether the client trusts them for this path.
    pub(super) carried: Vec<(String, bool)>,
    /// Whether its NAR is or would be served.
    pub(super) served: bool,
    pub(super) why: String,
}

impl Verdict {
    pub(super) fn of(
        config: &Config,
        target: Target,
        claims: Vec<(&Upstream, Claim)>,
        client: Client,
    ) -> Self {
        let trusted = client.trusted();
        let mut holders: Vec<Holder> = claims
            .into_iter()
            .map(|(upstream, claim)| Holder::of(config, upstream, claim, &trusted))
            .collect();
        let now = client.served.as_ref().map(|info| info.nar_hash);
        choose(&mut holders, now);
        let path = match &target {
            Target::Path(path) => Some(path.clone()),
            Target::Hash(_) => holders.iter().find_map(|h| Some(h.info()?.path.clone())),
        };
        let mut verdict = Self {
            hash: target.hash(),
            path: path.map(|path| config.store_dir.join(&path)),
            server_url: client.server.as_ref().map(ToString::to_string),
            server_nar_hash: now,
            server_says: String::new(),
            accepted: None,
            client_says: String::new(),
            holders,
        };
        verdict.server_says = verdict.server_words(&client);
        (verdict.accepted, verdict.client_says) = verdict.judge_client(config, &client, &trusted);
        verdict
    }

    /// Tells whether a client here would get it.
    pub(super) fn good(&self) -> bool {
        self.served() && self.accepted != Some(false)
    }

    /// Tells whether it is or would be served.
    pub(super) fn served(&self) -> bool {
        self.server_nar_hash.is_some() || self.holders.iter().any(|holder| holder.served)
    }

    pub(super) fn title(&self) -> String {
        match &self.path {
            Some(path) => path.clone(),
            None => {
                let unsure = |holder: &Holder| matches!(holder.claim, Claim::Unknown(_));
                let who = match self.holders.iter().any(unsure) {
                    true => "nobody who can tell",
                    false => "nobody",
                };
                format!("{} ({who} has a path with this hash part)", self.hash)
            }
        }
    }

    fn server_words(&self, client: &Client) -> String {
        let would = self.holders.iter().any(|holder| holder.served);
        let unknown = self
            .holders
            .iter()
            .any(|h| matches!(h.claim, Claim::Unknown(_)));
        match (&client.server, &client.served) {
            (Some(server), Some(info)) => format!("{server} serves {}", info.nar_hash),
            (Some(server), None) if would => format!(
                "{server} answers 404 although it could be served: it may have other upstreams, or have \
                 asked a moment ago; ask again, or see `muster status`"
            ),
            (Some(server), None) if unknown => {
                format!(
                    "{server} answers 404, without full knowledge: not all upstreams could be asked"
                )
            }
            (Some(server), None) => format!("{server} answers 404"),
            (None, _) if would => "none runs here; one would serve it".to_owned(),
            (None, _) => "none runs here; one would answer 404".to_owned(),
        }
    }

    fn judge_client(
        &self,
        config: &Config,
        client: &Client,
        trusted: &[PublicKey],
    ) -> (Option<bool>, String) {
        let conf = match &client.conf {
            Ok(conf) => conf,
            Err(error) => return (None, format!("cannot tell: {error}")),
        };
        let shown = client.served.as_ref().or_else(|| {
            let served = self.holders.iter().find(|holder| holder.served)?;
            served.info()
        });
        let Some(info) = shown else {
            return (
                Some(false),
                "gets a 404, and asks the next substituter or builds".to_owned(),
            );
        };
        if info.proves_itself(&config.store_dir) {
            return (
                Some(true),
                "takes it: its name proves its content".to_owned(),
            );
        }
        if let Some(key) = signer(info, trusted, config) {
            return (
                Some(true),
                format!("takes it: signed by {key}, which nix.conf trusts"),
            );
        }
        // What is not served yet is going to be signed by these.
        let ours = client.our_keys.iter();
        let ours: Vec<_> = ours.filter(|key| trusted.contains(key)).collect();
        if let (None, Some(key)) = (&client.served, ours.first()) {
            let name = key.name();
            return (
                Some(true),
                format!("takes it: muster signs it by {name}, which nix.conf trusts"),
            );
        }
        if !conf.require_sigs {
            return (Some(true), "takes it: require-sigs is false".to_owned());
        }
        match client.our_keys.first() {
            Some(key) => (
                Some(false),
                format!(
                    "refuses it: nix.conf trusts no key that signs it; add extra-trusted-public-keys = {key}"
                ),
            ),
            None => (
                None,
                "cannot tell: the signing key cannot be read, and no muster runs".to_owned(),
            ),
        }
    }
}

impl Holder {
    fn of(config: &Config, upstream: &Upstream, claim: Claim, trusted: &[PublicKey]) -> Self {
        let mut holder = Self {
            upstream: upstream.name.clone(),
            carried: Vec::new(),
            served: false,
            why: String::new(),
            claim,
        };
        let Claim::Has(info) = &holder.claim else {
            return holder;
        };
        let print = fingerprint::of_path(info, &config.store_dir);
        holder.carried = info
            .signatures
            .iter()
            .map(|s| {
                let good = trusted.iter().any(|key| key.verifies(&print, s));
                (s.key_name().to_string(), good)
            })
            .collect();
        match (**info).clone().verify(&upstream.trust, &config.store_dir) {
            Ok(verified) => {
                holder.served = true;
                holder.why = match verified.basis() {
                    Basis::Operator => "yes: the upstream is trusted".to_owned(),
                    Basis::Signature(key) => format!("yes: signed by {key}, as is asked of it"),
                    Basis::ContentAddress => "yes: its name proves its content".to_owned(),
                };
            }
            Err(_) => {
                holder.why = "no: it has no signature by a key that is asked of this upstream \
                              (trusted-public-keys)"
                    .to_owned();
            }
        }
        holder
    }

    /// What it has, if it has it.
    pub(super) fn info(&self) -> Option<&PathInfo> {
        match &self.claim {
            Claim::Has(info) => Some(info),
            Claim::Absent | Claim::Unknown(_) => None,
        }
    }

    /// The signatures for people.
    pub(super) fn signatures(&self) -> String {
        let named = self.carried.iter().map(|(key, trusted)| match trusted {
            true => format!("{key} (the client trusts it)"),
            false => key.clone(),
        });
        let named: Vec<_> = named.collect();
        if named.is_empty() {
            "none".to_owned()
        } else {
            named.join(", ")
        }
    }
}

/// Where builders have different bytes, one NAR is served: the running server's, or the first answer's.
fn choose(holders: &mut [Holder], now: Option<NarHash>) {
    let believed = holders.iter().filter(|holder| holder.served);
    let mut hashes: Vec<_> = believed.filter_map(|h| Some(h.info()?.nar_hash)).collect();
    hashes.sort_unstable();
    hashes.dedup();
    let divergent = hashes.len() > 1;
    for holder in holders.iter_mut().filter(|holder| holder.served) {
        let Some(hash) = holder.info().map(|info| info.nar_hash) else {
            continue;
        };
        match now {
            Some(now) if now != hash => {
                holder.served = false;
                holder.why =
                    "no: the running muster serves other bytes, and keeps to them".to_owned();
            }
            Some(_) => {}
            None if divergent => {
                holder.why =
                    "perhaps: upstreams have different bytes, and whoever answers first is kept to"
                        .to_owned();
            }
            None => {}
        }
    }
}

fn signer(info: &PathInfo, trusted: &[PublicKey], config: &Config) -> Option<String> {
    let print = fingerprint::of_path(info, &config.store_dir);
    let good =
        |s: &&crate::nix::signature::Signature| trusted.iter().any(|k| k.verifies(&print, s));
    let signature = info.signatures.iter().find(good)?;
    Some(signature.key_name().to_string())
}
