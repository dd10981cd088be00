//! What hosts ask for: which maps there are, one that nobody holds, to hand theirs over, to release it. Each right is checked
//! where the change is made.

use p2p_sync_proto::{
    Code, Problem,
    ids::read_id,
    path::check_map,
    v1::{self, map_request::What},
};
use uuid::Uuid;

use super::{assignment, id_bytes, milliseconds};
use crate::{
    open::Sender,
    operation::COUNTER_MAX,
    pipeline::Hub,
    store::{HandoverOrder, HostRole, MapRow},
};

/// Maps that are asked for by name, and positions of copies, in one request.
const NAMES_MAX: usize = 1024;
/// Maps in one answer; who is to see more asks by name.
pub const LISTED_MAX: u32 = 1024;

/// Answers a request.
pub async fn answer(hub: &Hub, sender: &Sender, request: v1::MapRequest) -> v1::MapReply {
    let done = decide(hub, sender, request).await;
    let maps = match done {
        Ok(maps) => maps,
        Err(problem) => return refused(problem),
    };
    v1::MapReply {
        maps: maps.into_iter().map(info).collect(),
        ..Default::default()
    }
}

/// The answer that nothing was done.
pub fn refused(problem: Problem) -> v1::MapReply {
    let problem = problem.shortened();
    v1::MapReply {
        code: problem.code.into(),
        message: problem.sentence,
        ..Default::default()
    }
}

fn info(row: MapRow) -> v1::MapInfo {
    let ids = |hosts: Vec<Uuid>| hosts.into_iter().map(|host| id_bytes(Some(host)).into()).collect();
    v1::MapInfo {
        map: row.map,
        host_id: id_bytes(row.host_id).into(),
        tenure: row.tenure,
        expires_in_ms: milliseconds(row.expires_in),
        backups: ids(row.backups),
        assistants: ids(row.assistants),
        successor: id_bytes(row.successor).into(),
        stream_head: row.stream_head,
    }
}

async fn decide(hub: &Hub, sender: &Sender, request: v1::MapRequest) -> Result<Vec<MapRow>, Problem> {
    let bad = |sentence: &str| Problem::new(Code::BadRequest, sentence);
    if !hub.store.leases().required {
        return Err(bad(
            "the hub grants no leases: every host writes every map, and there is nothing to hand over",
        ));
    }
    let what = request
        .what
        .ok_or_else(|| bad("the request asks for nothing: update the agent"))?;
    check(&what)?;
    let (host_id, incarnation) = (sender.host_id(), sender.label().incarnation);
    // Asking changes nothing, and is not counted.
    if !matches!(what, What::List(_)) {
        if incarnation > COUNTER_MAX || request.counter > COUNTER_MAX {
            return Err(bad("the request's counter is larger than the hub counts"));
        }
        hub.store.count_request(host_id, incarnation, request.counter).await?;
    }
    let map = match what {
        What::List(list) => return list_maps(hub, sender, &list.maps).await,
        What::Copies(copies) => {
            let positions = copies.positions.into_iter();
            let positions: Vec<(String, u64)> = positions.map(|copy| (copy.map, copy.sequence)).collect();
            hub.store.note_copies(host_id, &positions).await?;
            // A hand-over may wait for it.
            hub.attends.hear();
            return Ok(Vec::new());
        }
        What::Release(release) => {
            hub.store.give_map_up(host_id, &release.map, release.tenure).await?;
            release.map
        }
        What::Assign(assign) => {
            let to = named(&assign.host_id)?.unwrap_or(host_id);
            give(hub, host_id, &assign.map, to).await?;
            assign.map
        }
        What::Migrate(migrate) => {
            hand_over(hub, sender, &migrate.map, named(&migrate.host_id)?).await?;
            migrate.map
        }
    };
    hub.attends.tell();
    hub.store.maps(host_id, false, &[map], 1).await
}

/// What has to be right before anything is counted or locked.
fn check(what: &What) -> Result<(), Problem> {
    match what {
        What::List(list) if list.maps.len() > NAMES_MAX => Err(too_many()),
        What::List(list) => list.maps.iter().try_for_each(|map| check_map(map)),
        What::Assign(assign) => check_map(&assign.map),
        What::Migrate(migrate) => check_map(&migrate.map),
        What::Release(release) => check_map(&release.map),
        What::Copies(copies) if copies.positions.len() > NAMES_MAX => Err(too_many()),
        What::Copies(copies) => copies.positions.iter().try_for_each(|copy| check_map(&copy.map)),
    }
}

fn too_many() -> Problem {
    Problem::new(
        Code::BadRequest,
        format!("a request names at most {NAMES_MAX} maps: send several"),
    )
}

/// None where nobody is named.
fn named(host_id: &[u8]) -> Result<Option<Uuid>, Problem> {
    if host_id.is_empty() {
        return Ok(None);
    }
    let bad = || Problem::new(Code::BadRequest, "a host's id has 16 bytes: update the agent");
    read_id(host_id).map(Some).ok_or_else(bad)
}

async fn list_maps(hub: &Hub, sender: &Sender, names: &[String]) -> Result<Vec<MapRow>, Problem> {
    let sees_all = sender.role() == HostRole::Hub;
    hub.store.maps(sender.host_id(), sees_all, names, LISTED_MAX).await
}

async fn give(hub: &Hub, by: Uuid, map: &str, to: Uuid) -> Result<(), Problem> {
    let world = hub.store.world().await?;
    let score = assignment::score(&world, &hub.maps, to).unwrap_or(0.0);
    let facts = world
        .hosts
        .iter()
        .find(|host| host.host_id == to)
        .map(|host| host.facts);
    let maps_max = assignment::maps_max(&hub.maps, &facts.unwrap_or_default());
    hub.store.ask_for_map(by, map, to, score, maps_max).await
}

async fn hand_over(hub: &Hub, sender: &Sender, map: &str, to: Option<Uuid>) -> Result<(), Problem> {
    let world = hub.store.world().await?;
    let facts = world.maps.iter().find(|facts| facts.map == map);
    let by = sender.host_id();
    // Whoever has no right to it is told nothing of who would fit.
    let is_own = facts.is_some_and(|facts| facts.holder == Some(by)) || sender.role() == HostRole::Hub;
    let best = || {
        facts
            .filter(|_| is_own)
            .and_then(|facts| assignment::best(&world, &hub.maps, facts))
    };
    let Some(to) = to.or_else(best) else {
        let holder = facts.and_then(|facts| facts.holder);
        let sentence = match holder {
            Some(holder) if !is_own => format!("host {holder} holds the lease of {map}"),
            None => format!("nobody holds the lease of {map}"),
            Some(_) => {
                let sentence = format!("no other host fits {map} now: keep it, or release it to nobody");
                return Err(Problem::new(Code::NotFound, sentence));
            }
        };
        return Err(Problem::new(Code::NotLeaseHolder, sentence));
    };
    assignment::check_listens(&world, &hub.maps, to)?;
    let score = assignment::score(&world, &hub.maps, to).unwrap_or(0.0);
    let by = Some(by);
    hub.store
        .begin_handover(&HandoverOrder { by, map, to, score }, &hub.maps)
        .await
}
