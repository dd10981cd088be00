//! The hub's own TLS: its certificate, read again when its files change.

use std::{
    fmt,
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use p2p_sync_proto::{
    Code, Problem,
    certificate::{PIN_BYTES, Validity, key_pin},
    secret_file,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::spawn_blocking,
    time::interval,
};
use tokio_rustls::rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use zeroize::Zeroizing;

/// Between two looks whether the files have changed.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// Longest of either file.
const FILE_BYTES_MAX: u64 = 1024 * 1024;
/// From here on the log and `check` ask for a renewal.
const RENEWAL_DAYS: i64 = 14;

/// Where the certificate and its key are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// PEM: the hub's certificate first, then those that lead to a root.
    pub cert: PathBuf,
    /// PEM.
    pub key: PathBuf,
}

/// A certificate that is served, and where a new one comes from.
#[derive(Debug)]
pub struct Tls {
    files: Files,
    served: watch::Sender<Arc<ServerConfig>>,
    bytes: Pair,
    validity: Validity,
}

/// What the listener serves with; follows a [`Tls`] when that has a new certificate.
pub type Served = watch::Receiver<Arc<ServerConfig>>;

/// The bytes of both files.
#[derive(Clone, PartialEq, Eq)]
struct Pair {
    cert: Vec<u8>,
    key: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pair")
    }
}

impl Tls {
    /// Reads both files.
    ///
    /// Errors: `BAD_CERTIFICATE`, `LOOSE_FILE_MODE` (others may read the key).
    pub fn load(files: Files) -> Result<Self, Problem> {
        let bytes = Pair::read(&files)?;
        let (config, validity) = bytes.resolve(&files)?;
        Ok(Self {
            files,
            served: watch::Sender::new(config),
            bytes,
            validity,
        })
    }

    /// Whom the certificate is for, and until when.
    pub fn validity(&self) -> &Validity {
        &self.validity
    }

    /// What a listener serves with.
    pub fn served(&self) -> Served {
        self.served.subscribe()
    }

    /// Takes a new certificate over when the files have changed: looks every few seconds, and at once on SIGHUP. A bad one is
    /// told and the old one stays. Connections that are open keep what they began with.
    pub async fn follow(mut self) {
        let mut ticks = interval(LOOK_INTERVAL);
        let mut hangups = match signal(SignalKind::hangup()) {
            Ok(hangups) => Some(hangups),
            Err(error) => {
                tracing::warn!(%error, "SIGHUP cannot be heard; the certificate's files are looked at all the same");
                None
            }
        };
        let mut refused = Refused::default();
        let mut told_days = None;
        loop {
            let asked = tokio::select! {
                _ = ticks.tick() => false,
                () = async { match &mut hangups {
                    Some(hangups) => hangups.recv().await.unwrap_or_default(),
                    None => std::future::pending().await,
                } } => true,
            };
            match self.renew().await {
                Ok(changed) => {
                    refused = Refused::default();
                    if changed || asked {
                        tracing::info!(certificate = %self.validity, changed, "the certificate's files are read");
                    }
                }
                Err(problem) => refused.tell(problem, asked),
            }
            let days = self.validity.days_left(SystemTime::now());
            if days <= RENEWAL_DAYS && told_days.replace(days) != Some(days) {
                tracing::warn!("{}", renewal(&self.validity, days));
            }
        }
    }

    /// Reads the files again; gives whether they have changed.
    async fn renew(&mut self) -> Result<bool, Problem> {
        let files = self.files.clone();
        let read = spawn_blocking(move || Pair::read(&files)).await;
        let bytes = read.unwrap_or_else(|error| Err(Problem::new(Code::Internal, error.to_string())))?;
        if bytes == self.bytes {
            return Ok(false);
        }
        let (config, validity) = bytes.resolve(&self.files)?;
        (self.bytes, self.validity) = (bytes, validity);
        self.served.send_replace(config);
        Ok(true)
    }
}

/// Why the files of the last look were not taken over.
#[derive(Default)]
struct Refused {
    problem: Option<Problem>,
    told: bool,
}

impl Refused {
    /// Tells of a problem once, and not before it is there at a second look: between the writing of one file and the other
    /// they do not fit. Who has asked is told at once.
    fn tell(&mut self, problem: Problem, asked: bool) {
        if self.problem.as_ref() != Some(&problem) {
            *self = Self {
                problem: Some(problem),
                told: false,
            };
            if !asked {
                return;
            }
        }
        if let Some(problem) = self.problem.as_ref().filter(|_| !self.told || asked) {
            tracing::error!("the new certificate is not taken, the one before it is still served: {problem}");
            self.told = true;
        }
    }
}

/// What a certificate that is about to expire asks for.
fn renewal(validity: &Validity, days: i64) -> String {
    let when = if days < 0 {
        "has expired, and hosts refuse it".to_owned()
    } else {
        format!("expires in {days} days")
    };
    format!("the certificate ({validity}) {when}: renew tls_cert and tls_key; they are read without a restart")
}

/// The pin of the CA in a file, for hosts to know it by.
pub fn pin_of(ca: &Path) -> Result<[u8; PIN_BYTES], Problem> {
    let bytes = read(ca, "the CA", false)?;
    let first = CertificateDer::pem_slice_iter(&bytes).next().and_then(Result::ok);
    first.and_then(|certificate| key_pin(&certificate)).ok_or_else(|| {
        let sentence = format!(
            "{} holds no certificate: give the PEM file of the hub's CA, which begins with -----BEGIN CERTIFICATE-----",
            ca.display()
        );
        Problem::new(Code::BadCertificate, sentence)
    })
}

/// Whether a host that knows this pin alone finds what it is of in what it is shown.
pub fn check_pin(files: &Files, ca: &Path) -> Result<(), Problem> {
    let pin = pin_of(ca)?;
    let bytes = read(&files.cert, "tls_cert", false)?;
    let mut shown = CertificateDer::pem_slice_iter(&bytes).filter_map(Result::ok);
    if shown.any(|certificate| key_pin(&certificate) == Some(pin)) {
        return Ok(());
    }
    let (cert, ca) = (files.cert.display(), ca.display());
    let sentence = format!(
        "tls_cert: {cert} does not hold the CA's certificate ({ca}), by which enrolled hosts know the hub: append it, \
         `cat {ca} >> {cert}`; it is read without a restart"
    );
    Err(Problem::new(Code::BadCertificate, sentence))
}

/// For `check`: whom the certificate is for and how long still, or what to do.
pub fn describe(validity: &Validity) -> Result<String, Problem> {
    match validity.days_left(SystemTime::now()) {
        days if days < 0 => Err(Problem::new(Code::BadCertificate, renewal(validity, days))),
        days if days <= RENEWAL_DAYS => Ok(format!("{validity}, {days} days left: renew it")),
        days => Ok(format!("{validity}, {days} days left")),
    }
}

impl Pair {
    fn read(files: &Files) -> Result<Self, Problem> {
        let cert = read(&files.cert, "tls_cert", false)?.to_vec();
        let key = read(&files.key, "tls_key", true)?;
        Ok(Self { cert, key })
    }

    fn resolve(&self, files: &Files) -> Result<(Arc<ServerConfig>, Validity), Problem> {
        let bad = |key: &str, file: &Path, what: &str| {
            let sentence = format!("{key}: {} {what}", file.display());
            Problem::new(Code::BadCertificate, sentence)
        };
        let no_certificate = "holds no certificate: give a PEM file whose first block is the hub's own certificate, with the \
                              intermediate ones behind it";
        let chain = CertificateDer::pem_slice_iter(&self.cert)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| bad("tls_cert", &files.cert, no_certificate))?;
        let validity = chain
            .first()
            .and_then(|certificate| Validity::read(certificate))
            .ok_or_else(|| bad("tls_cert", &files.cert, no_certificate))?;
        let no_key = "holds no private key: give a PEM file without a passphrase (PKCS#8, PKCS#1 or SEC1)";
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(|_| bad("tls_key", &files.key, no_key))?;
        let unfit = |error| {
            let what = format!(
                "does not go with the certificate in {} ({error}): give the key that it was made for",
                files.cert.display()
            );
            bad("tls_key", &files.key, &what)
        };
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
            .map_err(unfit)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok((Arc::new(config), validity))
    }
}

/// A file's bytes. A secret one is its owner's alone.
fn read(file: &Path, key: &str, is_secret: bool) -> Result<Zeroizing<Vec<u8>>, Problem> {
    let shown = file.display();
    let unreadable = |error: io::Error| {
        let sentence = format!("{key}: {shown} cannot be read ({error}): check its path and who may read it");
        Problem::new(Code::BadCertificate, sentence)
    };
    let opened = File::open(file).map_err(unreadable)?;
    let metadata = opened.metadata().map_err(unreadable)?;
    if is_secret {
        secret_file::check_mode(file, &metadata)
            .map_err(|problem| Problem::new(problem.code, format!("{key}: {}", problem.sentence)))?;
    }
    // Room for all of it at once: a vector that grows leaves copies behind.
    let size = metadata.len().min(FILE_BYTES_MAX);
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(size).unwrap_or(0) + 1));
    opened
        .take(FILE_BYTES_MAX)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    Ok(bytes)
}
