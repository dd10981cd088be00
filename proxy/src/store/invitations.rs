//! Invitations: the one-time tokens that machines enrol with, of which the database knows the hashes alone.

use std::{collections::HashMap, time::Duration};

use p2p_sync_proto::{Code, Problem, token};
use tokio_postgres::Row;
use uuid::Uuid;

use super::{HostRole, Store, not_answering, unsigned};

/// How long a used or expired invitation is shown, and told of as what it is: days after its end.
pub(super) const KEPT_DAYS: i32 = 30;

const LIST: &str = "SELECT invitation_id, account_id, name, maps, host_id, \
        CASE WHEN used_at IS NOT NULL THEN 'used' WHEN revoked_at IS NOT NULL THEN 'revoked' \
            WHEN expires_at <= now() THEN 'expired' ELSE 'open' END, \
        to_char(expires_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"') \
    FROM p2p_sync.invitations ORDER BY invitation_id";

/// What an invitation gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invitation {
    /// The volunteer's game account; 0 for none.
    pub account_id: u32,
    /// For people.
    pub name: String,
    /// What the host may do beyond others.
    pub role: HostRole,
    /// That the host may write from then on, where nobody else holds them.
    pub maps: Vec<String>,
    /// How long it can be used.
    pub expires_in: Duration,
}

/// An invitation as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvitationRow {
    /// Its number.
    pub invitation_id: u64,
    /// The volunteer's game account.
    pub account_id: u32,
    /// For people.
    pub name: String,
    /// That it gives.
    pub maps: Vec<String>,
    /// Who used it.
    pub host_id: Option<Uuid>,
    /// `open`, `used`, `revoked` or `expired`.
    pub state: String,
    /// UTC.
    pub expires_at: String,
}

/// What a master key is in use for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyUsers {
    /// Whose credentials are of it.
    pub hosts: u64,
    /// Whose tokens are sealed by it, and can still be used.
    pub invitations: u64,
}

/// A host that a token made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enrolled {
    /// Its identity.
    pub host_id: Uuid,
    /// The master key that its first credential is derived from.
    pub key_id: String,
    /// That it holds now.
    pub maps: Vec<String>,
    /// That it was to be given, and that another host holds.
    pub maps_taken: Vec<String>,
}

impl Store {
    /// Keeps the hash of a token's id, and what the token gives; gives the invitation's number.
    pub async fn invite(&self, token_id: Uuid, key_id: &str, invitation: &Invitation) -> Result<u64, Problem> {
        const INVITE: &str = "INSERT INTO p2p_sync.invitations (token_hash, key_id, account_id, name, maps, expires_at, role) \
            VALUES ($1, $2, $3, $4, $5, now() + make_interval(secs => $6), $7) RETURNING invitation_id";
        let hash = token::hash(token_id);
        let account_id = i64::from(invitation.account_id);
        let seconds = invitation.expires_in.as_secs_f64();
        let values: [&(dyn tokio_postgres::types::ToSql + Sync); 7] = [
            &hash.as_slice(),
            &key_id,
            &account_id,
            &invitation.name,
            &invitation.maps,
            &seconds,
            &invitation.role.as_str(),
        ];
        let rows = self.change(INVITE, &values).await?;
        rows.first().map(|row| unsigned(row.get(0))).ok_or_else(not_answering)
    }

    /// Makes a host of a token's holder, once: whoever comes with the same public key again gets the same answer until the
    /// token expires. The first credential is of the master key `key_id`.
    ///
    /// Refuses with `TOKEN_USED` (by another key), `TOKEN_EXPIRED`, `REVOKED`, and `NOT_FOUND` where the token is not known.
    pub async fn enrol(&self, token_id: Uuid, public_key: &[u8], key_id: &str) -> Result<Enrolled, Problem> {
        const ENROL: &str = "SELECT state, host, key, granted, taken \
            FROM p2p_sync.enrol($1, $2, $3, $4, make_interval(secs => $5))";
        let hash = token::hash(token_id);
        let seconds = self.leases().length.as_secs_f64();
        let values: [&(dyn tokio_postgres::types::ToSql + Sync); 5] =
            [&hash.as_slice(), &public_key, &Uuid::new_v4(), &key_id, &seconds];
        let rows = self.change(ENROL, &values).await?;
        let row = rows.first().ok_or_else(not_answering)?;
        let refused = |code, sentence: &str| {
            Err(Problem::new(
                code,
                format!("{sentence}: ask the operator for a new one"),
            ))
        };
        match row.get::<_, &str>(0) {
            "enrolled" => Ok(Enrolled {
                host_id: row.get(1),
                key_id: row.get(2),
                maps: row.get(3),
                maps_taken: row.get(4),
            }),
            "used" => refused(
                Code::TokenUsed,
                "this token was used by another machine, or by this one before its files were lost. A token is for one machine",
            ),
            "renewed" => refused(
                Code::TokenUsed,
                "the host of this token has renewed its credential since, and holds it",
            ),
            "expired" => refused(Code::TokenExpired, "this token has expired"),
            "revoked" => refused(Code::Revoked, "this token, or the host that it made, was revoked"),
            _ => refused(Code::NotFound, "this token is not known here any more"),
        }
    }

    /// How many hosts hold a credential of each master key, or have been given one, and how many tokens are open that are
    /// sealed by it. Revoked hosts do not count.
    pub async fn key_users(&self) -> Result<HashMap<String, KeyUsers>, Problem> {
        const USERS: &str = "SELECT key_id, sum(hosts)::bigint, sum(invitations)::bigint FROM ( \
                SELECT key_id, 1 AS hosts, 0 AS invitations FROM p2p_sync.hosts WHERE status <> 'revoked' \
                UNION ALL SELECT next_key_id, 1, 0 FROM p2p_sync.hosts \
                    WHERE status <> 'revoked' AND next_key_id IS NOT NULL \
                UNION ALL SELECT key_id, 0, 1 FROM p2p_sync.invitations \
                    WHERE used_at IS NULL AND revoked_at IS NULL AND expires_at > now() \
            ) AS users GROUP BY key_id";
        let of = |row: &Row| {
            let users = KeyUsers {
                hosts: unsigned(row.get(1)),
                invitations: unsigned(row.get(2)),
            };
            (row.get(0), users)
        };
        Ok(self.rows(USERS, &[]).await?.iter().map(of).collect())
    }

    /// All invitations that are kept, in the order they were made.
    pub async fn invitations(&self) -> Result<Vec<InvitationRow>, Problem> {
        let of = |row: &Row| InvitationRow {
            invitation_id: unsigned(row.get(0)),
            account_id: u32::try_from(row.get::<_, i64>(1)).unwrap_or_default(),
            name: row.get(2),
            maps: row.get(3),
            host_id: row.get(4),
            state: row.get(5),
            expires_at: row.get(6),
        };
        Ok(self.rows(LIST, &[]).await?.iter().map(of).collect())
    }

    /// Keeps an invitation from being used; false where none of this number is open.
    pub async fn revoke_invitation(&self, invitation_id: u64) -> Result<bool, Problem> {
        const REVOKE: &str = "UPDATE p2p_sync.invitations SET revoked_at = now() \
            WHERE invitation_id = $1 AND used_at IS NULL AND revoked_at IS NULL AND expires_at > now()";
        let number = i64::try_from(invitation_id).unwrap_or(i64::MAX);
        Ok(self.write(REVOKE, &[&number]).await? > 0)
    }
}
