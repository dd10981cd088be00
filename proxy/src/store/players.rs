//! Presence: which host has which player. Hosts move players by operations of their own, which the database's function that
//! applies them judges; here it is looked at, and the operator has the last word.

use std::time::SystemTime;

use p2p_sync_proto::{Code, Problem};
use uuid::Uuid;

use super::{Store, unsigned};

/// Rows that are listed at one time.
const LISTED_MAX: i64 = 1000;

/// Where a character is, or was last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Player {
    /// Which character.
    pub char_id: u64,
    /// Whose it is; 0 where nobody said.
    pub account_id: u64,
    /// The map.
    pub map: String,
    /// Who has it, or had it last.
    pub host_id: Uuid,
    /// What is written of it is of this tenure.
    pub tenure: u64,
    /// Who may enter it now although another host has it.
    pub promised_to: Option<Uuid>,
    /// When it came to that map.
    pub entered_at: SystemTime,
    /// When its host gave it up, if it has.
    pub left_at: Option<SystemTime>,
}

/// One who had a character, the last one last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlayerTenure {
    /// Its number.
    pub tenure: u64,
    /// Whose it was.
    pub host_id: Uuid,
    /// When it ended, if it has.
    pub ended_at: Option<SystemTime>,
    /// The host's operation (its incarnation and sequence) by which it gave the player up; absent where that was taken from it.
    pub released: Option<(u64, u64)>,
}

impl Store {
    /// Where characters are, those that some host has first; at most 1000, or one.
    pub async fn players(&self, char_id: Option<u64>) -> Result<Vec<Player>, Problem> {
        const LIST: &str = "SELECT char_id, account_id, map, host_id, tenure, \
                CASE WHEN promised_until > now() THEN promised_to END, entered_at, left_at \
            FROM p2p_sync.presence WHERE char_id = coalesce($1, char_id) ORDER BY left_at IS NOT NULL, char_id LIMIT $2";
        let char_id = char_id.map(counted).transpose()?;
        let rows = self.rows(LIST, &[&char_id, &LISTED_MAX]).await?;
        let of = |row: &tokio_postgres::Row| Player {
            char_id: unsigned(row.get(0)),
            account_id: unsigned(row.get(1)),
            map: row.get(2),
            host_id: row.get(3),
            tenure: unsigned(row.get(4)),
            promised_to: row.get(5),
            entered_at: row.get(6),
            left_at: row.get(7),
        };
        Ok(rows.iter().map(of).collect())
    }

    /// Who had a character, one after the other; what ended long ago is forgotten.
    pub async fn player_tenures(&self, char_id: u64) -> Result<Vec<PlayerTenure>, Problem> {
        const TENURES: &str = "SELECT tenure, host_id, ended_at, ended_incarnation, ended_sequence \
            FROM p2p_sync.player_tenures WHERE char_id = $1 AND tenure > 0 ORDER BY tenure";
        let rows = self.rows(TENURES, &[&counted(char_id)?]).await?;
        let of = |row: &tokio_postgres::Row| PlayerTenure {
            tenure: unsigned(row.get(0)),
            host_id: row.get(1),
            ended_at: row.get(2),
            released: row
                .get::<_, Option<i64>>(3)
                .zip(row.get::<_, Option<i64>>(4))
                .map(|(incarnation, sequence)| (unsigned(incarnation), unsigned(sequence))),
        };
        Ok(rows.iter().map(of).collect())
    }

    /// Takes a character from the host that has it, whom it gives, so that the next entry moves it: what that one still
    /// sends of it goes to limbo.
    pub async fn release_player(&self, char_id: u64) -> Result<Option<Uuid>, Problem> {
        let char_id = counted(char_id)?;
        let rows = self.change("SELECT p2p_sync.release_player($1)", &[&char_id]).await?;
        Ok(rows.first().and_then(|row| row.get(0)))
    }

    /// The operator's word whose a character is, 0 to leave that to who enters it next. No host has it any more: the one that
    /// had it is given, and what hosts still send of it goes to limbo. Nothing changes where it is that account's already.
    ///
    /// `NOT_FOUND` where the character was never seen, `NOT_ALLOWED` where the account has 32 others.
    pub async fn set_player_account(&self, char_id: u64, account_id: u32) -> Result<Option<Uuid>, Problem> {
        const SET: &str = "SELECT state, host FROM p2p_sync.set_player_account($1, $2)";
        let rows = self.change(SET, &[&counted(char_id)?, &i64::from(account_id)]).await?;
        let row = rows.first().ok_or_else(super::not_answering)?;
        match row.get::<_, &str>(0) {
            "set" => Ok(row.get(1)),
            "full" => Err(Problem::new(
                Code::NotAllowed,
                format!("account {account_id} has 32 characters: give away those that are not its own first"),
            )),
            _ => Err(never_seen(char_id)),
        }
    }

    /// A ticket: for 10 minutes a host may enter a character, or another one of its account, although another host has it. The
    /// first entry of the account, by whichever host, uses it up.
    ///
    /// `NOT_FOUND` where the host is unknown, locked or revoked, or the character was never seen.
    pub async fn promise_player(&self, char_id: u64, host_id: Uuid) -> Result<(), Problem> {
        const PROMISE: &str = "SELECT p2p_sync.promise_player($1, $2)";
        let rows = self.change(PROMISE, &[&counted(char_id)?, &host_id]).await?;
        if rows.first().is_some_and(|row| row.get(0)) {
            return Ok(());
        }
        Err(Problem::new(
            Code::NotFound,
            format!(
                "there is no active host {host_id}, or character {char_id} was never seen: see `hosts list` and `players list`"
            ),
        ))
    }
}

/// That a character is not among those the hub knows.
pub(crate) fn never_seen(char_id: u64) -> Problem {
    let sentence = format!("character {char_id} was never seen: see `p2p-sync-proxy players list`");
    Problem::new(Code::NotFound, sentence)
}

fn counted(char_id: u64) -> Result<i64, Problem> {
    i64::try_from(char_id).map_err(|_| Problem::new(Code::BadPath, format!("{char_id} is no character's id")))
}
