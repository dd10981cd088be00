//! Credentials that are renewed: given out provisionally, promoted by their first use, and a copy of one found out.

use p2p_sync_proto::{Code, Problem};
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::{Store, not_answering, signed};

impl Store {
    /// The next credential of a host that holds `generation`, as its master key and generation: of the key `key_id` where one
    /// is `due`, and the same again for the same request. `None` where none is due.
    ///
    /// `LOCKED`, and the host is, where another request was there before it under the same generation; `HUB_UNAVAILABLE`.
    pub async fn renew_credential(
        &self,
        host_id: Uuid,
        generation: u32,
        request_id: Uuid,
        key_id: &str,
        due: bool,
    ) -> Result<Option<(String, u32)>, Problem> {
        const RENEW: &str = "SELECT state, key, next_generation FROM p2p_sync.renew_credential($1, $2, $3, $4, $5)";
        let generation = i64::from(generation);
        let values: [&(dyn ToSql + Sync); 5] = [&host_id, &generation, &request_id, &key_id, &due];
        let rows = self.change(RENEW, &values).await?;
        let row = rows.first().ok_or_else(not_answering)?;
        match row.get::<_, &str>(0) {
            "given" => Ok(Some((
                row.get(1),
                u32::try_from(row.get::<_, i64>(2)).unwrap_or(u32::MAX),
            ))),
            "cloned" => Err(Problem::new(
                Code::Locked,
                "this credential was renewed by another machine: there is a copy of it, and the host is locked until the hub's \
                 operator has decided",
            )),
            _ => Ok(None),
        }
    }

    /// Makes a credential that was given out the host's present one; false where that was done before.
    pub async fn promote_credential(&self, host_id: Uuid, generation: u32) -> Result<bool, Problem> {
        const PROMOTE: &str = "UPDATE p2p_sync.hosts SET generation = generation + 1, former_key_id = key_id, \
                key_id = next_key_id, renewed_by = next_request_id, renewed_at = now(), \
                next_key_id = NULL, next_request_id = NULL \
            WHERE host_id = $1 AND generation + 1 = $2 AND next_key_id IS NOT NULL AND status = 'active'";
        Ok(self.write(PROMOTE, &[&host_id, &i64::from(generation)]).await? > 0)
    }

    /// Locks a host whose former credential opens an outbox that the hub has not heard of: the host itself has renewed it, so
    /// somebody holds a copy. Gives whether it was locked.
    ///
    /// An opening that is known, or is older than one that is, is a message from back then that somebody repeats: that proves
    /// nothing and locks nobody.
    pub async fn lock_cloned(
        &self,
        host_id: Uuid,
        generation: u32,
        opening_id: Uuid,
        incarnation: u64,
    ) -> Result<bool, Problem> {
        const LOCK: &str = "UPDATE p2p_sync.hosts AS h SET status = 'locked', lock_reason = \
                'its credential of generation ' || $2::bigint || ' came into use again after it was renewed: there is a copy of it' \
            WHERE host_id = $1 AND status = 'active' AND generation > $2::bigint AND NOT EXISTS ( \
                SELECT FROM p2p_sync.settled_sequences AS s WHERE s.host_id = h.host_id \
                    AND (s.incarnation > $3 OR s.incarnation = $3 AND s.opening_id = $4))";
        let generation = i64::from(generation);
        let values: [&(dyn ToSql + Sync); 4] = [&host_id, &generation, &signed(incarnation), &opening_id];
        Ok(self.write(LOCK, &values).await? > 0)
    }
}
