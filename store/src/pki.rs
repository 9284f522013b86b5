//! Certificates: the cluster's authority, made at the first start, and what it signs.
//!
//! Everyone proves themselves with a certificate of this authority, nodes and clients alike. A node's carries the fixed name
//! `tidepool-store`, may serve and connect; a client's may only connect. What someone may do is written as the certificate's
//! organisational unit.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use quinn::crypto::rustls::QuicServerConfig;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use tidepool_proto::wire::{ALPN, SERVER_NAME};
use tidepool_store_client::{ClientIdentity, transport};

use crate::error::StoreError;

const DIR: &str = "pki";
const CA_CERT: &str = "ca.pem";
const CA_KEY: &str = "ca.key";
const NODE_CERT: &str = "node.pem";
const NODE_KEY: &str = "node.key";

/// What a client's certificate is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A host that runs sandboxes.
    Host,
    /// A person or program that looks after the cluster.
    Operator,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Role::Host => "host",
            Role::Operator => "operator",
        }
    }
}

fn failed(e: impl std::fmt::Display) -> StoreError {
    StoreError::Pki(e.to_string())
}

/// The certificates in a data directory.
pub(crate) struct Pki {
    ca_cert: String,
    ca_key: String,
    node_cert: String,
    node_key: String,
}

impl Pki {
    /// Reads them, and makes what is not there yet.
    pub(crate) fn open(data: &Path) -> Result<Self, StoreError> {
        let dir = data.join(DIR);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(|e| StoreError::io(&dir, e))?;
        // The key is written first: a certificate in the directory means that its key is there too.
        let (ca_key, ca_cert) = match read(&dir.join(CA_CERT))? {
            Some(cert) => (must_read(&dir.join(CA_KEY))?, cert),
            None => {
                let (key, cert) = new_authority()?;
                write(&dir, CA_KEY, &key)?;
                write(&dir, CA_CERT, &cert)?;
                (key, cert)
            }
        };
        let (node_key, node_cert) = match read(&dir.join(NODE_CERT))? {
            Some(cert) => (must_read(&dir.join(NODE_KEY))?, cert),
            None => {
                let mut params = params("node", "store")?;
                params.subject_alt_names = vec![rcgen::SanType::DnsName(
                    SERVER_NAME.try_into().map_err(failed)?,
                )];
                params.extended_key_usages = vec![
                    ExtendedKeyUsagePurpose::ServerAuth,
                    ExtendedKeyUsagePurpose::ClientAuth,
                ];
                let (key, cert) = sign(&params, &ca_cert, &ca_key)?;
                write(&dir, NODE_KEY, &key)?;
                write(&dir, NODE_CERT, &cert)?;
                (key, cert)
            }
        };
        Ok(Self {
            ca_cert,
            ca_key,
            node_cert,
            node_key,
        })
    }

    /// Signs a new client certificate.
    pub(crate) fn issue(&self, role: Role) -> Result<ClientIdentity, StoreError> {
        let mut params = params("client", role.name())?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let (key, cert) = sign(&params, &self.ca_cert, &self.ca_key)?;
        Ok(ClientIdentity {
            ca: self.ca_cert.clone(),
            cert,
            key,
        })
    }

    /// The server's side of QUIC: only clients with a certificate of this authority.
    pub(crate) fn server(&self, loopback: bool) -> Result<quinn::ServerConfig, StoreError> {
        let certs = |pem: &str| -> Result<Vec<CertificateDer<'static>>, StoreError> {
            CertificateDer::pem_slice_iter(pem.as_bytes())
                .collect::<Result<_, _>>()
                .map_err(failed)
        };
        let mut roots = rustls::RootCertStore::empty();
        for cert in certs(&self.ca_cert)? {
            roots.add(cert).map_err(failed)?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
                .build()
                .map_err(failed)?;
        let key = PrivateKeyDer::from_pem_slice(self.node_key.as_bytes()).map_err(failed)?;
        let mut tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(failed)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(certs(&self.node_cert)?, key)
            .map_err(failed)?;
        tls.alpn_protocols = vec![ALPN.to_vec()];
        let quic = QuicServerConfig::try_from(tls).map_err(failed)?;
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(quic));
        config.transport_config(transport::connection(loopback));
        config.max_incoming(256);
        Ok(config)
    }
}

fn params(name: &str, unit: &str) -> Result<CertificateParams, StoreError> {
    let mut params = CertificateParams::new(Vec::<String>::new()).map_err(failed)?;
    let mut dn = DistinguishedName::new();
    dn.push(DnType::OrganizationName, "tidepool");
    dn.push(DnType::OrganizationalUnitName, unit);
    dn.push(DnType::CommonName, name);
    params.distinguished_name = dn;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    Ok(params)
}

fn new_authority() -> Result<(String, String), StoreError> {
    let mut params = params("tidepool authority", "authority")?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().map_err(failed)?;
    let cert = params.self_signed(&key).map_err(failed)?;
    Ok((key.serialize_pem(), cert.pem()))
}

fn sign(
    params: &CertificateParams,
    ca_cert: &str,
    ca_key: &str,
) -> Result<(String, String), StoreError> {
    let ca_key = KeyPair::from_pem(ca_key).map_err(failed)?;
    let issuer = Issuer::from_ca_cert_pem(ca_cert, ca_key).map_err(failed)?;
    let key = KeyPair::generate().map_err(failed)?;
    let cert = params.signed_by(&key, &issuer).map_err(failed)?;
    Ok((key.serialize_pem(), cert.pem()))
}

fn read(path: &PathBuf) -> Result<Option<String>, StoreError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(StoreError::io(path, e)),
    }
}

fn must_read(path: &PathBuf) -> Result<String, StoreError> {
    fs::read_to_string(path).map_err(|e| StoreError::io(path, e))
}

/// Whole or not at all, and durable.
fn write(dir: &Path, name: &str, text: &str) -> Result<(), StoreError> {
    crate::files::write_atomic(&dir.join(name), text.as_bytes(), 0o600)
}
