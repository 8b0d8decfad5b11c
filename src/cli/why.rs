//! `muster why`: who has a path, what would be served of it, and whether a client would take it.
//!
//! It asks the upstreams itself, by the configuration of the server: so it works while no server runs, and
//! it sees the claims that a server refuses. What a running Muster serves now is asked of it beside that.

mod client;
mod closure;
mod target;
mod upstreams;
mod verdict;
mod weather;

use std::process::ExitCode;

use serde_json::{Value, json};

use self::client::Client;
use self::target::Target;
use self::upstreams::{Claim, Upstreams};
use self::verdict::Verdict;
use super::http::Server;
use super::page::{Page, Tone};
use super::settings::Settings;
use super::units;
use crate::config::{self, Config, Look};

/// Say who has a path, what would be served of it, and whether a client would take it
///
/// For each upstream: whether it has the path, with which NAR hash and signatures, and whether that
/// would be served or why not. With --closure the same for all that a path refers to, or for all that a
/// derivation is built from: how much of it is built already, and where.
#[derive(clap::Args, Debug)]
#[command(after_long_help = AFTER_LONG_HELP)]
pub struct Args {
    /// Store path, its hash part, or a link to it such as ./result; with --closure also a .drv
    #[arg(value_name = "PATH|HASH")]
    pub path: String,
    /// Show the whole closure: how much of it is built, and where
    #[arg(long)]
    pub closure: bool,
    /// The running muster to ask what it serves: http://…, unix:PATH [default: where the configuration says that it listens]
    #[arg(long, value_name = "URL", value_parser = |text: &str| Server::parse(text).map(|_| text.to_owned()))]
    pub url: Option<String>,
    /// Write JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    settings: Settings,
}

/// Prints what is known; the status says whether a client would get the path.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let config = load(&args.settings)?;
    let target = Target::parse(&args.path, &config.store_dir)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let (text, good) = runtime.block_on(async {
        let upstreams = Upstreams::start(&config)?;
        if args.closure {
            return closure::report(args, &config, &upstreams, target).await;
        }
        let claims = upstreams.ask(target.hash()).await;
        let servers = servers(args, &config)?;
        let client = Client::ask(&config, &servers, target.hash()).await;
        let verdict = Verdict::of(&config, target, claims, client);
        let text = match args.json {
            true => format!("{:#}\n", to_json(&verdict)),
            false => to_text(&verdict),
        };
        anyhow::Ok((text, verdict.good()))
    })?;
    // What an upstream still answers is of no use any more.
    runtime.shutdown_background();
    super::print(&text)?;
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(NOT_TO_BE_HAD)
    })
}

/// Reads the configuration; keys that this user cannot read are no hindrance.
fn load(settings: &Settings) -> anyhow::Result<Config> {
    match settings.load(Look::ToCheck) {
        Err(error) if matches!(error.downcast_ref(), Some(config::Error::Key { .. })) => {
            settings.load(Look::NotAtKeys)
        }
        loaded => loaded,
    }
}

fn servers(args: &Args, config: &Config) -> anyhow::Result<Vec<Server>> {
    match &args.url {
        Some(url) => Ok(vec![Server::parse(url).map_err(anyhow::Error::msg)?]),
        None => Ok(config.listen.iter().map(Server::listening).collect()),
    }
}

fn to_text(verdict: &Verdict) -> String {
    let mut page = Page::for_stdout();
    page.line(0, &verdict.title(), Tone::Heading);
    page.gap();
    for holder in &verdict.holders {
        let (word, tone) = match (&holder.claim, holder.served) {
            (Claim::Has(_), true) => ("has it", Tone::Good),
            (Claim::Has(_), false) => ("has it, but it is not served", Tone::Doubtful),
            (Claim::Absent, _) => ("does not have it", Tone::Faint),
            (Claim::Unknown(_), _) => ("cannot tell", Tone::Bad),
        };
        page.item(0, 4, &format!("{}: {word}", holder.upstream), tone);
        match &holder.claim {
            Claim::Has(info) => {
                field(&mut page, "NAR hash", &info.nar_hash.to_string());
                let references = info.references.len();
                let size = units::size(info.nar_size);
                field(
                    &mut page,
                    "NAR size",
                    &format!("{size}, {references} references"),
                );
                field(&mut page, "signatures", &holder.signatures());
                if let Some(ca) = &info.ca {
                    field(&mut page, "content", &format!("addressed: {ca}"));
                }
                field(&mut page, "served", &holder.why);
            }
            Claim::Unknown(error) => field(&mut page, "error", error),
            Claim::Absent => {}
        }
    }
    if verdict.holders.is_empty() {
        page.line(
            0,
            "there are no upstreams: name builders in /etc/nix/machines",
            Tone::Bad,
        );
    }
    let unsure = |holder: &verdict::Holder| matches!(holder.claim, Claim::Unknown(_));
    if verdict.holders.iter().any(unsure) {
        page.line(0, "`muster check` says what to do about those", Tone::Plain);
    }
    page.gap();
    let tone = |good| if good { Tone::Good } else { Tone::Doubtful };
    page.item(
        0,
        10,
        &format!("server    {}", verdict.server_says),
        tone(verdict.served()),
    );
    let client = &verdict.client_says;
    page.item(
        0,
        10,
        &format!("client    {client}"),
        tone(verdict.accepted == Some(true)),
    );
    page.into_text()
}

fn field(page: &mut Page, name: &str, value: &str) {
    page.item(4, 16, &format!("{name:<11} {value}"), Tone::Plain);
}

fn to_json(verdict: &Verdict) -> Value {
    let holder = |holder: &verdict::Holder| {
        let (answer, error, info) = match &holder.claim {
            Claim::Has(info) => ("has", None, Some(info)),
            Claim::Absent => ("absent", None, None),
            Claim::Unknown(error) => ("unknown", Some(error), None),
        };
        let signatures = holder
            .carried
            .iter()
            .map(|(key, trusted)| json!({ "key": key, "client-trusts": trusted }));
        json!({
            "name": holder.upstream,
            "answer": answer,
            "error": error,
            "nar-hash": info.map(|info| info.nar_hash.to_string()),
            "nar-size": info.map(|info| info.nar_size),
            "content-address": info.and_then(|info| Some(info.ca.as_ref()?.to_string())),
            "signatures": signatures.collect::<Value>(),
            "served": holder.served,
            "why": holder.why,
        })
    };
    json!({
        "path": verdict.path,
        "hash": verdict.hash.to_string(),
        "upstreams": verdict.holders.iter().map(holder).collect::<Value>(),
        "server": {
            "url": verdict.server_url,
            "nar-hash": verdict.server_nar_hash.map(|hash| hash.to_string()),
            "says": verdict.server_says,
        },
        "client": { "accepts": verdict.accepted, "says": verdict.client_says },
    })
}

const NOT_TO_BE_HAD: u8 = 3;

const AFTER_LONG_HELP: &str = "\
Examples:
  muster why ./result
  muster why 1q8w6gl1ll0mwfkqc3c2yx005s6wwfrl
  muster why --closure $(nix-instantiate -A hello)      how much is built, before it is

JSON:
  The form is stable: keys are added, never changed.
    path, hash      path is null where nobody has it and only the hash was given
    upstreams[]     name, answer (has, absent, unknown), error, nar-hash, nar-size, content-address,
                    signatures[] {key, client-trusts}, served, why
    server          url (null: no muster answers), nar-hash (of what it serves now), says
    client          accepts (null: cannot be told), says
  With --closure:
    path, kind (path, derivation), paths, built, bytes, missing[], unknown-outputs,
    unreadable-derivations[], upstreams[] {name, has, bytes, only-here, refused, error}

Exit status: 0 if a client would get it (--closure: all of it), 1 if that could not be found out,
2 if the command line was wrong, 3 if it would not.";
