//! A host's calls for embeddings.

use p2p_sync_proto::{
    Code, Position, Problem,
    v1::{self, SyncDataType, pull_reply},
};

use crate::{
    embed::{Caller, Near, Query},
    open::Sender,
    pipeline::Hub,
    store::Found,
};

fn caller(sender: &Sender) -> Caller {
    let label = sender.label();
    Caller::Host {
        host_id: sender.host_id(),
        position: Position {
            incarnation: label.incarnation,
            sequence: label.sequence,
        },
    }
}

pub(super) async fn create(
    hub: &Hub,
    sender: &Sender,
    create: v1::CreateEmbedding,
) -> Result<pull_reply::What, Problem> {
    let texts = [create.text];
    let vectors = hub.embeddings.create(&hub.store, caller(sender), &texts).await?;
    let values = vectors.into_iter().next().unwrap_or_default();
    Ok(pull_reply::What::Embedding(v1::Embedding { values }))
}

pub(super) async fn search(
    hub: &Hub,
    sender: &Sender,
    search: v1::SearchEmbeddings,
) -> Result<pull_reply::What, Problem> {
    let near = match (search.text.is_empty(), search.embedding.is_empty()) {
        (true, _) => Near::Vector(search.embedding),
        (false, true) => Near::Text(search.text),
        (false, false) => {
            let sentence = "a search is near to a text or to an embedding, not to both: leave one out";
            return Err(Problem::new(Code::BadRequest, sentence));
        }
    };
    let read = |number: &i32| {
        SyncDataType::try_from(*number).map_err(|_| {
            Problem::new(
                Code::UnknownType,
                format!("{number} is no type of data that this hub knows"),
            )
        })
    };
    let query = Query {
        near,
        limit: search.limit,
        maps: search.maps,
        types: search.types.iter().map(read).collect::<Result<_, _>>()?,
        prefix: None,
        since_ms: search.since_ms,
        until_ms: search.until_ms,
        similarity_min: search.similarity_min,
    };
    let found = hub.embeddings.search(&hub.store, caller(sender), query).await?;
    let hits = found.into_iter().map(hit).collect();
    Ok(pull_reply::What::Hits(v1::Hits { hits }))
}

fn hit(found: Found) -> v1::Hit {
    v1::Hit {
        path: found.path,
        text: found.text,
        similarity: found.similarity,
        data_type: found.data_type.into(),
        map: found.map,
        account_id: found.account_id,
        received_at_ms: found.received_at_ms,
        stream_sequence: found.stream_sequence,
        metadata: found.metadata.unwrap_or_default(),
    }
}
