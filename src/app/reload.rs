//! What of a configuration that is read anew cannot be taken over by a running muster.

use tracing::warn;

use crate::config::Config;

/// Says which settings differ from those that `running` was started with and need a restart.
pub(super) fn warn_of_restart(running: &Config, anew: &Config) {
    for setting in needing_restart(running, anew) {
        warn!(setting, "changed, but takes a restart to be heeded");
    }
}

fn needing_restart(running: &Config, anew: &Config) -> Vec<&'static str> {
    let settings = [
        ("listen", running.listen != anew.listen),
        ("store-dir", running.store_dir != anew.store_dir),
        ("cache-dir", running.cache_dir != anew.cache_dir),
        ("cache-size", running.cache_bytes != anew.cache_bytes),
        (
            "compression-level",
            (running.zstd_level, running.xz_level) != (anew.zstd_level, anew.xz_level),
        ),
        ("max-encoders", running.max_encoders != anew.max_encoders),
        ("negative-ttl", running.negative_ttl != anew.negative_ttl),
        (
            "revalidate-after",
            running.revalidate_after != anew.revalidate_after,
        ),
        (
            "memory-cache-size",
            running.memory_cache_bytes != anew.memory_cache_bytes,
        ),
        (
            "roots-lifetime",
            running.roots_lifetime != anew.roots_lifetime,
        ),
        ("prefetch", running.prefetch != anew.prefetch),
        (
            "prefetch-closure",
            running.prefetch_closure != anew.prefetch_closure,
        ),
        (
            "prefetch-nars",
            running.prefetch_nars_bytes != anew.prefetch_nars_bytes,
        ),
        ("stall-timeout", running.stall_timeout != anew.stall_timeout),
        (
            "max-connections",
            running.max_connections != anew.max_connections,
        ),
        ("stop-timeout", running.stop_timeout != anew.stop_timeout),
        ("log", running.log != anew.log),
        ("log-format", running.log_format != anew.log_format),
    ];
    let changed = settings.into_iter().filter(|(_, changed)| *changed);
    changed.map(|(name, _)| name).collect()
}
