//! Certificates: the cluster's authority, made with the cluster, and what it signs.
//!
//! Everyone proves themselves with a certificate of this authority: nodes, clients, and who holds a join token. What someone may do is
//! the certificate's organisational unit ([`Role`]), who they are its common name (`node-3`). All end at a date; a node signs its own anew
//! in time, which it can because every node has the authority's key: were it on one node only, losing that node would be losing the
//! cluster's ability to replace it.
//!
//! Elsewhere on purpose: what roles may do ([`crate::roles`]), join tokens ([`crate::join`]).

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use quinn::crypto::rustls::QuicServerConfig;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use tidepool_proto::wire::{ALPN, PEER_ALPN, SERVER_NAME};
use tidepool_store_client::{ClientIdentity, transport};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::error::StoreError;
use crate::roles::Role;

const DIR: &str = "pki";
const CA_CERT: &str = "ca.pem";
const CA_KEY: &str = "ca.key";
const NODE_CERT: &str = "node.pem";
const NODE_KEY: &str = "node.key";

const DAY: Duration = Duration::from_secs(24 * 3600);
/// How long the authority lasts.
const AUTHORITY: Duration = Duration::from_secs(30 * 365 * 24 * 3600);
/// How long a node's certificate lasts; it is renewed at a start with less than a third left.
const NODE: Duration = Duration::from_secs(3 * 365 * 24 * 3600);
/// How long a client's certificate lasts unless told otherwise.
pub(crate) const CLIENT: Duration = Duration::from_secs(365 * 24 * 3600);
/// Clocks may differ by this much.
const SKEW: Duration = Duration::from_secs(3600);

fn failed(e: impl std::fmt::Display) -> StoreError {
    StoreError::Pki(e.to_string())
}

/// Who the other side of a connection is, by its certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) role: Role,
    /// The common name.
    pub(crate) name: String,
}

impl Caller {
    /// Reads it from the certificate with which a connection was made, which TLS has verified.
    pub(crate) fn of(connection: &quinn::Connection) -> Result<Self, StoreError> {
        let identity = connection
            .peer_identity()
            .and_then(|i| i.downcast::<Vec<CertificateDer<'static>>>().ok())
            .ok_or_else(|| failed("the connection has no certificate"))?;
        let first = identity
            .first()
            .ok_or_else(|| failed("the connection has no certificate"))?;
        Self::read(first)
    }

    fn read(der: &[u8]) -> Result<Self, StoreError> {
        let (_, cert) = X509Certificate::from_der(der).map_err(failed)?;
        let subject = cert.subject();
        let mut units = subject.iter_organizational_unit();
        let role = units
            .next()
            .and_then(|u| u.as_str().ok())
            .and_then(Role::of)
            .ok_or_else(|| failed("the certificate names no role"))?;
        let mut names = subject.iter_common_name();
        let name = names.next().and_then(|n| n.as_str().ok());
        Ok(Self {
            role,
            name: name.unwrap_or_default().to_owned(),
        })
    }

    /// The number of a store node.
    pub(crate) fn node(&self) -> Option<u64> {
        let number = self.name.strip_prefix("node-")?.parse().ok()?;
        (self.role == Role::Store && number != 0).then_some(number)
    }
}

/// The certificates in a data directory.
#[derive(Clone)]
pub(crate) struct Pki {
    ca_cert: String,
    ca_key: String,
    node_cert: String,
    node_key: String,
}

impl Pki {
    /// Reads those of node `node`, and makes what is not there yet.
    pub(crate) fn open(data: &Path, node: u64) -> Result<Self, StoreError> {
        let dir = make_dir(data)?;
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
        let old = match read(&dir.join(NODE_CERT))? {
            Some(cert) if is_fresh(&cert)? => Some((must_read(&dir.join(NODE_KEY))?, cert)),
            _ => None,
        };
        let (node_key, node_cert) = match old {
            Some(pair) => pair,
            None => {
                // A renewal keeps the key: the two files are then never of different pairs.
                let key = match read(&dir.join(NODE_KEY))? {
                    Some(pem) => KeyPair::from_pem(&pem).map_err(failed)?,
                    None => KeyPair::generate().map_err(failed)?,
                };
                let params = node_params(node)?;
                let cert = sign(params, &key, &ca_cert, &ca_key)?;
                write(&dir, NODE_KEY, &key.serialize_pem())?;
                write(&dir, NODE_CERT, &cert)?;
                (key.serialize_pem(), cert)
            }
        };
        Ok(Self {
            ca_cert,
            ca_key,
            node_cert,
            node_key,
        })
    }

    /// Writes what a new node was given. The certificate comes last: with it the directory is complete.
    pub(crate) fn install(
        data: &Path,
        ca: (&str, &str),
        key: &str,
        cert: &str,
    ) -> Result<(), StoreError> {
        let dir = make_dir(data)?;
        write(&dir, CA_KEY, ca.1)?;
        write(&dir, CA_CERT, ca.0)?;
        write(&dir, NODE_KEY, key)?;
        write(&dir, NODE_CERT, cert)
    }

    /// The key that a node joins with: made once and kept, so that joining again is joining as the same.
    pub(crate) fn joining_key(data: &Path) -> Result<KeyPair, StoreError> {
        let dir = make_dir(data)?;
        if let Some(pem) = read(&dir.join(NODE_KEY))? {
            return KeyPair::from_pem(&pem).map_err(failed);
        }
        let key = KeyPair::generate().map_err(failed)?;
        write(&dir, NODE_KEY, &key.serialize_pem())?;
        Ok(key)
    }

    /// Signs a new client certificate.
    pub(crate) fn issue(&self, role: Role, valid: Duration) -> Result<ClientIdentity, StoreError> {
        self.issue_named(role, "client", valid)
    }

    pub(crate) fn issue_named(
        &self,
        role: Role,
        name: &str,
        valid: Duration,
    ) -> Result<ClientIdentity, StoreError> {
        let mut params = params(name, role.name(), valid)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().map_err(failed)?;
        let cert = sign(params, &key, &self.ca_cert, &self.ca_key)?;
        Ok(ClientIdentity {
            ca: self.ca_cert.clone(),
            cert,
            key: key.serialize_pem(),
        })
    }

    /// Signs the certificate of node `node` for the key of a signing request, of which nothing else counts.
    pub(crate) fn sign_node(&self, csr: &SigningRequest, node: u64) -> Result<String, StoreError> {
        let request = CertificateSigningRequestParams {
            params: node_params(node)?,
            public_key: csr.0.public_key.clone(),
        };
        let ca_key = KeyPair::from_pem(&self.ca_key).map_err(failed)?;
        let issuer = Issuer::from_ca_cert_pem(&self.ca_cert, ca_key).map_err(failed)?;
        Ok(request.signed_by(&issuer).map_err(failed)?.pem())
    }

    /// The authority's certificate and key.
    pub(crate) fn authority(&self) -> (&str, &str) {
        (&self.ca_cert, &self.ca_key)
    }

    /// This node's own identity, to connect to others with.
    pub(crate) fn node_identity(&self) -> ClientIdentity {
        ClientIdentity {
            ca: self.ca_cert.clone(),
            cert: self.node_cert.clone(),
            key: self.node_key.clone(),
        }
    }

    /// The key with which this node, started anew, proves to those who were connected to it that their connections are gone.
    pub(crate) fn reset_key(&self) -> Arc<ring::hmac::Key> {
        let key = blake3::derive_key(
            "tidepool store connection reset v1",
            self.node_key.as_bytes(),
        );
        Arc::new(ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &key))
    }

    /// The server's side of QUIC: only those with a certificate of this authority.
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
        tls.alpn_protocols = vec![ALPN.to_vec(), PEER_ALPN.to_vec()];
        let quic = QuicServerConfig::try_from(tls).map_err(failed)?;
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(quic));
        config.transport_config(transport::connection(loopback));
        config.max_incoming(256);
        Ok(config)
    }
}

/// A signing request whose signature is good.
pub(crate) struct SigningRequest(CertificateSigningRequestParams);

impl SigningRequest {
    /// Reads and checks one (DER).
    pub(crate) fn read(der: &[u8]) -> Result<Self, StoreError> {
        let der = CertificateSigningRequestDer::from(der);
        Ok(Self(
            CertificateSigningRequestParams::from_der(&der).map_err(failed)?,
        ))
    }

    /// A hash of its public key.
    pub(crate) fn key_hash(&self) -> [u8; 32] {
        use rcgen::PublicKeyData;
        *blake3::hash(self.0.public_key.der_bytes()).as_bytes()
    }

    /// Makes one for a key.
    pub(crate) fn make(key: &KeyPair) -> Result<Vec<u8>, StoreError> {
        let request = params("joining", Role::Store.name(), DAY)?
            .serialize_request(key)
            .map_err(failed)?;
        Ok(request.der().to_vec())
    }
}

/// Whether a node's certificate has more than a third of its time left.
fn is_fresh(pem: &str) -> Result<bool, StoreError> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(failed)?;
    let (_, cert) = X509Certificate::from_der(&der).map_err(failed)?;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs() as i64);
    let left = cert.validity().not_after.timestamp() - now;
    Ok(left > NODE.as_secs() as i64 / 3)
}

fn params(name: &str, unit: &str, valid: Duration) -> Result<CertificateParams, StoreError> {
    let mut params = CertificateParams::new(Vec::<String>::new()).map_err(failed)?;
    let mut dn = DistinguishedName::new();
    dn.push(DnType::OrganizationName, "tidepool");
    dn.push(DnType::OrganizationalUnitName, unit);
    dn.push(DnType::CommonName, name);
    params.distinguished_name = dn;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_err(failed)?;
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + now.saturating_sub(SKEW);
    params.not_after = epoch + (now + valid);
    Ok(params)
}

fn node_params(node: u64) -> Result<CertificateParams, StoreError> {
    let mut params = params(&format!("node-{node}"), Role::Store.name(), NODE)?;
    params.subject_alt_names = vec![SanType::DnsName(SERVER_NAME.try_into().map_err(failed)?)];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    Ok(params)
}

fn new_authority() -> Result<(String, String), StoreError> {
    let mut params = params("tidepool authority", "authority", AUTHORITY)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().map_err(failed)?;
    let cert = params.self_signed(&key).map_err(failed)?;
    Ok((key.serialize_pem(), cert.pem()))
}

fn sign(
    params: CertificateParams,
    key: &KeyPair,
    ca_cert: &str,
    ca_key: &str,
) -> Result<String, StoreError> {
    let ca_key = KeyPair::from_pem(ca_key).map_err(failed)?;
    let issuer = Issuer::from_ca_cert_pem(ca_cert, ca_key).map_err(failed)?;
    Ok(params.signed_by(key, &issuer).map_err(failed)?.pem())
}

fn make_dir(data: &Path) -> Result<PathBuf, StoreError> {
    let dir = data.join(DIR);
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&dir)
        .map_err(|e| StoreError::io(&dir, e))?;
    Ok(dir)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_say_who_and_for_how_long() {
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::open(dir.path(), 3).unwrap();
        let der = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
        let me = Caller::read(&der(&pki.node_cert)).unwrap();
        assert_eq!((me.role, me.node()), (Role::Store, Some(3)));
        let client = pki.issue(Role::Operator, CLIENT).unwrap();
        let caller = Caller::read(&der(&client.cert)).unwrap();
        assert_eq!((caller.role, caller.node()), (Role::Operator, None));
        // Opened again they are the same, and one that is nearly over is signed anew for the same key.
        assert_eq!(Pki::open(dir.path(), 3).unwrap().node_cert, pki.node_cert);
        let key = KeyPair::from_pem(&pki.node_key).unwrap();
        let old = params("node-3", "store", DAY).unwrap();
        let old = sign(old, &key, &pki.ca_cert, &pki.ca_key).unwrap();
        write(&dir.path().join(DIR), NODE_CERT, &old).unwrap();
        let renewed = Pki::open(dir.path(), 3).unwrap();
        assert_ne!(renewed.node_cert, old);
        assert_eq!(renewed.node_key, pki.node_key);
        assert!(is_fresh(&renewed.node_cert).unwrap());
    }

    #[test]
    fn a_signing_request_gives_its_key_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::open(dir.path(), 1).unwrap();
        let key = KeyPair::generate().unwrap();
        let der = SigningRequest::make(&key).unwrap();
        let request = SigningRequest::read(&der).unwrap();
        let cert = pki.sign_node(&request, 9).unwrap();
        let der_cert = CertificateDer::from_pem_slice(cert.as_bytes()).unwrap();
        assert_eq!(Caller::read(&der_cert).unwrap().node(), Some(9));
        let mut bad = der.clone();
        *bad.last_mut().unwrap() ^= 1;
        assert!(SigningRequest::read(&bad).is_err());
        assert!(SigningRequest::read(b"junk").is_err());
    }
}
