//! `muster check-config`: what a configuration means, or what is wrong with it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::{Value, json};

use crate::config::{Config, Look, Upstream};
use crate::nix::path_info::Trust;

/// Say what a configuration means, or what is wrong with it
///
/// Shows listeners, upstreams and keys as `muster serve` would use them, and warns of what some
/// version of Nix reads otherwise. Nothing is changed or connected to.
#[derive(clap::Args, Debug)]
#[command(after_long_help = AFTER_LONG_HELP)]
pub struct Args {
    /// Configuration file, TOML or JSON [default: /etc/muster/muster.toml or config.toml, if there]
    #[arg(value_name = "FILE", env = "MUSTER_CONFIG")]
    pub file: Option<PathBuf>,
    /// Write JSON
    #[arg(long)]
    pub json: bool,
    /// Look neither at key files nor at the machines file: they may be on another machine
    #[arg(long)]
    pub no_files: bool,
}

/// Prints the report; the status says whether all is well.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let look = if args.no_files {
        Look::NotAtFiles
    } else {
        Look::ToCheck
    };
    let loaded = super::load(args.file.as_deref(), |_| {}, look);
    let (path, config) = match loaded {
        Ok(loaded) => loaded,
        Err(error) if args.json => {
            let errors = [format!("{error:#}")];
            super::print(&format!("{:#}\n", json!({ "ok": false, "errors": errors })))?;
            return Ok(ExitCode::FAILURE);
        }
        Err(error) => return Err(error),
    };
    let ok = config.machines_errors.is_empty();
    let path = path.as_deref();
    super::show(
        args.json,
        || to_json(path, &config),
        || to_text(path, &config),
    )?;
    Ok(super::status_of(ok))
}

fn to_text(path: Option<&Path>, config: &Config) -> String {
    let mut text = match path {
        Some(path) => format!("{} can be used\n", path.display()),
        None => "no configuration file: these are the defaults\n".to_owned(),
    };
    for address in &config.listen {
        line(&mut text, "listens on", address);
    }
    for upstream in &config.upstreams {
        let Upstream { name, source, .. } = upstream;
        line(
            &mut text,
            "upstream",
            format_args!("{name}  ({source}; {})", trust(upstream)),
        );
        if let Some(file) = &upstream.credentials_file {
            line(
                &mut text,
                "",
                format_args!("credentials of {}", file.display()),
            );
        }
        if !upstream.allowed_nar_hosts.is_empty() {
            let hosts = upstream.allowed_nar_hosts.join(", ");
            line(&mut text, "", format_args!("may send us to {hosts}"));
        }
    }
    if config.upstreams.is_empty() {
        line(&mut text, "upstream", "none");
    }
    for (key, path) in config.secret_keys.iter().zip(&config.secret_key_files) {
        line(
            &mut text,
            "signs with",
            format_args!("{}  ({})", key.public(), path.display()),
        );
    }
    for name in &config.unseen_keys {
        let name = name.display();
        line(
            &mut text,
            "signs with",
            format_args!("{name}, a credential that the service alone sees"),
        );
    }
    if let Some(path) = &config.key_to_be_made {
        let path = path.display();
        line(
            &mut text,
            "signs with",
            format_args!("a key to be made at the first start  ({path})"),
        );
    }
    line(&mut text, "compression", config.compression.name());
    line(&mut text, "priority", config.priority);
    line(&mut text, "store", &config.store_dir);
    match &config.cache_dir {
        Some(dir) => line(
            &mut text,
            "keeps",
            format_args!("{} bytes of NARs in {}", config.cache_bytes, dir.display()),
        ),
        None => line(&mut text, "keeps", "no NARs"),
    }
    for error in &config.machines_errors {
        line(
            &mut text,
            "error",
            format_args!("{error}; Nix refuses the whole file for it"),
        );
    }
    for warning in &config.warnings {
        line(&mut text, "warning", warning);
    }
    for warning in &config.machines_warnings {
        line(&mut text, "note", warning);
    }
    text
}

fn line(text: &mut String, what: &str, value: impl std::fmt::Display) {
    _ = writeln!(text, "{what:<12} {value}");
}

fn trust(upstream: &Upstream) -> String {
    match &upstream.trust {
        Trust::Operator => "trusted".to_owned(),
        Trust::Keys(keys) if keys.is_empty() => "not trusted".to_owned(),
        Trust::Keys(keys) => {
            let names: Vec<_> = keys.iter().map(|key| key.name().as_str()).collect();
            format!("must be signed by {}", names.join(" or "))
        }
    }
}

fn to_json(path: Option<&Path>, config: &Config) -> Value {
    let upstream = |upstream: &Upstream| {
        let keys = match &upstream.trust {
            Trust::Operator => Value::Null,
            Trust::Keys(keys) => keys.iter().map(ToString::to_string).collect(),
        };
        json!({
            "name": upstream.name,
            "uri": upstream.uri.to_string(),
            "source": upstream.source.to_string(),
            "trusted": matches!(upstream.trust, Trust::Operator),
            "trusted-public-keys": keys,
            "systems": upstream.systems,
            "credentials-file": upstream.credentials_file,
            "netrc-file": upstream.netrc_file,
            "allowed-nar-hosts": upstream.allowed_nar_hosts,
        })
    };
    let keys = config.secret_keys.iter().zip(&config.secret_key_files);
    let keys =
        keys.map(|(key, path)| json!({ "file": path, "public-key": key.public().to_string() }));
    json!({
        "ok": config.machines_errors.is_empty(),
        "config-file": path,
        "listen": strings(&config.listen),
        "upstreams": config.upstreams.iter().map(upstream).collect::<Value>(),
        "keys": keys.collect::<Value>(),
        "keys-not-seen": config.unseen_keys,
        "key-to-be-made": config.key_to_be_made,
        "compression": config.compression.name(),
        "priority": config.priority,
        "cache-dir": config.cache_dir,
        "cache-size": config.cache_bytes,
        "store-dir": config.store_dir.as_str(),
        "errors": strings(&config.machines_errors),
        "warnings": config.warnings,
        "notes": strings(&config.machines_warnings),
    })
}

fn strings<T: ToString>(values: &[T]) -> Value {
    values.iter().map(ToString::to_string).collect()
}

const AFTER_LONG_HELP: &str = "\
JSON:
  The form is stable: keys are added, never changed.
    ok, config-file, listen[], compression, priority, cache-dir, cache-size, store-dir
    upstreams[]     name, uri, source, trusted, trusted-public-keys (null where the operator's word is
                    enough), systems, credentials-file, netrc-file, allowed-nar-hosts
    keys[]          file, public-key; key-to-be-made: where `muster serve` would make one, or null
    errors[]        bad lines of the machines file; or, alone beside ok, why nothing can be used
    warnings[], notes[]

Exit status: 0 if `muster serve` can use all of it, 1 if it cannot, and also if the machines file has a
bad line (`muster serve` leaves the line out, but Nix refuses the whole file), 2 if the command line was
wrong.";
