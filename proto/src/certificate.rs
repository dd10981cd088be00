//! What a TLS certificate says of itself, for people to read: whom it is for, and how long.

use std::{
    fmt,
    net::IpAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use sha2::{Digest as _, Sha256};
use x509_cert::{
    Certificate,
    der::{DateTime, Decode as _, Encode as _},
    ext::pkix::{SubjectAltName, name::GeneralName},
};

/// Names that are shown; certificates of content networks have a hundred.
const NAMES_SHOWN_MAX: usize = 4;
const DAY: u64 = 24 * 60 * 60;
/// Length of [`key_pin`], octets.
pub const PIN_BYTES: usize = 32;

/// Whom a certificate is for, and until when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Validity {
    names: Vec<String>,
    /// Since 1970.
    not_before: Duration,
    /// Since 1970.
    not_after: Duration,
}

impl Validity {
    /// Reads a certificate (DER); `None` where it is none.
    pub fn read(certificate: &[u8]) -> Option<Self> {
        let certificate = Certificate::from_der(certificate).ok()?;
        let content = certificate.tbs_certificate();
        let names = match content.get_extension::<SubjectAltName>() {
            Ok(Some((_, names))) => names.0.iter().filter_map(name).collect(),
            Ok(None) => Vec::new(),
            Err(_) => return None,
        };
        Some(Self {
            names,
            not_before: content.validity().not_before.to_unix_duration(),
            not_after: content.validity().not_after.to_unix_duration(),
        })
    }

    /// From when until when it holds, since 1970.
    pub fn span(&self) -> (Duration, Duration) {
        (self.not_before, self.not_after)
    }

    /// Whole days until it expires; negative from the moment on when it has.
    pub fn days_left(&self, now: SystemTime) -> i64 {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let end = self.not_after.as_secs();
        let days = |seconds: u64| i64::try_from(seconds / DAY).unwrap_or(i64::MAX);
        if end >= now {
            days(end - now)
        } else {
            -1 - days(now - end)
        }
    }

    /// `2027-01-31`, UTC.
    pub fn last_day(&self) -> String {
        day(self.not_after)
    }
}

impl fmt::Display for Validity {
    /// `hub.example.org, valid until 2027-01-31`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = self.names.iter().take(NAMES_SHOWN_MAX);
        let names = shown.map(String::as_str).collect::<Vec<_>>().join(", ");
        let more = match self.names.len() {
            0 => "no name".to_owned(),
            count if count > NAMES_SHOWN_MAX => format!(" and {} more", count - NAMES_SHOWN_MAX),
            _ => String::new(),
        };
        write!(f, "{names}{more}, valid until {}", self.last_day())
    }
}

/// What a certificate (DER) is pinned by: the SHA-256 of its public key (`SubjectPublicKeyInfo`), so that one made anew
/// with the same key holds on. `None` where it is none.
pub fn key_pin(certificate: &[u8]) -> Option<[u8; PIN_BYTES]> {
    let certificate = Certificate::from_der(certificate).ok()?;
    let key = certificate.tbs_certificate().subject_public_key_info().to_der().ok()?;
    Some(Sha256::digest(key).into())
}

/// A moment's date in UTC, `2027-01-31`.
pub fn day(since_1970: Duration) -> String {
    let date = DateTime::from_unix_duration(since_1970).map(|time| time.to_string());
    // `2027-01-31T00:00:00Z`; the year 10000 is as good as never.
    date.map_or_else(
        |_| "forever".to_owned(),
        |date| date.chars().take_while(|part| *part != 'T').collect(),
    )
}

/// Another machine's text is shown escaped.
fn name(name: &GeneralName) -> Option<String> {
    match name {
        GeneralName::DnsName(name) => Some(name.as_str().escape_default().to_string()),
        GeneralName::IpAddress(bytes) => {
            let bytes = bytes.as_bytes();
            let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
            let address = v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from));
            address.ok().map(|address| address.to_string())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_says_whom_it_is_for_and_how_long() {
        let mut made =
            rcgen::CertificateParams::new(["hub.example.org".to_owned(), "10.1.2.3".to_owned()]).expect("names");
        made.not_after = rcgen::date_time_ymd(2031, 2, 28);
        let key = rcgen::KeyPair::generate().expect("a key");
        let certificate = made.self_signed(&key).expect("a certificate");
        let validity = Validity::read(certificate.der()).expect("a certificate");
        assert_eq!(
            validity.to_string(),
            "hub.example.org, 10.1.2.3, valid until 2031-02-28"
        );
        let end = UNIX_EPOCH + validity.not_after;
        let hour = Duration::from_hours(1);
        assert_eq!(validity.days_left(end - hour * 47), 1);
        assert_eq!(validity.days_left(end - hour), 0);
        assert_eq!(validity.days_left(end + hour), -1);
        assert_eq!(Validity::read(b"no certificate"), None);
    }

    #[test]
    fn a_pin_is_of_the_key_and_outlasts_the_certificate() {
        let key = rcgen::KeyPair::generate().expect("a key");
        let made = |name: &str, key: &rcgen::KeyPair| {
            let params = rcgen::CertificateParams::new([name.to_owned()]).expect("a name");
            key_pin(params.self_signed(key).expect("a certificate").der())
        };
        assert!(made("a", &key).is_some());
        assert_eq!(made("a", &key), made("b", &key));
        assert_ne!(made("a", &key), made("a", &rcgen::KeyPair::generate().expect("a key")));
        // As openssl says of it: pkey -pubout -outform der | sha256sum.
        let info = rcgen::PublicKeyData::subject_public_key_info(&key);
        assert_eq!(made("a", &key), Some(Sha256::digest(info).into()));
        assert_eq!(key_pin(b"no certificate"), None);
    }

    #[test]
    fn what_a_foreign_certificate_calls_itself_cannot_write_into_a_terminal() {
        let text = x509_cert::der::asn1::Ia5String::new("a\u{1b}[31m").expect("IA5");
        assert_eq!(name(&GeneralName::DnsName(text)).as_deref(), Some("a\\u{1b}[31m"));
    }
}
