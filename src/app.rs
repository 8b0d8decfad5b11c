//! Wiring: from a checked configuration to running parts; order of start and stop.
//!
//! ```text
//! start   listeners -> upstreams (connecting in the background) -> server -> ready
//! SIGHUP  configuration and machines anew; upstreams that stay keep their connections, what needs
//!         a restart is said
//! stop    no new connections -> running transfers, bounded -> background work -> upstreams
//! ```

mod announce;
mod binary_caches;
mod files;
mod listeners;
mod reload;
pub mod sign_all;
pub(crate) mod upstreams;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{error, info, warn};

use crate::cache::backend::Backend;
use crate::cache::disk::{self, DiskCache};
use crate::cache::memory;
use crate::codec::compression::{EncoderOptions, Encoding};
use crate::config::{CompressionSetting, Config};
use crate::nix::cache_info::CacheInfo;
use crate::nix::signature::SecretKey;
use crate::server::{self, Info};
use crate::substituter::publish::Publisher;
use crate::substituter::{
    self, Setup, Substituter, ahead, closure, filling, health, transfer, write_behind,
};

use listeners::Opened;
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
    // First of all: a signal that nobody listens for ends the process.
    let mut signals = Signals::listen()?;
    let Opened {
        listeners,
        addresses,
        only_loopback,
    } = listeners::open(&config)?;
    let mut upstreams = Upstreams::new()?;
    let first = setup(&config, &mut upstreams, only_loopback)?;
    let (tell_info, info) = watch::channel(server_info(&config));
    let (tell_stop, stop) = watch::channel(false);
    let cache = open_cache(&config);
    let substituter = Substituter::new(substituter_options(&config), first, cache);

    let mut serving = tokio::spawn(server::serve(
        listeners,
        substituter.clone(),
        info,
        server_options(&config, files::raise_limit()),
        stop,
    ));
    let caring = substituter.clone();
    let mut background = JoinSet::new();
    background.spawn(async move { caring.care().await });
    announce::start(&config, &addresses, &substituter.setup());
    background.spawn(announce::upstreams(substituter.setup()));
    background.spawn(watchdog());
    notify(&[NotifyState::Ready]);

    let mut current = config.clone();
    loop {
        let told = tokio::select! {
            told = signals.next() => Some(told),
            () = tokio::time::sleep(upstreams::RETRY), if upstreams.leaves_out() => None,
        };
        match told {
            Some(Told::Stop) => break,
            Some(Told::Reload) => {}
            None => {
                match setup(&current, &mut upstreams, only_loopback) {
                    Ok(setup) if setup.asks_others_than(&substituter.setup()) => {
                        substituter.replace(setup);
                        info!("an upstream that was left out is there");
                    }
                    Ok(_) => {}
                    Err(error) => warn!(error = format!("{error:#}"), "upstreams not tried again"),
                }
                continue;
            }
        }
        notify_reloading();
        let anew = load().and_then(|anew| {
            let setup = setup(&anew, &mut upstreams, only_loopback)?;
            Ok((anew, setup))
        });
        match anew {
            Ok((anew, setup)) => {
                reload::warn_of_restart(&config, &anew);
                let changed = server_info(&anew);
                if changed.public_keys != tell_info.borrow().public_keys {
                    let keys = setup.publisher.public_keys();
                    info!(%keys, "signing with other keys, which clients must trust");
                }
                tell_info.send_replace(changed);
                let upstreams = setup.members.len();
                substituter.replace(setup);
                // After it: whoever reads this line may rely on it.
                info!(upstreams, "configuration read anew");
                current = anew;
            }
            Err(error) => error!(
                error = format!("{error:#}"),
                "configuration not taken over, the old one stays"
            ),
        }
        notify(&[NotifyState::Ready]);
    }
    info!("stopping");
    notify(&[NotifyState::Stopping]);
    tell_stop.send_replace(true);
    tokio::select! {
        _ = &mut serving => {}
        () = signals.stop() => {
            warn!("told twice to stop, transfers are cut");
            serving.abort();
        }
    }
    background.shutdown().await;
    substituter.stop().await;
    Ok(())
}

/// The signals that are listened for.
struct Signals {
    reload: Signal,
    terminate: Signal,
    interrupt: Signal,
}

/// What a signal says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Reload,
    Stop,
}

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        let listen = |kind, name| {
            let signal = signal(kind);
            signal.with_context(|| format!("cannot listen for {name}"))
        };
        Ok(Self {
            reload: listen(SignalKind::hangup(), "SIGHUP")?,
            terminate: listen(SignalKind::terminate(), "SIGTERM")?,
            interrupt: listen(SignalKind::interrupt(), "SIGINT")?,
        })
    }

    async fn next(&mut self) -> Told {
        tokio::select! {
            _ = self.reload.recv() => Told::Reload,
            _ = self.terminate.recv() => Told::Stop,
            _ = self.interrupt.recv() => Told::Stop,
        }
    }

    async fn stop(&mut self) {
        while self.next().await != Told::Stop {}
    }
}

/// Opens the cache on disk, if it is on; one that cannot be opened keeps nothing, and says so.
fn open_cache(config: &Config) -> Option<Arc<dyn Backend>> {
    let dir = config.cache_dir.as_ref()?;
    let keys = config.secret_keys.iter().map(SecretKey::public).collect();
    let mut options = disk::Options::new(config.cache_bytes, config.store_dir.clone(), keys);
    options.priority = config.priority;
    options.want_mass_query = config.want_mass_query;
    Some(Arc::new(DiskCache::open(dir, options)))
}

fn setup(config: &Config, upstreams: &mut Upstreams, only_loopback: bool) -> anyhow::Result<Setup> {
    Ok(Setup {
        members: upstreams.members(config)?,
        publisher: Publisher {
            keys: config.secret_keys.clone(),
            store_dir: config.store_dir.clone(),
            encoding: encoding(config, only_loopback),
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
        shared_idle: Duration::from_secs(3600),
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
            tail_bytes: 1 << 20,
            stall: config.stall_timeout,
            stall_last: STALL_LAST.max(config.stall_timeout * 2),
            others_within: Duration::from_millis(500),
            refusal: Duration::from_secs(6),
            encoder: EncoderOptions {
                concurrent: config.max_encoders,
                zstd_level: config.zstd_level,
                xz_level: config
                    .xz_level
                    .unwrap_or(EncoderOptions::default().xz_level),
            },
        },
        fill: filling::Options::default(),
        write_behind: write_behind::Options::default(),
        prefetch: config.prefetch.then(|| closure::Options {
            whole: config.prefetch_closure,
            ..closure::Options::default()
        }),
        ahead: (config.prefetch && config.prefetch_nars_bytes > 0).then(|| ahead::Options {
            bytes_max: config.prefetch_nars_bytes,
            ..ahead::Options::default()
        }),
        keep_interval: config.roots_lifetime / 2,
        tasks_max: 10_000,
    }
}

/// Tells systemd that the configuration is read anew, and when that began, as it wants to know.
fn notify_reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(began) => notify(&[NotifyState::Reloading, began]),
        Err(error) => warn!(%error, "cannot tell systemd"),
    }
}

fn notify(states: &[NotifyState<'_>]) {
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
        notify(&[NotifyState::Watchdog]);
        tokio::time::sleep(interval / 2).await;
    }
}

/// How long the last holder of a NAR may bring nothing, at least: a cut is worse than a pause. In half of it that holder
/// is tried once more, with no less patience than any other.
const STALL_LAST: Duration = Duration::from_secs(30);

/// Files that are not clients' connections: pipes to ssh, listeners, the runtime's own.
const OWN_FILES: usize = 200;
