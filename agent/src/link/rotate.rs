//! Renewing the host's credential, over the critical lane's connection, while everything goes on.
//!
//! What is on disk is ahead of what is done: the request's id before it is sent, both credentials before the new one seals
//! anything, and the former one until the outbox's key is wrapped by the new one. So a kill at any point leaves a file that
//! opens the outbox and repeats the request, or goes on from its answer.

use std::{path::Path, sync::Arc, time::Duration};

use p2p_sync_proto::{
    Code, Problem,
    envelope::Lane,
    ids::new_id,
    keys::Credential,
    limits::SEALED_BYTES_MAX,
    v1::{self, rotate_client::RotateClient},
};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::session::Session;
use crate::{credential_file::CredentialFile, outbox::Change, shared::Shared};

/// Between two attempts.
const PAUSE: Duration = Duration::from_secs(2);

/// Renews the credential each time the hub says so, until it is dropped.
pub(super) async fn keep(shared: &Shared, session: &Session) {
    loop {
        shared.keys.due.notified().await;
        match renew(shared, session).await {
            Ok(generation) => tracing::info!(generation, "the credential is renewed"),
            Err(problem) if problem.code == Code::BadRequest => {
                tracing::debug!("the credential is not renewed: {problem}");
            }
            Err(problem) => tracing::warn!("the credential could not be renewed, it is tried again: {problem}"),
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn renew(shared: &Shared, session: &Session) -> Result<u32, Problem> {
    // A second one before would leave an outbox that neither of the two in the file opens.
    shared.keys.until_wrapped().await;
    let present = shared.keys.newest();
    let path = shared.config.credential_file.clone();
    let begun = on_disk({
        let present = present.clone();
        move || begin(&path, &present)
    });
    let renewed = match begun.await? {
        // By an attempt that was cut off.
        Begun::Done(renewed) => renewed,
        Begun::Asking(file, request_id) => {
            let renewed = ask(shared, session, &present, request_id).await?;
            on_disk(move || finish(*file, renewed)).await?
        }
    };
    let renewed = Arc::new(renewed);
    let generation = renewed.generation;
    shared.keys.renew(renewed.clone());
    shared.change(Change::Wrap(shared.keys.clone(), renewed));
    shared.alarm.ring();
    shared.keys.until_wrapped().await;
    let path = shared.config.credential_file.clone();
    on_disk(move || forget_former(&path, generation)).await?;
    Ok(generation)
}

enum Begun {
    Asking(Box<CredentialFile>, Uuid),
    Done(Credential),
}

/// Notes under which id the next credential is asked for, in a file that opens the outbox by itself.
fn begin(path: &Path, present: &Credential) -> Result<Begun, Problem> {
    let mut file = CredentialFile::read(path)?.unwrap_or_else(|| CredentialFile::new(path));
    let is_ours = |kept: &Credential| kept.host_id == present.host_id;
    match &file.credential {
        Some(kept) if !is_ours(kept) => {
            let sentence = format!(
                "{} holds another host's credential by now: start this agent anew",
                path.display()
            );
            return Err(Problem::new(Code::BadCredential, sentence));
        }
        Some(kept) if kept.generation > present.generation => return Ok(Begun::Done(kept.clone())),
        _ => {}
    }
    // What was pasted into the configuration is renewed here.
    file.credential = Some(present.clone());
    file.former = None;
    let request_id = *file.renewal_request.get_or_insert_with(new_id);
    file.save()?;
    Ok(Begun::Asking(Box::new(file), request_id))
}

async fn ask(
    shared: &Shared,
    session: &Session,
    present: &Credential,
    request_id: Uuid,
) -> Result<Credential, Problem> {
    let request = v1::RotateRequest {
        request_id: request_id.as_bytes().to_vec().into(),
    };
    let (label, sealed) = session.sealer.seal(Lane::Rotate, &request);
    let mut call = tonic::Request::new(sealed);
    call.set_timeout(shared.config.connect_timeout);
    let mut client = RotateClient::with_origin(session.channel.clone(), session.origin.clone())
        .max_decoding_message_size(SEALED_BYTES_MAX);
    let answer = client
        .renew(call)
        .await
        .map_err(|status| super::session::problem_of(&status))?;
    let reply: v1::RotateReply = session.sealer.open(&label, &answer.into_inner())?;
    let code = reply.code();
    let text = Zeroizing::new(reply.credential);
    if code != Code::None {
        return Err(Problem::new(code, reply.message));
    }
    let renewed = Credential::parse(&text).map_err(|error| Problem::new(Code::BadCredential, error.to_string()))?;
    if renewed.host_id != present.host_id || renewed.generation != present.generation + 1 {
        let sentence = "the hub answered with a credential that is not this host's next one: tell its operator";
        return Err(Problem::new(Code::BadCredential, sentence));
    }
    Ok(renewed)
}

/// Keeps the new credential beside the former one.
fn finish(mut file: CredentialFile, renewed: Credential) -> Result<Credential, Problem> {
    file.former = file.credential.replace(renewed.clone());
    file.renewal_request = None;
    file.save()?;
    Ok(renewed)
}

/// Takes out of a file what the outbox does not need any more.
pub(crate) fn forget_former(path: &Path, generation: u32) -> Result<(), Problem> {
    let Some(mut file) = CredentialFile::read(path)? else {
        return Ok(());
    };
    let is_newest = file
        .credential
        .as_ref()
        .is_some_and(|kept| kept.generation == generation);
    if is_newest && file.former.take().is_some() {
        file.save()?;
    }
    Ok(())
}

/// Runs what waits for the disk.
async fn on_disk<T: Send + 'static>(work: impl FnOnce() -> Result<T, Problem> + Send + 'static) -> Result<T, Problem> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(Problem::new(Code::Internal, error.to_string())))
}

#[cfg(test)]
mod tests {
    use p2p_sync_proto::keys::{KeyId, MasterKey};

    use super::*;
    use crate::Config;

    fn credentials() -> [Credential; 3] {
        let master = MasterKey::generate(KeyId::parse("k1").expect("valid"));
        [1, 2, 3].map(|generation| master.credential(Uuid::from_u128(1), generation))
    }

    fn asking(path: &Path, present: &Credential) -> (CredentialFile, Uuid) {
        match begin(path, present).expect("the folder can be written") {
            Begun::Asking(file, request_id) => (*file, request_id),
            Begun::Done(_) => panic!("nothing was answered"),
        }
    }

    /// What a start after a kill finds: the generation that is sealed by, and those that may open the outbox besides.
    fn found(folder: &Path, pasted: &str) -> (u32, Vec<u32>) {
        let config = Config::parse(&format!("encryption_key = {pasted}\n"), folder, |_| None).expect("valid");
        let former = config.former_credentials.iter().map(|one| one.generation);
        (config.credential.expect("enrolled").generation, former.collect())
    }

    #[test]
    fn whatever_is_cut_off_between_two_writes_goes_on_and_opens_the_outbox() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("p2p_sync_credential");
        let [first, second, third] = credentials();
        // Pasted: the file is made by the first renewal, and opens the outbox by itself.
        let (_, request_id) = asking(&path, &first);
        assert_eq!(found(folder.path(), ""), (1, vec![]));
        // Killed before the answer: the same request again.
        let (file, again) = asking(&path, &first);
        assert_eq!(again, request_id);
        finish(file, second.clone()).expect("written");
        // Killed before the outbox is wrapped by the new one: both are there.
        assert_eq!(found(folder.path(), ""), (2, vec![1]));
        assert_eq!(found(folder.path(), &first.to_text()), (2, vec![1, 1]));
        // Cut off without a kill: the answer is taken from the file.
        assert!(matches!(begin(&path, &first), Ok(Begun::Done(kept)) if kept.generation == 2));
        // Of another generation nothing is forgotten.
        forget_former(&path, 1).expect("written");
        assert_eq!(found(folder.path(), ""), (2, vec![1]));
        forget_former(&path, 2).expect("written");
        assert_eq!(found(folder.path(), ""), (2, vec![]));

        // The next one is asked for under an id of its own.
        let (file, next) = asking(&path, &second);
        assert_ne!(next, request_id);
        finish(file, third).expect("written");
        assert_eq!(found(folder.path(), &first.to_text()), (3, vec![2, 1]));
    }

    #[test]
    fn another_hosts_file_is_not_written_over() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("p2p_sync_credential");
        let [mine, ..] = credentials();
        let master = MasterKey::generate(KeyId::parse("k1").expect("valid"));
        let (file, _) = asking(&path, &master.credential(Uuid::from_u128(2), 1));
        let refused = begin(&path, &mine).err().expect("another host's");
        assert_eq!(refused.code, Code::BadCredential);
        let kept = CredentialFile::read(&path).expect("readable").expect("there");
        assert_eq!(kept.renewal_request, file.renewal_request);
    }
}
