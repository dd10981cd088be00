//! A CA and what it signs.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd};

/// A private CA.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

/// What a certificate says.
pub(crate) struct Claims<'a> {
    pub(crate) names: &'a [&'a str],
    /// Years of its first and last 1st of January.
    pub(crate) years: (i32, i32),
}

impl Default for Claims<'_> {
    fn default() -> Self {
        Self {
            names: &["127.0.0.1", "localhost"],
            years: (2020, 2090),
        }
    }
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "a CA of the tests");
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("a certificate"))
    }

    /// Its own certificate in a file, as an agent's `tls_ca`.
    pub(crate) fn file(&self, folder: &Path) -> PathBuf {
        let file = folder.join("ca.pem");
        fs::write(&file, self.0.pem()).expect("the folder can be written");
        file
    }

    /// Signs a certificate; gives it and its key as PEM.
    pub(crate) fn sign(&self, claims: &Claims<'_>) -> (String, String) {
        let names: Vec<String> = claims.names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
        params.not_before = date_time_ymd(claims.years.0, 1, 1);
        params.not_after = date_time_ymd(claims.years.1, 1, 1);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.0).expect("a certificate");
        (certificate.pem(), key.serialize_pem())
    }

    /// As [`Self::sign`], into the files of a hub in this folder.
    pub(crate) fn sign_into(&self, folder: &Path, claims: &Claims<'_>) {
        let (certificate, key) = self.sign(claims);
        write(folder, &certificate, &key);
    }

    /// As [`Self::sign_into`], with the CA's own certificate behind the hub's.
    #[allow(dead_code)] // Of each binary that has this module.
    pub(crate) fn sign_with_chain_into(&self, folder: &Path, claims: &Claims<'_>) {
        let (certificate, key) = self.sign(claims);
        write(folder, &(certificate + &self.0.pem()), &key);
    }

    /// The CA's own certificate, as operators sometimes serve it.
    pub(crate) fn serve_itself(&self, folder: &Path) {
        write(folder, &self.0.pem(), &self.0.key().serialize_pem());
    }
}

/// Replaces both files of a hub, each whole.
pub(crate) fn write(folder: &Path, certificate: &str, key: &str) {
    for (name, text, mode) in [("hub.pem", certificate, 0o644), ("hub.key", key, 0o600)] {
        let new = folder.join(format!("{name}.new"));
        fs::write(&new, text).expect("the folder can be written");
        fs::set_permissions(&new, fs::Permissions::from_mode(mode)).expect("it is ours");
        fs::rename(&new, folder.join(name)).expect("the folder can be written");
    }
}
