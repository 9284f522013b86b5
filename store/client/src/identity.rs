//! What a client proves itself with, and whom it trusts.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

const CA: &str = "ca.pem";
const CERT: &str = "client.pem";
const KEY: &str = "client.key";

/// A client's certificate and key, and the certificate of the cluster's authority; all PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct ClientIdentity {
    pub ca: String,
    pub cert: String,
    /// Secret.
    pub key: String,
}

impl std::fmt::Debug for ClientIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClientIdentity(..)")
    }
}

/// An identity that cannot be read, written or used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("{path}: {source}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{what} is not valid PEM: {reason}")]
    Pem { what: &'static str, reason: String },
}

impl ClientIdentity {
    /// Reads `ca.pem`, `client.pem` and `client.key` from a directory.
    pub fn load(dir: &Path) -> Result<Self, IdentityError> {
        let read = |name: &str| {
            let path = dir.join(name);
            fs::read_to_string(&path).map_err(|source| IdentityError::Io { path, source })
        };
        Ok(Self {
            ca: read(CA)?,
            cert: read(CERT)?,
            key: read(KEY)?,
        })
    }

    /// Writes them there; the key readable by its owner only.
    pub fn save(&self, dir: &Path) -> Result<(), IdentityError> {
        let fail = |path: &Path, source| IdentityError::Io {
            path: path.to_owned(),
            source,
        };
        fs::create_dir_all(dir).map_err(|e| fail(dir, e))?;
        for (name, text, mode) in [
            (CA, &self.ca, 0o644),
            (CERT, &self.cert, 0o644),
            (KEY, &self.key, 0o600),
        ] {
            let path = dir.join(name);
            // Never over an old file: its permissions would stay.
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(fail(&path, e)),
                _ => {}
            }
            let mut options = fs::OpenOptions::new();
            options.write(true).create_new(true).mode(mode);
            let mut file = options.open(&path).map_err(|e| fail(&path, e))?;
            file.write_all(text.as_bytes())
                .and_then(|()| file.sync_all())
                .map_err(|e| fail(&path, e))?;
        }
        Ok(())
    }

    pub(crate) fn parse(&self) -> Result<Parsed, IdentityError> {
        let certs = |what, text: &str| {
            let list: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
            match list {
                Ok(list) if !list.is_empty() => Ok(list),
                Ok(_) => Err(IdentityError::Pem {
                    what,
                    reason: "it holds no certificate".into(),
                }),
                Err(e) => Err(IdentityError::Pem {
                    what,
                    reason: e.to_string(),
                }),
            }
        };
        Ok(Parsed {
            ca: certs("the authority's certificate", &self.ca)?,
            cert: certs("the client's certificate", &self.cert)?,
            key: PrivateKeyDer::from_pem_slice(self.key.as_bytes()).map_err(|e| {
                IdentityError::Pem {
                    what: "the client's key",
                    reason: e.to_string(),
                }
            })?,
        })
    }
}

pub(crate) struct Parsed {
    pub(crate) ca: Vec<CertificateDer<'static>>,
    pub(crate) cert: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
}
