//! The TLS side of a connection.
//!
//! The client would build it from files by itself, but with the process's default crypto provider, and there is none where
//! two of them are linked, as beside the AWS client: it would panic. So the provider is named here, and what is wrong with
//! a file is told by its setting.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use anybroker_core::{Error, ErrorKind, Result};
use async_nats::rustls::crypto::ring;
use async_nats::rustls::pki_types::pem::PemObject;
use async_nats::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use async_nats::rustls::{ClientConfig, RootCertStore};

use crate::config::Settings;

/// What is trusted, and what this client shows. Reads files.
pub(crate) fn config(settings: &Settings) -> Result<ClientConfig> {
    let roots = match &settings.tls_ca {
        None => system_roots().clone(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for certificate in certificates("tls_ca", path)? {
                roots.add(certificate).map_err(|error| unreadable("tls_ca", path, &error))?;
            }
            Arc::new(roots)
        }
    };
    let invalid = |error: &dyn std::error::Error| Error::new(ErrorKind::ConfigInvalid, "connect", error.to_string());
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| invalid(&error))?
        .with_root_certificates(roots);
    let Some((certificate, key)) = &settings.tls_client else { return Ok(builder.with_no_client_auth()) };
    let chain = certificates("tls_certificate", certificate)?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| unreadable("tls_key", key, &error))?;
    builder.with_client_auth_cert(chain, private).map_err(|error| unreadable("tls_certificate", certificate, &error))
}

/// Read once for the process. What cannot be read is left out: a certificate that needs it is refused.
fn system_roots() -> &'static Arc<RootCertStore> {
    static ROOTS: OnceLock<Arc<RootCertStore>> = OnceLock::new();
    ROOTS.get_or_init(|| {
        let mut roots = RootCertStore::empty();
        let found = rustls_native_certs::load_native_certs();
        for error in found.errors {
            tracing::debug!(%error, "the system's certificate authorities");
        }
        roots.add_parsable_certificates(found.certs);
        Arc::new(roots)
    })
}

fn certificates(field: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let read = CertificateDer::pem_file_iter(path).map_err(|error| unreadable(field, path, &error))?;
    let found: Vec<_> = read.collect::<std::result::Result<_, _>>().map_err(|error| unreadable(field, path, &error))?;
    if found.is_empty() {
        let text = format!("nats.{field}: there is no certificate in it; expected PEM");
        return Err(Error::new(ErrorKind::ConfigInvalid, "connect", text).with("file", path.display()));
    }
    Ok(found)
}

/// The readers' texts name what is wrong, never the contents.
fn unreadable(field: &'static str, path: &Path, error: &dyn std::error::Error) -> Error {
    let text = format!("nats.{field} cannot be used: {error}; expected a PEM file");
    Error::new(ErrorKind::ConfigInvalid, "connect", text).with("file", path.display())
}
