//! Certificates.

use std::sync::Arc;

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::options::TlsFiles;
use crate::error::{Error, Result};

/// Speaks TLS 1.2 and 1.3 with the certificate of the files; `protocols` are offered in their order.
///
/// # Errors
/// [`Error::InvalidOption`] where the files are no certificate and its key.
pub(super) fn acceptor(files: &TlsFiles, protocols: &[&str]) -> Result<TlsAcceptor> {
    let invalid = |option: &'static str, path: &std::path::Path, reason: String| {
        let reason = format!("{}: {reason}", path.display());
        Error::InvalidOption { option, reason }
    };
    let TlsFiles { certificates, key } = files;
    let of_certificates = |reason: String| invalid("--tls-cert", certificates, reason);
    let of_key = |reason: String| invalid("--tls-key", key, reason);
    let chain: std::result::Result<Vec<CertificateDer<'static>>, _> =
        CertificateDer::pem_file_iter(certificates).and_then(Iterator::collect);
    let chain = chain.map_err(|error| of_certificates(error.to_string()))?;
    if chain.is_empty() {
        return Err(of_certificates("there is no certificate in it (PEM)".into()));
    }
    let key = PrivateKeyDer::from_pem_file(key).map_err(|error| of_key(error.to_string()))?;
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key));
    let mut config = config.map_err(|error| of_key(error.to_string()))?;
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    Ok(TlsAcceptor::from(Arc::new(config)))
}
