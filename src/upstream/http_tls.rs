//! TLS as a client: which certificates a server is judged by.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hyper_rustls::ConfigBuilderExt as _;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, ConfigBuilder, RootCertStore, WantsVerifier};

/// Reads the certificates that servers are judged by.
///
/// A file (`NIX_SSL_CERT_FILE`, as Nix has it) is all there is; without one it is the system's, or what
/// `SSL_CERT_FILE` and `SSL_CERT_DIR` name.
pub fn tls(file: Option<&Path>) -> Result<Arc<ClientConfig>, TlsError> {
    let builder = builder()?;
    let Some(file) = file else {
        let builder = builder.with_native_roots().map_err(TlsError::System)?;
        return Ok(Arc::new(builder.with_no_client_auth()));
    };
    let unreadable = |cause: String| TlsError::File {
        file: file.to_owned(),
        cause,
    };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(file).map_err(|e| unreadable(e.to_string()))? {
        let certificate = certificate.map_err(|e| unreadable(e.to_string()))?;
        // One that rustls cannot use is left out, as in the system's own list.
        _ = roots.add(certificate);
    }
    if roots.is_empty() {
        return Err(unreadable("there is no certificate in it".to_owned()));
    }
    Ok(Arc::new(
        builder.with_root_certificates(roots).with_no_client_auth(),
    ))
}

/// Judges every server to be a stranger: for plain HTTP on a machine that has no certificates.
pub fn tls_without_certificates() -> Result<Arc<ClientConfig>, TlsError> {
    let builder = builder()?.with_root_certificates(RootCertStore::empty());
    Ok(Arc::new(builder.with_no_client_auth()))
}

fn builder() -> Result<ConfigBuilder<ClientConfig, WantsVerifier>, TlsError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsError::Setup(error.to_string()))
}

/// Why no server can be judged.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The library refuses.
    #[error("cannot set up tls: {0}")]
    Setup(String),
    /// The system has none.
    #[error("cannot read the system's certificates; name a file with SSL_CERT_FILE")]
    System(#[source] std::io::Error),
    /// The file cannot be used.
    #[error("cannot use the certificates in {}: {cause}", .file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// Why.
        cause: String,
    },
}
