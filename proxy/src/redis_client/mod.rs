//! Redis in whichever form it runs: one server, a master that Sentinels name, or a cluster.
//!
//! Who uses it holds a [`RedisClient`], shared by all, which connects when it is first used and heals by itself. It is a
//! connection like any of the crate's, and what form it has shows in two things alone: keys that are touched together have the
//! same word in braces, which keeps them on one node of a cluster, and scripts are called by [`Script`]. What others publish is
//! heard over connections apart ([`RedisClient::hear`]).

mod cluster;
mod script;
mod sentinel;

use std::{collections::HashMap, fmt, time::Duration};

use redis::{
    Client, Cmd, ConnectionAddr, ConnectionInfo, FromRedisValue as _, IntoConnectionInfo, Pipeline,
    RedisConnectionInfo, RedisFuture, RedisResult, Value,
    aio::{ConnectionLike, ConnectionManager, ConnectionManagerConfig, PubSub},
};
use tokio::time::timeout;

pub use self::script::{Call, Script};
use self::{cluster::Cluster, sentinel::Watched};
use crate::{
    config::{Address, Redis, RedisMode},
    secret::Secret,
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A command that takes longer is as good as failed: whoever waits has a way without Redis.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(1);
/// For a question that `check` asks, a search for the master and a first connection included.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct RedisClient(Form);

#[derive(Clone)]
enum Form {
    Standalone(Client, ConnectionManager),
    Sentinel(Watched),
    Cluster(Cluster),
}

/// Without the connections, which show their password.
impl fmt::Debug for RedisClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let form = match &self.0 {
            Form::Standalone(..) => "Standalone",
            Form::Sentinel(_) => "Sentinel",
            Form::Cluster(_) => "Cluster",
        };
        f.debug_tuple("RedisClient").field(&form).finish()
    }
}

impl RedisClient {
    /// Connects to nothing yet. Must be called inside the tokio runtime.
    pub fn open(settings: &Redis) -> RedisResult<Self> {
        let form = match &settings.mode {
            RedisMode::Standalone => {
                let address = settings.addresses.first().ok_or_else(|| failed("no server is named"))?;
                let client = Client::open(info(address, &login(&settings.password, settings.db))?)?;
                let timeouts = ConnectionManagerConfig::new()
                    .set_connection_timeout(Some(CONNECT_TIMEOUT))
                    .set_response_timeout(Some(RESPONSE_TIMEOUT))
                    .set_number_of_retries(1);
                let commands = ConnectionManager::new_lazy_with_config(client.clone(), timeouts)?;
                Form::Standalone(client, commands)
            }
            RedisMode::Sentinel { master, password } => Form::Sentinel(Watched::open(settings, master, password)?),
            RedisMode::Cluster => Form::Cluster(Cluster::open(settings)?),
        };
        Ok(Self(form))
    }

    /// Publishes, and gives for each message how many heard it where it was published: in a cluster that is one node, of those
    /// that can be reached, and says nothing of the others.
    pub async fn publish(&mut self, messages: &Pipeline) -> RedisResult<Vec<i64>> {
        match &mut self.0 {
            Form::Standalone(_, commands) => messages.query_async(commands).await,
            Form::Sentinel(watched) => messages.query_async(watched).await,
            Form::Cluster(cluster) => cluster.publish(messages).await,
        }
    }

    /// Whether [`Self::publish`] counts all who hear.
    pub fn counts_all_who_hear(&self) -> bool {
        !matches!(self.0, Form::Cluster(_))
    }

    /// How many listen to each channel, at whichever node.
    pub async fn listeners(&mut self, channels: &[String]) -> RedisResult<HashMap<String, i64>> {
        redis::cmd("PUBSUB").arg("NUMSUB").arg(channels).query_async(self).await
    }

    /// A new connection to hear what is published: of a cluster to any node, for a message goes to all.
    pub async fn hear(&self) -> RedisResult<PubSub> {
        match &self.0 {
            Form::Standalone(client, _) => within(CONNECT_TIMEOUT, client.get_async_pubsub()).await,
            Form::Sentinel(watched) => watched.hear().await,
            Form::Cluster(cluster) => cluster.hear().await,
        }
    }

    /// In how many parts a cache that has no part of its own for each host is spread over the nodes.
    pub fn parts(&self) -> usize {
        match self.0 {
            Form::Standalone(..) | Form::Sentinel(_) => 1,
            Form::Cluster(_) => cluster::PARTS,
        }
    }

    /// Asks whether it serves, and is what the settings say; the error completes "Redis ...".
    pub async fn check(&mut self) -> Result<String, String> {
        let asked = timeout(ANSWER_TIMEOUT, async {
            match &mut self.0 {
                Form::Standalone(_, commands) => check_server(commands).await,
                Form::Sentinel(watched) => watched.check().await,
                Form::Cluster(cluster) => cluster.check().await,
            }
        });
        match asked.await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => Err(unreachable(&error.to_string())),
            Err(_) => Err(unreachable("it does not answer")),
        }
    }
}

impl ConnectionLike for RedisClient {
    fn req_packed_command<'a>(&'a mut self, cmd: &'a Cmd) -> RedisFuture<'a, Value> {
        match &mut self.0 {
            Form::Standalone(_, commands) => commands.req_packed_command(cmd),
            Form::Sentinel(watched) => watched.req_packed_command(cmd),
            Form::Cluster(cluster) => cluster.commands.req_packed_command(cmd),
        }
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        commands: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        match &mut self.0 {
            Form::Standalone(_, server) => server.req_packed_commands(commands, offset, count),
            Form::Sentinel(watched) => watched.req_packed_commands(commands, offset, count),
            Form::Cluster(cluster) => cluster.commands.req_packed_commands(commands, offset, count),
        }
    }

    fn get_db(&self) -> i64 {
        match &self.0 {
            Form::Standalone(_, commands) => commands.get_db(),
            Form::Sentinel(watched) => watched.get_db(),
            Form::Cluster(_) => 0,
        }
    }
}

fn unreachable(reason: &str) -> String {
    format!("cannot be reached ({reason}): check redis_host, redis_port and redis_password")
}

/// One server that is alone, and takes writes.
async fn check_server(commands: &mut ConnectionManager) -> RedisResult<Result<String, String>> {
    let role: Vec<Value> = redis::cmd("ROLE").query_async(commands).await?;
    let role = role
        .into_iter()
        .next()
        .map_or(Ok(String::new()), String::from_redis_value)?;
    let info: String = redis::cmd("INFO").arg("cluster").query_async(commands).await?;
    let what_is_wrong = match role.as_str() {
        "sentinel" => "is a Sentinel: set redis_mode = sentinel",
        "slave" => {
            "is a replica, which takes no writes: name its master, or set redis_mode = sentinel and name the Sentinels"
        }
        _ if info.contains("cluster_enabled:1") => "is a node of a cluster: set redis_mode = cluster",
        _ => return Ok(Ok("ok".to_owned())),
    };
    Ok(Err(what_is_wrong.to_owned()))
}

/// Whoever it is for: the library's name and version are nobody's business.
fn login(password: &Secret, db: u16) -> RedisConnectionInfo {
    let login = RedisConnectionInfo::default()
        .set_db(i64::from(db))
        .set_skip_set_lib_name();
    if password.expose().is_empty() {
        login
    } else {
        login.set_password(password.expose())
    }
}

fn info(address: &Address, login: &RedisConnectionInfo) -> RedisResult<ConnectionInfo> {
    let address = ConnectionAddr::Tcp(address.host.clone(), address.port);
    Ok(address.into_connection_info()?.set_redis_settings(login.clone()))
}

async fn within<T>(time: Duration, call: impl Future<Output = RedisResult<T>>) -> RedisResult<T> {
    timeout(time, call)
        .await
        .unwrap_or_else(|_| Err(failed("Redis does not answer")))
}

fn failed(what: &'static str) -> redis::RedisError {
    (redis::ErrorKind::Io, what).into()
}
