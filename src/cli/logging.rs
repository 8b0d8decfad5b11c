//! The log: on standard error, for people or as JSON.

use std::io::{self, IsTerminal as _};
use std::sync::Once;

use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// Starts the log, once; what a later configuration says of it needs a restart.
pub(super) fn start(directives: &str, format: LogFormat) {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        // Checked with the configuration.
        let filter = EnvFilter::new(directives);
        let log = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(io::stderr);
        match format {
            LogFormat::Json => log.json().init(),
            LogFormat::Text => {
                let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
                let log = log.with_ansi(colour).with_target(false);
                // The journal has its own clock.
                if std::env::var_os("JOURNAL_STREAM").is_some() {
                    log.without_time().init();
                } else {
                    log.init();
                }
            }
        }
    });
}
