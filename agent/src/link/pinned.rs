//! Trust in a public key: the one that a token of enrolment has pinned, of the hub's CA or of the hub itself.

use std::{sync::Arc, time::Duration};

use p2p_sync_proto::certificate::{PIN_BYTES, Validity, key_pin};
use tokio_rustls::rustls::{
    CertificateError, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::ParsedCertificate,
};

/// Takes a certificate that the pinned key has signed, and the pinned key's own.
#[derive(Debug)]
pub(super) struct Pinned {
    pin: [u8; PIN_BYTES],
    provider: Arc<CryptoProvider>,
}

impl Pinned {
    pub(super) fn new(pin: [u8; PIN_BYTES], provider: Arc<CryptoProvider>) -> Self {
        Self { pin, provider }
    }

    fn is_pinned(&self, certificate: &CertificateDer<'_>) -> bool {
        key_pin(certificate) == Some(self.pin)
    }
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if self.is_pinned(end_entity) {
            // Nobody has to have signed it: that its key is there the handshake proves.
            verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
            return in_its_time(end_entity, now);
        }
        let pinned = intermediates.iter().find(|certificate| self.is_pinned(certificate));
        let mut roots = RootCertStore::empty();
        let added = pinned.is_some_and(|anchor| roots.add(anchor.clone().into_owned()).is_ok());
        if !added {
            return Err(CertificateError::UnknownIssuer.into());
        }
        // The one anchor there is; names, times and signatures are the library's to look at.
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
            .build()
            .map_err(|error| Error::General(error.to_string()))?;
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn in_its_time(certificate: &CertificateDer<'_>, now: UnixTime) -> Result<ServerCertVerified, Error> {
    let validity = Validity::read(certificate).ok_or(CertificateError::BadEncoding)?;
    let (not_before, not_after) = validity.span();
    let now_since_1970 = Duration::from_secs(now.as_secs());
    if now_since_1970 < not_before {
        let not_before = UnixTime::since_unix_epoch(not_before);
        return Err(CertificateError::NotValidYetContext { time: now, not_before }.into());
    }
    if now_since_1970 > not_after {
        let not_after = UnixTime::since_unix_epoch(not_after);
        return Err(CertificateError::ExpiredContext { time: now, not_after }.into());
    }
    Ok(ServerCertVerified::assertion())
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd};
    use tokio_rustls::rustls::crypto::ring;

    use super::*;

    type Made = (CertificateDer<'static>, [u8; PIN_BYTES]);

    fn made(certificate: &CertificateDer<'_>) -> Made {
        let certificate = certificate.clone().into_owned();
        let pin = key_pin(&certificate).expect("a certificate");
        (certificate, pin)
    }

    fn ca(name: &str) -> (CertifiedIssuer<'static, KeyPair>, Made) {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("a certificate");
        let made = made(issuer.der());
        (issuer, made)
    }

    fn params(name: &str, years: (i32, i32)) -> CertificateParams {
        let mut params = CertificateParams::new([name.to_owned()]).expect("a name");
        (params.not_before, params.not_after) = (date_time_ymd(years.0, 1, 1), date_time_ymd(years.1, 1, 1));
        params
    }

    fn verified(pin: [u8; PIN_BYTES], chain: &[&CertificateDer<'static>], name: &str) -> Result<(), Error> {
        let pinned = Pinned::new(pin, Arc::new(ring::default_provider()));
        let others: Vec<_> = chain[1..].iter().map(|&one| one.clone()).collect();
        let name = ServerName::try_from(name.to_owned()).expect("a name");
        pinned
            .verify_server_cert(chain[0], &others, &name, &[], UnixTime::now())
            .map(drop)
    }

    fn refused(found: Result<(), Error>) -> CertificateError {
        match found {
            Err(Error::InvalidCertificate(reason)) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_the_pinned_ca_has_signed_is_taken_and_nothing_else() {
        let ((issuer, (root, pin)), (other_issuer, (other, other_pin))) = (ca("one"), ca("other"));
        let signed = |issuer: &CertifiedIssuer<'static, KeyPair>, name: &str, years| {
            let key = KeyPair::generate().expect("a key");
            made(
                params(name, years)
                    .signed_by(&key, issuer)
                    .expect("a certificate")
                    .der(),
            )
            .0
        };
        let years = (2020, 2090);
        let hub = signed(&issuer, "hub.example.org", years);
        let name = "hub.example.org";
        assert!(verified(pin, &[&hub, &root], name).is_ok());
        assert!(
            verified(pin, &[&hub, &other, &root], name).is_ok(),
            "whatever lies beside it"
        );

        // Not presented; another's; presented beside what another has signed; another CA of the same name.
        assert_eq!(refused(verified(pin, &[&hub], name)), CertificateError::UnknownIssuer);
        assert_eq!(
            refused(verified(other_pin, &[&hub, &root], name)),
            CertificateError::UnknownIssuer
        );
        let foreign = signed(&other_issuer, name, years);
        assert_eq!(
            refused(verified(pin, &[&foreign, &root, &other], name)),
            CertificateError::UnknownIssuer
        );
        let (impostor, (impostor_root, _)) = ca("one");
        let forged = signed(&impostor, name, years);
        refused(verified(pin, &[&forged, &impostor_root, &root], name));

        assert!(matches!(
            refused(verified(pin, &[&hub, &root], "elsewhere.example.org")),
            CertificateError::NotValidForNameContext { .. }
        ));
        let old = signed(&issuer, name, (2019, 2021));
        assert!(matches!(
            refused(verified(pin, &[&old, &root], name)),
            CertificateError::ExpiredContext { .. }
        ));
        // A CA's own certificate is no hub's, its key pinned or not.
        refused(verified(other_pin, &[&root, &other], name));
    }

    #[test]
    fn a_pinned_key_of_the_hub_itself_is_taken_under_its_name_and_in_its_time() {
        let key = KeyPair::generate().expect("a key");
        let own = |name: &str, years| made(params(name, years).self_signed(&key).expect("a certificate").der());
        let (hub, pin) = own("hub.example.org", (2020, 2090));
        assert!(verified(pin, &[&hub], "hub.example.org").is_ok());
        assert!(matches!(
            refused(verified(pin, &[&hub], "elsewhere.example.org")),
            CertificateError::NotValidForNameContext { .. }
        ));
        for (years, expired) in [((2019, 2021), true), ((2089, 2090), false)] {
            let reason = refused(verified(pin, &[&own("hub.example.org", years).0], "hub.example.org"));
            assert_eq!(
                matches!(reason, CertificateError::ExpiredContext { .. }),
                expired,
                "{reason:?}"
            );
            assert_eq!(
                matches!(reason, CertificateError::NotValidYetContext { .. }),
                !expired,
                "{reason:?}"
            );
        }
    }
}
