//! A Redis Cluster.

use std::collections::HashMap;

use redis::{
    Client, ConnectionInfo, FromRedisValue as _, Pipeline, RedisConnectionInfo, RedisResult, Value,
    aio::PubSub,
    cluster::{ClusterClientBuilder, ClusterConfig},
    cluster_async::ClusterConnection,
    cluster_routing::SingleNodeRoutingInfo,
};

use super::{CONNECT_TIMEOUT, RESPONSE_TIMEOUT, failed, info, login, within};
use crate::config::{Address, Redis};

/// Parts of what is spread over the nodes, each on one of them: more than most clusters have masters.
pub(super) const PARTS: usize = 16;
/// Of a command whose node is away or does not have its slot any more.
const RETRIES: u32 = 3;
/// Slots that a cluster has.
const SLOTS: &str = "16384";

/// The connections to all nodes, which the crate keeps, and what is needed to make further ones.
#[derive(Clone)]
pub(super) struct Cluster {
    pub(super) commands: ClusterConnection,
    login: RedisConnectionInfo,
    named: Vec<Address>,
}

impl Cluster {
    pub(super) fn open(settings: &Redis) -> RedisResult<Self> {
        let login = login(&settings.password, 0);
        let named = settings.addresses.iter().map(|address| info(address, &login));
        let client = ClusterClientBuilder::new(named.collect::<RedisResult<Vec<ConnectionInfo>>>()?)
            .connection_timeout(CONNECT_TIMEOUT)
            .response_timeout(RESPONSE_TIMEOUT)
            .retries(RETRIES)
            .min_retry_wait(10)
            .max_retry_wait(100)
            .build()?;
        Ok(Self {
            commands: client.get_pending_async_connection_with_config(ClusterConfig::new()),
            login,
            named: settings.addresses.clone(),
        })
    }

    /// At any node: it tells all others.
    pub(super) async fn publish(&mut self, messages: &Pipeline) -> RedisResult<Vec<i64>> {
        let anywhere = SingleNodeRoutingInfo::Random;
        let answers = self
            .commands
            .route_pipeline(messages.clone(), 0, messages.len(), anywhere)
            .await?;
        let answers = answers.into_iter().map(Value::extract_error);
        answers.map(|answer| Ok(i64::from_redis_value(answer?)?)).collect()
    }

    /// At a node that the others hold for alive, or one that is named, if nobody says which are.
    pub(super) async fn hear(&self) -> RedisResult<PubSub> {
        let mut nodes = self.alive().await.unwrap_or_default();
        fastrand::shuffle(&mut nodes);
        nodes.extend(self.named.iter().cloned());
        let mut last = failed("no node of the cluster answers");
        for node in &nodes {
            let client = Client::open(info(node, &self.login)?)?;
            match within(CONNECT_TIMEOUT, client.get_async_pubsub()).await {
                Ok(hearing) => return Ok(hearing),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    pub(super) async fn check(&mut self) -> RedisResult<Result<String, String>> {
        let info: String = redis::cmd("CLUSTER")
            .arg("INFO")
            .query_async(&mut self.commands)
            .await?;
        let told: HashMap<&str, &str> = info.lines().filter_map(|line| line.trim().split_once(':')).collect();
        let of = |name: &str| told.get(name).copied().unwrap_or_default();
        let (assigned, well) = (of("cluster_slots_assigned"), of("cluster_slots_ok"));
        if assigned != SLOTS {
            return Ok(Err(format!(
                "has given its nodes {assigned} of {SLOTS} slots: run redis-cli --cluster fix"
            )));
        }
        if well != SLOTS {
            return Ok(Err(format!(
                "has {well} of {SLOTS} slots on nodes that are up: start the nodes that are down"
            )));
        }
        let nodes = self.alive().await?.len();
        Ok(Ok(format!("ok (a cluster of {nodes} nodes)")))
    }

    async fn alive(&self) -> RedisResult<Vec<Address>> {
        let mut question = redis::cmd("CLUSTER");
        let nodes: String = question.arg("NODES").query_async(&mut self.commands.clone()).await?;
        Ok(nodes.lines().filter_map(address_of).collect())
    }
}

/// Of a line of `CLUSTER NODES`, `<id> <host>:<port>@<bus port>[,<name>] <flags> ...`; absent where the node is away.
fn address_of(line: &str) -> Option<Address> {
    let mut fields = line.split(' ').skip(1);
    let (address, flags) = (fields.next()?, fields.next()?);
    let is_away = |flag| matches!(flag, "fail" | "fail?" | "handshake" | "noaddr");
    if flags.split(',').any(is_away) {
        return None;
    }
    let (host, port) = address.split('@').next()?.rsplit_once(':')?;
    Some(Address {
        host: Some(host).filter(|host| !host.is_empty())?.to_owned(),
        port: port.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_that_are_away_or_have_no_address_are_passed_over() {
        let told = |line: &str| address_of(line).map(|address| address.to_string());
        let of = |address: &str, flags: &str| format!("07c3 {address} {flags} - 0 1426238317239 4 connected 0-5460");
        assert_eq!(
            told(&of("127.0.0.1:7001@17001", "myself,master")).as_deref(),
            Some("127.0.0.1:7001")
        );
        assert_eq!(
            told(&of("::1:7001@17001,redis-1", "slave")).as_deref(),
            Some("[::1]:7001")
        );
        for flags in ["master,fail", "master,fail?", "handshake", "slave,noaddr"] {
            assert_eq!(told(&of("127.0.0.1:7001@17001", flags)), None, "{flags}");
        }
        assert_eq!(told(&of(":0@0", "master,noaddr")), None);
        assert_eq!(told(""), None);
    }
}
