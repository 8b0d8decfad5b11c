//! Wiring: from a checked configuration to running parts; order of start and stop.
//!
//! ```text
//! start   listeners -> upstreams (connecting in the background) -> server -> ready
//! SIGHUP  configuration and machines anew; upstreams that stay keep their connections
//! stop    no new connections -> running transfers, bounded -> background work -> upstreams
//! ```

mod announce;
mod files;
mod listeners;
mod upstreams;

use std::time::{Duration, Instant};

use anyhow::Context as _;
use bytes::Bytes;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::cache::memory;
use crate::codec::compression::EncoderOptions;
use crate::codec::compression::Encoding;
use crate::config::{CompressionSetting, Config};
use crate::nix::cache_info::CacheInfo;
use crate::server::{self, Info};
use crate::substituter::publish::Publisher;
use crate::substituter::{self, Setup, Substituter, closure, health, transfer};

use upstreams::Upstreams;

/// Serves until SIGTERM or SIGINT; `load` reads the configuration, at start and at SIGHUP.
pub fn serve(load: &dyn Fn() -> anyhow::Result<Config>) -> anyhow::Result<()> {
    let config = load()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("muster")
        .build()
        .context("cannot start the threads")?;
    let served = runtime.block_on(run(config, load));
    // Encoders and file look-ups that still run on blocking threads have nobody to give to.
    runtime.shutdown_timeout(Duration::from_secs(1));
    served
}

async fn run(config: Config, load: &dyn Fn() -> anyhow::Result<Config>) -> anyhow::Result<()> {
    let started = Instant::now();
    // Before anybody is told that we run: a signal right after that must not end the process.
    let mut reload = signal(SignalKind::hangup()).context("cannot listen for SIGHUP")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let opened = listeners::open(&config)?;
    let mut upstreams = Upstreams::new(started)?;
    let encoding = encoding(&config, opened.only_loopback);
    let first = setup(&config, &mut upstreams, encoding)?;
    let (tell_info, info) = watch::channel(server_info(&config));
    let (tell_stop, stop) = watch::channel(false);
    let substituter = Substituter::new(substituter_options(&config), first);

    let serving = tokio::spawn(server::serve(
        opened.listeners,
        substituter.clone(),
        info,
        server_options(&config, files::raise_limit()),
        stop,
    ));
    let caring = substituter.clone();
    let caring = tokio::spawn(async move { caring.care().await });
    announce::start(&config, &opened.addresses, &substituter.setup());
    let announcing = tokio::spawn(announce::upstreams(substituter.setup()));
    notify(&[sd_notify::NotifyState::Ready]);
    let watchdog = tokio::spawn(watchdog());

    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = reload.recv() => {
                notify_reloading();
                match load().and_then(|config| {
                    let setup = setup(&config, &mut upstreams, encoding)?;
                    Ok((config, setup))
                }) {
                    Ok((config, setup)) => {
                        let changed = server_info(&config);
                        if changed.public_keys != tell_info.borrow().public_keys {
                            let keys = setup.publisher.public_keys();
                            info!(%keys, "signing with other keys, which clients must trust");
                        }
                        tell_info.send_replace(changed);
                        info!(upstreams = setup.members.len(), "configuration read anew");
                        substituter.replace(setup);
                    }
                    Err(error) => error!(error = format!("{error:#}"), "configuration not taken over, the old one stays"),
                }
                notify(&[sd_notify::NotifyState::Ready]);
            }
        }
    }
    info!("stopping");
    notify(&[sd_notify::NotifyState::Stopping]);
    tell_stop.send_replace(true);
    // A second signal does not wait.
    tokio::select! {
        _ = serving => {}
        _ = terminate.recv() => warn!("told twice to stop, transfers are cut"),
        _ = interrupt.recv() => warn!("told twice to stop, transfers are cut"),
    }
    for task in [caring, announcing, watchdog] {
        task.abort();
    }
    substituter.stop().await;
    Ok(())
}

fn setup(config: &Config, upstreams: &mut Upstreams, encoding: Encoding) -> anyhow::Result<Setup> {
    Ok(Setup {
        members: upstreams.members(config)?,
        publisher: Publisher {
            keys: config.secret_keys.clone(),
            store_dir: config.store_dir.clone(),
            encoding,
        },
    })
}

/// `auto` compresses where bytes leave the machine.
fn encoding(config: &Config, only_loopback: bool) -> Encoding {
    match config.compression {
        CompressionSetting::Auto if only_loopback => Encoding::None,
        CompressionSetting::Auto | CompressionSetting::Zstd => Encoding::Zstd,
        CompressionSetting::None => Encoding::None,
        CompressionSetting::Xz => Encoding::Xz,
    }
}

fn server_info(config: &Config) -> Info {
    let cache_info = CacheInfo {
        store_dir: config.store_dir.clone(),
        want_mass_query: config.want_mass_query,
        priority: config.priority,
    };
    let public_keys = config
        .secret_keys
        .iter()
        .map(|key| format!("{}\n", key.public()));
    Info {
        cache_info: Bytes::from(cache_info.render()),
        public_keys: Bytes::from(public_keys.collect::<String>()),
    }
}

fn server_options(config: &Config, files_max: usize) -> server::Options {
    let room = files_max.saturating_sub(OWN_FILES).max(OWN_FILES);
    if config.max_connections > room {
        warn!(
            "the limit of open files is {files_max}, so {room} clients are served at once; raise it \
             (ulimit -n, LimitNOFILE=) or lower max-connections"
        );
    }
    server::Options {
        connections_max: config.max_connections.min(room),
        idle: Duration::from_secs(90),
        write_stall: Duration::from_secs(300),
        stop: config.stop_timeout,
    }
}

fn substituter_options(config: &Config) -> substituter::Options {
    substituter::Options {
        memory: memory::Options {
            bytes_max: config.memory_cache_bytes,
            revalidate_after: config.revalidate_after,
            negative_ttl: config.negative_ttl,
        },
        health: health::Options::default(),
        transfer: transfer::Options {
            whole_bytes_max: 4 << 20,
            whole_kib_max: 256 << 10,
            stall: Duration::from_secs(5),
            stall_last: Duration::from_secs(30),
            encoder: EncoderOptions {
                concurrent: config.max_encoders,
                zstd_level: config
                    .zstd_level
                    .unwrap_or(EncoderOptions::default().zstd_level),
                xz_level: config
                    .xz_level
                    .unwrap_or(EncoderOptions::default().xz_level),
            },
        },
        prefetch: config.prefetch.then(closure::Options::default),
        keep_interval: config.roots_lifetime / 2,
        tasks_max: 10_000,
    }
}

/// Tells systemd that a reload begins, and when: `Type=notify-reload` asks for the time too.
fn notify_reloading() {
    let reloading = sd_notify::NotifyState::Reloading;
    match sd_notify::NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[reloading, now]),
        Err(_) => notify(&[reloading]),
    }
}

fn notify(states: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        warn!(%error, "cannot tell systemd");
    }
}

/// Tells systemd twice in each interval that the threads still turn.
async fn watchdog() {
    let Some(interval) = sd_notify::watchdog_enabled() else {
        return;
    };
    loop {
        notify(&[sd_notify::NotifyState::Watchdog]);
        tokio::time::sleep(interval / 2).await;
    }
}

/// Files that are not clients' connections: pipes to ssh, listeners, the runtime's own.
const OWN_FILES: usize = 200;
