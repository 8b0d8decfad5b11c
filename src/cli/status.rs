//! `muster status`: what a running Muster says of itself.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use super::http::Server;
use super::page::{Alignment, Cell, Page, Table, Tone};
use super::settings::Settings;
use super::units;
use crate::config::Look;

/// Show how a running muster and its upstreams are
///
/// Asks /healthz of the muster that the configuration describes: each upstream's state, latency of
/// look-ups, what was found and fetched there, its last error, and when it is tried again; answers
/// that were given without full knowledge; paths that two builders built differently.
#[derive(clap::Args, Debug)]
#[command(after_long_help = AFTER_LONG_HELP)]
pub struct Args {
    /// The muster to ask: http://…, https://…, unix:PATH or HOST:PORT [default: where the configuration says that it listens]
    #[arg(long, value_name = "URL", value_parser = |text: &str| Server::parse(text).map(|_| text.to_owned()))]
    pub url: Option<String>,
    /// Configuration file that says where it listens [default: /etc/muster/muster.toml or config.toml, if there]
    #[arg(long, value_name = "FILE", env = "MUSTER_CONFIG")]
    pub config: Option<PathBuf>,
    /// Show it again each SECONDS, until it is interrupted
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2", value_parser = seconds)]
    pub watch: Option<Duration>,
    /// Write JSON; with --watch one object a line
    #[arg(long)]
    pub json: bool,
}

/// Prints the state; the status says whether all is well.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let servers = servers(args)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let Some(pause) = args.watch else {
            return show(args, &servers).await;
        };
        loop {
            show(args, &servers).await?;
            tokio::time::sleep(pause).await;
        }
    })
}

async fn show(args: &Args, servers: &[Server]) -> anyhow::Result<ExitCode> {
    let asked = ask(servers).await;
    let text = match (&asked, args.json) {
        (Ok((_, report)), true) if args.watch.is_some() => format!("{report}\n"),
        (Ok((_, report)), true) => format!("{report:#}\n"),
        (Ok((server, report)), false) => to_text(server, report),
        (Err(error), true) => {
            let none = json!({ "status": "unreachable", "error": format!("{error:#}") });
            format!("{none}\n")
        }
        (Err(error), false) if args.watch.is_some() => format!("{error:#}\n"),
        (Err(_), false) => String::new(),
    };
    if args.watch.is_some() && !args.json {
        super::print(&format!("{}{text}", clear()))?;
    } else {
        super::print(&text)?;
    }
    match asked {
        Ok((_, report)) if report["status"] == "ok" => Ok(ExitCode::SUCCESS),
        Ok(_) => Ok(ExitCode::from(DEGRADED)),
        Err(_) if args.json || args.watch.is_some() => Ok(ExitCode::FAILURE),
        Err(error) => Err(error),
    }
}

/// Asks the first that answers.
async fn ask(servers: &[Server]) -> anyhow::Result<(Server, Value)> {
    let mut failed = None;
    for server in servers {
        match report(server).await {
            Ok(report) => return Ok((server.clone(), report)),
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    Err(failed.unwrap_or_else(|| anyhow::anyhow!("the configuration names no address")))
}

/// Asks one server for its report.
pub(super) async fn report(server: &Server) -> anyhow::Result<Value> {
    let answer = server.get("/healthz", PATIENCE).await.with_context(|| {
        format!(
            "no muster answers on {server}; start it (`muster serve`, `systemctl start muster`), or \
             name the running one by --url"
        )
    })?;
    let report: Option<Value> = serde_json::from_slice(&answer.body).ok();
    match report.filter(|report| report["upstreams"].is_array()) {
        Some(report) => Ok(report),
        None => bail!(
            "what answers on {server} is no muster (status {} to /healthz); name the right one by --url",
            answer.status
        ),
    }
}

fn servers(args: &Args) -> anyhow::Result<Vec<Server>> {
    if let Some(url) = &args.url {
        return Ok(vec![Server::parse(url).map_err(anyhow::Error::msg)?]);
    }
    let settings = Settings {
        config: args.config.clone(),
        ..Settings::default()
    };
    let config = settings.load(Look::NotAtFiles)?;
    Ok(config.listen.iter().map(Server::listening).collect())
}

fn to_text(server: &Server, report: &Value) -> String {
    let mut page = Page::for_stdout();
    let degraded = report["status"] != "ok";
    let head = format!(
        "muster {} on {server}: {}, up {}",
        text(&report["version"]),
        if degraded { "degraded" } else { "all is well" },
        units::duration(milliseconds(&report["uptime-ms"])),
    );
    let tone = if degraded { Tone::Doubtful } else { Tone::Good };
    page.line(0, &head, tone);
    page.gap();
    page.table(&upstreams(report));
    page.gap();
    figures(&mut page, report);
    divergent(&mut page, report);
    page.into_text()
}

fn upstreams(report: &Value) -> Table {
    let mut table = Table::new(&[
        ("UPSTREAM", Alignment::Left),
        ("STATE", Alignment::Left),
        ("LATENCY", Alignment::Right),
        ("KNOWN", Alignment::Right),
        ("HITS", Alignment::Right),
        ("GIVEN", Alignment::Right),
        ("PEER", Alignment::Left),
    ]);
    for upstream in items(&report["upstreams"]) {
        let state = text(&upstream["state"]);
        let tone = match state {
            "well" => Tone::Good,
            "sick" => Tone::Bad,
            _ => Tone::Doubtful,
        };
        // Nobody but a muster tells of paths that it was not asked for.
        let known = upstream["paths"].as_u64();
        let known = known.unwrap_or_else(|| number(&upstream["found"]));
        let latency = upstream["latency-ms"].as_f64().map(units::latency);
        let peer = text(&upstream["peer"]);
        let (nix, _) = peer.split_once(',').unwrap_or((peer, ""));
        table.row(vec![
            Cell::plain(text(&upstream["uri"])),
            Cell::new(state, tone),
            Cell::plain(latency.unwrap_or_else(|| "-".to_owned())),
            Cell::plain(known.to_string()),
            Cell::plain(number(&upstream["hits"]).to_string()),
            Cell::plain(units::size(number(&upstream["nar-bytes"]))),
            Cell::plain(if nix.is_empty() { "-" } else { nix }),
        ]);
        remarks(&mut table, upstream);
    }
    if items(&report["upstreams"]).is_empty() {
        let words = "no upstreams: name builders in /etc/nix/machines or in the configuration";
        table.remark(words, Tone::Doubtful);
    }
    table
}

fn remarks(table: &mut Table, upstream: &Value) {
    let last = &upstream["last-error"];
    let age = units::duration(milliseconds(&last["age-ms"]));
    match upstream["error"].as_str() {
        Some(error) => {
            let next = units::duration(milliseconds(&upstream["retry-in-ms"]));
            let error = error.trim_end_matches('.');
            let words = format!("{error}; {age} ago, tried again in {next}");
            table.remark(words, Tone::Bad);
        }
        None if last["error"].is_string() => {
            let words = format!("last error {age} ago: {}", text(&last["error"]));
            table.remark(words, Tone::Faint);
        }
        None => {}
    }
    match number(&upstream["refused"]) {
        0 => {}
        refused => table.remark(
            format!("{refused} answers refused: not signed by a trusted key, or other bytes than promised"),
            Tone::Doubtful,
        ),
    }
}

fn figures(page: &mut Page, report: &Value) {
    let narinfo = &report["narinfo"];
    let asked = number(&narinfo["requests"]);
    let line = format!(
        "look-ups   {asked} asked, {} from memory, {} found by asking, {} absent",
        units::share(number(&narinfo["memory-hits"]), asked),
        number(&narinfo["found"]),
        number(&narinfo["absent"]),
    );
    page.line(0, &line, Tone::Plain);
    let unsure = number(&narinfo["absent-without-full-knowledge"]);
    if unsure > 0 {
        let line = format!(
            "           {unsure} absent without full knowledge: an upstream could not be asked"
        );
        page.line(0, &line, Tone::Doubtful);
    }
    let nar = &report["nar"];
    let line = format!(
        "NARs       {} asked, {} given, {} passed on as they were, {} not to be had, {} continued elsewhere",
        number(&nar["requests"]),
        units::size(number(&nar["bytes"])),
        number(&nar["passed"]),
        number(&nar["absent"]),
        number(&nar["resumed"]),
    );
    page.line(0, &line, Tone::Plain);
    let (cut, corrupt) = (number(&nar["cut"]), number(&nar["corrupt"]));
    if cut + corrupt > 0 {
        let line = format!("           {cut} cut, {corrupt} with other bytes than promised");
        page.line(0, &line, Tone::Bad);
    }
    let cache = &report["cache"];
    if cache.is_object() {
        page.line(0, &cache_line(cache), Tone::Plain);
        if let Some(cause) = cache["degraded"].as_str() {
            page.item(11, 11, &format!("cannot be used: {cause}"), Tone::Bad);
        }
    }
}

/// Sizes and rates by the names that a cache gives them.
fn cache_line(cache: &Value) -> String {
    let size = units::size(number(&cache["bytes"]));
    let most = cache["bytes-max"].as_u64().map(units::size);
    let of = most.map(|most| format!(" of {most}")).unwrap_or_default();
    let (hits, misses) = (number(&cache["hits"]), number(&cache["misses"]));
    let rate = units::share(hits, hits + misses);
    format!(
        "cache      {size}{of}, {rate} of {} NARs from it",
        hits + misses
    )
}

fn divergent(page: &mut Page, report: &Value) {
    let count = number(&report["narinfo"]["divergent"]);
    if count == 0 {
        return;
    }
    let words = format!("divergent  {count} with other bytes on another upstream:");
    page.line(0, &words, Tone::Doubtful);
    let shown = items(&report["divergent"]);
    for path in shown.iter().take(DIVERGENT_LINES_MAX) {
        let line = format!("{} on {}", text(&path["path"]), text(&path["upstream"]));
        page.line(4, &line, Tone::Plain);
    }
    if count > DIVERGENT_LINES_MAX as u64 {
        page.line(4, "… (more with --json)", Tone::Faint);
    }
}

/// Clears a terminal; elsewhere one round follows the other.
fn clear() -> &'static str {
    match std::io::IsTerminal::is_terminal(&std::io::stdout()) {
        true => "\x1b[H\x1b[2J",
        false => "",
    }
}

fn items(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_default()
}

fn milliseconds(value: &Value) -> Duration {
    Duration::from_millis(number(value))
}

fn seconds(text: &str) -> Result<Duration, String> {
    let parsed = text.parse().ok().map(Duration::try_from_secs_f64);
    match parsed {
        Some(Ok(pause)) if pause >= WATCH_MIN => Ok(pause),
        _ => Err(format!("{text:?} is not a number of seconds, 0.1 at least")),
    }
}

const PATIENCE: Duration = Duration::from_secs(10);
const WATCH_MIN: Duration = Duration::from_millis(100);
const DIVERGENT_LINES_MAX: usize = 5;
const DEGRADED: u8 = 3;

const AFTER_LONG_HELP: &str = "\
Columns:
  LATENCY  median of the latest 64 look-ups
  KNOWN    paths known to be there: all, where a muster feeds its catalog, else what was found
  HITS     look-ups of clients it had a path for
  GIVEN    bytes of NARs read there

JSON:
  --json prints what /healthz answers. The form is stable: keys are added, never changed.
    status        ok, degraded (an upstream is sick, or the cache cannot be used), unreachable (no
                  muster answers; error)
    version, uptime-ms
    upstreams[]   uri, state (connecting, well, sick), trusted, peer, error, retry-in-ms,
                  last-error {error, age-ms}, latency-ms, asked, hits, found, paths (all that it
                  has, where it tells), refused, nars, nar-bytes
    narinfo       requests, memory-hits, found, prefetched, absent,
                  absent-without-full-knowledge, divergent, in-memory
    nar           requests, bytes, ahead, ahead-claimed, ahead-dropped, absent, resumed, cut, corrupt
    divergent[]   path, served, upstream, nar-hash
    cache         null where no NARs are kept on disk: entries, bytes, bytes-reserved, bytes-max,
                  look-ups (paths known without their NAR), hits, misses (NARs asked for), recalled,
                  fills, evictions, corrupt, degraded (why it cannot be used, or null)

Exit status: 0 if all is well, 1 if no muster answers, 2 if the command line was wrong, 3 if an
upstream is sick or the cache cannot be used.";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_shown_with_its_size_and_hit_rate() {
        let cache =
            json!({ "bytes": 3_u64 << 30, "bytes-max": 10_u64 << 30, "hits": 3, "misses": 1 });
        let expected = "cache      3.0 GiB of 10 GiB, 75 % of 4 NARs from it";
        assert_eq!(cache_line(&cache), expected);
        let empty = json!({ "bytes": 0, "hits": 0, "misses": 0 });
        assert_eq!(cache_line(&empty), "cache      0 B, - of 0 NARs from it");
    }
}
