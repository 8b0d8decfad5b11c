//! From a configured binary cache to one that is asked: credentials and certificates are read here.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use anyhow::{Context as _, bail};
use rustls::ClientConfig;
use tracing::warn;

use crate::codec::decompress::Decoder;
use crate::config::{self, Config};
use crate::nix::hash::NarHash;
use crate::nix::store_uri::StoreKind;
use crate::upstream::binary_cache::{BinaryCache, BinaryCacheOptions};
use crate::upstream::cache_files::CacheFiles;
use crate::upstream::cache_folder::CacheFolder;
use crate::upstream::cache_http::CacheHttp;
use crate::upstream::catalog_feed::FeedOptions;
use crate::upstream::http_client::{Access, Got, HttpClient, HttpOptions};
use crate::upstream::http_credentials::Credentials;
use crate::upstream::http_tls::{tls, tls_without_certificates};
use crate::upstream::http_url::{CacheUrl, Scheme};

/// What all binary caches share.
#[derive(Default)]
pub(super) struct BinaryCaches {
    decoder: Decoder,
    /// Read when the first cache over HTTP starts; again with the next one where that failed.
    tls: OnceLock<Arc<ClientConfig>>,
    /// Whether it was said that there are no certificates.
    warned: AtomicBool,
}

impl BinaryCaches {
    /// Starts to ask a cache; it is connected to in the background.
    pub(super) fn start(
        &self,
        upstream: &config::Upstream,
        config: &Config,
    ) -> anyhow::Result<BinaryCache> {
        let files: Arc<dyn CacheFiles> = match upstream.uri.kind() {
            StoreKind::File(path) => Arc::new(CacheFolder::new(path, upstream.query_timeout)),
            kind => Arc::new(self.over_http(upstream, &kind.to_string())?),
        };
        let options = BinaryCacheOptions {
            large_max: upstream.nar_transfers_max,
            catalog: config.catalog.then(FeedOptions::default),
            ..BinaryCacheOptions::default()
        };
        Ok(BinaryCache::start(
            upstream.name.clone(),
            config.store_dir.clone(),
            files,
            self.decoder.clone(),
            options,
        ))
    }

    /// Asks a cache over HTTP for one file, as the server asks it for all; returns its body's options too.
    ///
    /// Dropped, the question is given up.
    pub(super) async fn ask(
        &self,
        upstream: &config::Upstream,
        file: &str,
    ) -> anyhow::Result<(Got, HttpOptions)> {
        let (client, options) = self.client(upstream, &upstream.uri.kind().to_string())?;
        let file = client.cache().file(file)?;
        Ok((client.ask(file).await?, options))
    }

    fn over_http(&self, upstream: &config::Upstream, url: &str) -> anyhow::Result<CacheHttp> {
        let (client, options) = self.client(upstream, url)?;
        let decoder = self.decoder.clone();
        Ok(CacheHttp::new(
            client,
            options,
            decoder,
            upstream.query_timeout,
        ))
    }

    fn client(
        &self,
        upstream: &config::Upstream,
        url: &str,
    ) -> anyhow::Result<(HttpClient, HttpOptions)> {
        let cache = CacheUrl::parse(url)?;
        let access = Access {
            credentials: credentials(upstream, cache.host())?,
            hosts: upstream.allowed_nar_hosts.clone(),
        };
        let options = HttpOptions {
            connect_timeout: upstream.connect_timeout,
            head_timeout: upstream.query_timeout,
            silence: upstream.query_timeout,
            ..HttpOptions::default()
        };
        let tls = self.tls_for(cache.scheme())?;
        let client = HttpClient::new(cache, tls, access, options.clone());
        Ok((client, options))
    }

    /// Plain HTTP needs no certificates, but for a redirect to HTTPS: what has none is a minimal machine or container.
    fn tls_for(&self, scheme: Scheme) -> anyhow::Result<Arc<ClientConfig>> {
        let error = match (self.tls(), scheme) {
            (Err(error), Scheme::Http) => error,
            (tls, _) => return tls,
        };
        if !self.warned.swap(true, Ordering::Relaxed) {
            let error = format!("{error:#}");
            warn!(
                error,
                "no certificates: caches are asked over plain http alone"
            );
        }
        Ok(tls_without_certificates()?)
    }

    fn tls(&self) -> anyhow::Result<Arc<ClientConfig>> {
        if let Some(tls) = self.tls.get() {
            return Ok(Arc::clone(tls));
        }
        let file = std::env::var_os("NIX_SSL_CERT_FILE").map(PathBuf::from);
        let file = file.filter(|file| !file.as_os_str().is_empty());
        let tls = tls(file.as_deref())?;
        Ok(Arc::clone(self.tls.get_or_init(|| tls)))
    }
}

/// What the secret files of an upstream say, by a hash: a change of them starts it anew at a reload.
pub(super) fn said(upstream: &config::Upstream) -> String {
    let files = [&upstream.credentials_file, &upstream.netrc_file];
    let hashes = files.into_iter().flatten().map(|file| match read(file) {
        Ok(text) => NarHash::of(text.as_bytes()).to_string(),
        Err(error) => error.to_string(),
    });
    hashes.collect::<Vec<_>>().join(" ")
}

/// Finds what a cache is shown; its own file goes before the netrc.
fn credentials(upstream: &config::Upstream, host: &str) -> anyhow::Result<Option<Credentials>> {
    if let Some(file) = &upstream.credentials_file {
        let credentials = Credentials::parse(&read(file)?);
        let credentials =
            credentials.with_context(|| format!("credentials-file {}", file.display()));
        return credentials.map(Some);
    }
    let Some(file) = &upstream.netrc_file else {
        return Ok(None);
    };
    let found = Credentials::from_netrc(&read(file)?, host);
    found.with_context(|| format!("netrc-file {}", file.display()))
}

fn read(file: &Path) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(file);
    let text = text.with_context(|| format!("cannot read {}", file.display()))?;
    if text.len() > SECRET_BYTES_MAX {
        bail!(
            "{} is too large to be a file of credentials",
            file.display()
        );
    }
    Ok(text)
}

const SECRET_BYTES_MAX: usize = 1 << 20;
