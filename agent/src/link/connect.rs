//! The way to the hub: a TCP connection, and TLS over it where the endpoint says `https`. Whom to trust is read at each
//! connection, so that a mended file takes hold without a restart.

use std::{
    error::Error,
    fmt, io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    task::{Context, Poll, ready},
    time::{Duration, SystemTime},
};

use hyper_util::{client::legacy::connect::HttpConnector, rt::TokioIo};
use p2p_sync_proto::{
    Code, Problem,
    certificate::{self, PIN_BYTES, Validity},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        self, CertificateError, ClientConfig, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, ServerName, pem::PemObject as _},
    },
};
use tonic::{codegen::Service, transport::Uri};

use super::{Sent, pinned::Pinned};
use crate::config::Config;

/// What a TLS record begins with that is an alert, and one of a handshake.
const TLS_RECORDS: [u8; 2] = [0x15, 0x16];

/// Names of a certificate that is another's.
const NAMES_SHOWN_MAX: usize = 4;

/// Makes connections to the hub.
#[derive(Clone)]
pub(crate) struct Connector {
    tcp: HttpConnector,
    way: Arc<Way>,
}

struct Way {
    endpoint: String,
    trust: Trust,
    patience: Duration,
    /// What the peer of the last connection turned out to be, where that is no hub; HTTP/2 loses such errors.
    mistaken: Mutex<Option<Problem>>,
    sent: Arc<Sent>,
}

/// Whose word for the hub's certificate is taken.
#[derive(Clone, Debug)]
enum Trust {
    /// Of the machine's public roots.
    Public,
    /// Of the CAs in a file, and of nobody else.
    File(PathBuf),
    /// Of who has this key, and of nobody else: a CA whose certificate the hub presents with its own, or the hub itself.
    Pin([u8; PIN_BYTES]),
}

impl Connector {
    /// What goes over its connections is counted in `sent`.
    pub(crate) fn new(config: &Config, sent: Arc<Sent>) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(config.connect_timeout));
        let way = Way {
            endpoint: config.endpoint.clone(),
            trust: match (&config.tls_ca, config.ca_pin) {
                (Some(file), _) => Trust::File(file.clone()),
                (None, Some(pin)) => Trust::Pin(pin),
                (None, None) => Trust::Public,
            },
            patience: config.connect_timeout,
            mistaken: Mutex::default(),
            sent,
        };
        Self {
            tcp,
            way: Arc::new(way),
        }
    }

    /// Why a call over one of these connections failed, where the connection knows it better than HTTP/2 does.
    pub(crate) fn problem_of(&self, status: &tonic::Status) -> Problem {
        let known = || self.way.mistaken().clone();
        problem_in(status)
            .or_else(known)
            .unwrap_or_else(|| super::session::problem_of(status))
    }

    async fn connect(mut self, uri: Uri) -> Result<Io, Problem> {
        let way = self.way.clone();
        let tcp = self.tcp.call(uri.clone());
        let connected = timeout(way.patience, tcp).await;
        let stream = match connected {
            Ok(Ok(stream)) => stream.into_inner(),
            Ok(Err(error)) => return Err(way.unreachable(&root_cause(&error))),
            Err(_) => return Err(way.unreachable("no answer in time")),
        };
        let stream = if uri.scheme_str() == Some("https") {
            let shaken = timeout(way.patience, way.clone().shake_hands(stream, &uri)).await;
            Channel::Tls(Box::new(shaken.unwrap_or_else(|_| {
                Err(way.unreachable("its TLS handshake did not end in time"))
            })?))
        } else {
            Channel::Plain(stream)
        };
        Ok(Io {
            channel: stream,
            sent: way.sent.clone(),
            listens_for: Some(way),
        })
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Io>;
    type Error = Problem;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Problem>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Problem>> {
        self.tcp
            .poll_ready(cx)
            .map_err(|error| self.way.unreachable(&root_cause(&error)))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move { connector.connect(uri).await.map(TokioIo::new) })
    }
}

impl Way {
    fn mistaken(&self) -> std::sync::MutexGuard<'_, Option<Problem>> {
        self.mistaken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unreachable(&self, reason: &str) -> Problem {
        let sentence = format!(
            "{} cannot be reached ({reason}): check main_server_endpoint and the network; everything is kept until then",
            self.endpoint
        );
        Problem::new(Code::HubUnavailable, sentence)
    }

    async fn shake_hands(self: Arc<Self>, stream: TcpStream, uri: &Uri) -> Result<TlsStream<TcpStream>, Problem> {
        let host = uri.host().unwrap_or_default();
        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned()).map_err(|_| {
            let sentence =
                format!("main_server_endpoint: no certificate can be for {host}: give the hub's name or address");
            Problem::new(Code::BadEndpoint, sentence)
        })?;
        let trust = self.trust.clone();
        let config = tokio::task::spawn_blocking(move || trust.client_config()).await;
        let config = config.unwrap_or_else(|error| Err(Problem::new(Code::Internal, error.to_string())))?;
        let shaken = TlsConnector::from(Arc::new(config)).connect(name, stream).await;
        shaken.map_err(|error| {
            let cause = error.get_ref().and_then(|cause| cause.downcast_ref());
            match cause {
                Some(rustls::Error::InvalidCertificate(reason)) => self.untrusted(host, reason),
                Some(cause) => self.no_tls(cause),
                None => self.unreachable(&format!(
                    "it ended the connection in the TLS handshake, {error}; maybe the port does not speak TLS"
                )),
            }
        })
    }

    /// Why a certificate is not taken; the same words each time, so that the log tells it once.
    fn untrusted(&self, host: &str, reason: &CertificateError) -> Problem {
        let endpoint = &self.endpoint;
        let date = |time: &rustls::pki_types::UnixTime| certificate::day(Duration::from_secs(time.as_secs()));
        let sentence = match reason {
            CertificateError::ExpiredContext { not_after, .. } => format!(
                "the certificate of {endpoint} expired on {}: its operator has to renew it, if this machine's clock is right",
                date(not_after)
            ),
            CertificateError::NotValidYetContext { not_before, .. } => format!(
                "the certificate of {endpoint} is valid only from {} on: set this machine's clock right",
                date(not_before)
            ),
            CertificateError::NotValidForNameContext { presented, .. } => format!(
                "the certificate of {endpoint} is not for {host} but for {}: write main_server_endpoint as the hub's operator \
                 gave it",
                names(presented)
            ),
            // A CA that was made anew has the name of the old one, whose key does not fit.
            CertificateError::UnknownIssuer | CertificateError::BadSignature => match &self.trust {
                Trust::Public => format!(
                    "the certificate of {endpoint} is untrusted: no public CA has signed it. If the hub has a CA of its own, \
                     get the CA's file from its operator and set tls_ca; otherwise it is not the hub that answers"
                ),
                Trust::File(file) => format!(
                    "the certificate of {endpoint} is untrusted: no CA in tls_ca ({}) has signed it: get the present file \
                     from the hub's operator, or leave tls_ca empty for a public certificate; otherwise it is not the hub \
                     that answers",
                    file.display()
                ),
                Trust::Pin(_) => format!(
                    "the certificate of {endpoint} is untrusted: the CA that this host was enrolled with is not among what it \
                     presents, or has not signed it. The hub's operator has to serve the CA's certificate behind the hub's own \
                     (`p2p-sync-proxy check` there), or to give that CA's file for tls_ca; otherwise it is not the hub that \
                     answers"
                ),
            },
            other if format!("{other:?}").contains("CaUsedAsEndEntity") => format!(
                "the certificate of {endpoint} is a CA's own: its operator has to have that CA sign one for the hub"
            ),
            other => format!("the certificate of {endpoint} is untrusted ({other}): tell the hub's operator"),
        };
        Problem::new(Code::UntrustedCertificate, sentence)
    }

    /// What answers speaks no TLS, or none that this agent does.
    fn no_tls(&self, cause: &rustls::Error) -> Problem {
        let endpoint = &self.endpoint;
        let sentence = match cause {
            rustls::Error::InvalidMessage(_) => format!(
                "{endpoint} answers, but speaks no TLS: check the port in main_server_endpoint; http:// is for a hub on this \
                 machine alone"
            ),
            cause => {
                format!("{endpoint} refuses the TLS handshake ({cause}): check host and port in main_server_endpoint")
            }
        };
        Problem::new(Code::BadEndpoint, sentence)
    }

    /// Looks at how a peer begins: with SETTINGS, whose first byte is 0, if it speaks HTTP/2.
    fn listen(&self, begins: Option<u8>) {
        let endpoint = &self.endpoint;
        let (code, sentence) = match begins {
            Some(0) => {
                *self.mistaken() = None;
                return;
            }
            Some(byte) if TLS_RECORDS.contains(&byte) => (
                Code::BadEndpoint,
                format!("{endpoint} speaks TLS: begin main_server_endpoint with https://"),
            ),
            Some(_) => (
                Code::BadEndpoint,
                format!(
                    "{endpoint} answers, but speaks no HTTP/2: check scheme, host and port in main_server_endpoint; an edge \
                     before the hub has to speak HTTP/2, and where it speaks TLS the scheme is https"
                ),
            ),
            None if endpoint.starts_with("https:") => (
                Code::HubUnavailable,
                format!("{endpoint} closes connections before it says anything: the hub is full, or just starting"),
            ),
            None => (
                Code::HubUnavailable,
                format!(
                    "{endpoint} closes connections before it says anything: the hub is full, or just starting; or the port \
                     speaks TLS, and main_server_endpoint has to begin with https://"
                ),
            ),
        };
        *self.mistaken() = Some(Problem::new(code, sentence));
    }
}

impl Trust {
    /// The roots, and nothing that is the process's: a map server may have a TLS of its own.
    fn client_config(&self) -> Result<ClientConfig, Problem> {
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| Problem::new(Code::Internal, error.to_string()))?;
        let builder = match self {
            Self::Public => builder.with_root_certificates(public_roots()?),
            Self::File(file) => builder.with_root_certificates(
                ca_roots(file).map_err(|what| Problem::new(Code::UntrustedCertificate, format!("tls_ca: {what}")))?,
            ),
            Self::Pin(pin) => builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(Pinned::new(*pin, provider))),
        };
        let mut config = builder.with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

/// The machine's own roots, which its administrator's updates keep.
fn public_roots() -> Result<RootCertStore, Problem> {
    let mut roots = RootCertStore::empty();
    // One that cannot be read is missed when a certificate is signed by it.
    let (found, _) = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if found == 0 {
        let sentence = "this machine has no public CAs to check the hub's certificate by: install its package \
                        ca-certificates, or set tls_ca if the hub has a CA of its own";
        return Err(Problem::new(Code::UntrustedCertificate, sentence));
    }
    Ok(roots)
}

/// The CAs in a file, or what is wrong with it.
pub(crate) fn ca_roots(file: &Path) -> Result<RootCertStore, String> {
    let shown = file.display();
    let text = std::fs::read(file)
        .map_err(|error| format!("{shown} cannot be read ({error}): check its path and who may read it"))?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&text) {
        let added = certificate.ok().and_then(|certificate| roots.add(certificate).ok());
        added.ok_or_else(|| format!("a certificate in {shown} is damaged: copy the file again whole"))?;
    }
    if roots.is_empty() {
        return Err(format!(
            "{shown} holds no certificate: give the PEM file of the hub's CA, which begins with -----BEGIN CERTIFICATE-----"
        ));
    }
    Ok(roots)
}

/// As rustls tells them, `DnsName("hub.example.org")`, another machine's text being escaped.
fn names(presented: &[String]) -> String {
    let bare = |name: &String| {
        let (_, name) = name.split_once('(')?;
        Some(name.trim_end_matches(')').trim_matches('"').to_owned())
    };
    let names: Vec<String> = presented.iter().filter_map(bare).take(NAMES_SHOWN_MAX).collect();
    if names.is_empty() {
        "nobody".to_owned()
    } else {
        names.join(", ")
    }
}

/// For `check`: makes a connection and tells the certificate that was presented and is trusted.
pub(crate) async fn inspect(config: &Config) -> Result<String, Problem> {
    let connector = Connector::new(config, Arc::default());
    let io = connector.connect(super::session::origin(config)).await?;
    let Channel::Tls(stream) = &io.channel else {
        return Err(Problem::new(Code::Internal, "there is no TLS to be inspected"));
    };
    let presented = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let validity = presented.and_then(|certificate| Validity::read(certificate));
    Ok(validity.map_or_else(
        || "trusted".to_owned(),
        |validity| format!("{validity}, {} days left", validity.days_left(SystemTime::now())),
    ))
}

/// A connection.
pub(crate) struct Io {
    channel: Channel,
    sent: Arc<Sent>,
    /// Until its first byte has come.
    listens_for: Option<Arc<Way>>,
}

enum Channel {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// What both kinds of channels are.
trait Bytes: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Bytes for T {}

impl Io {
    fn bytes(&mut self) -> Pin<&mut dyn Bytes> {
        match &mut self.channel {
            Channel::Plain(stream) => Pin::new(stream),
            Channel::Tls(stream) => Pin::new(stream),
        }
    }

    /// Before TLS adds some bytes to each record.
    fn count(&self, written: &Poll<io::Result<usize>>) {
        if let Poll::Ready(Ok(bytes)) = written {
            self.sent.bytes_up.fetch_add(*bytes as u64, Ordering::Relaxed);
        }
    }

    /// What was written; where that failed, what the peer said before it closed is heard first.
    fn written<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if matches!(written, Poll::Ready(Err(_))) && self.listens_for.is_some() {
            let mut byte = [0];
            // That it is closed is heard too; the failure is told then, and what was read is missed by nobody.
            let _heard = ready!(Pin::new(self).poll_read(cx, &mut ReadBuf::new(&mut byte)));
        }
        written
    }
}

impl AsyncRead for Io {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = ready!(self.bytes().poll_read(cx, buf));
        let came = (buf.filled().len() - before) as u64;
        self.sent.bytes_down.fetch_add(came, Ordering::Relaxed);
        if let Some(way) = self.listens_for.take() {
            way.listen(buf.filled().get(before).copied());
        }
        Poll::Ready(read)
    }
}

impl AsyncWrite for Io {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = self.bytes().poll_write(cx, buf);
        self.count(&written);
        self.written(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = self.bytes().poll_write_vectored(cx, bufs);
        self.count(&written);
        self.written(cx, written)
    }

    /// Both kinds are.
    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = self.bytes().poll_flush(cx);
        self.written(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.bytes().poll_shutdown(cx)
    }
}

/// What the connector said, wherever it stands among an error's causes.
pub(crate) fn problem_in(error: &(dyn Error + 'static)) -> Option<Problem> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(problem) = error.downcast_ref::<Problem>() {
            return Some(problem.clone());
        }
        cause = error.source();
    }
    None
}

fn root_cause(error: &dyn Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector")
            .field("endpoint", &self.way.endpoint)
            .finish_non_exhaustive()
    }
}
