//! Scripts, which Redis runs in one step.

use redis::{Cmd, ErrorKind, FromRedisValue, RedisResult, ServerErrorKind, ToRedisArgs};

use super::RedisClient;

/// A script, sent whole only to a server that does not know it yet. The crate's own call would first have every node of a
/// cluster take it in, and fail where one of them is down.
#[derive(Debug)]
pub struct Script {
    code: String,
    hash: String,
}

/// What a script is called with. Its keys have to share the word in braces.
#[derive(Clone, Debug, Default)]
pub struct Call {
    keys: Vec<String>,
    arguments: Vec<Vec<u8>>,
}

impl Script {
    /// By its code in Lua.
    pub fn new(code: &str) -> Self {
        Self {
            code: code.to_owned(),
            hash: redis::Script::new(code).get_hash().to_owned(),
        }
    }

    /// Runs it.
    pub async fn run<T: FromRedisValue>(&self, client: &mut RedisClient, call: &Call) -> RedisResult<T> {
        let unknown = ErrorKind::Server(ServerErrorKind::NoScript);
        match call.command("EVALSHA", &self.hash).query_async(client).await {
            Err(error) if error.kind() == unknown => call.command("EVAL", &self.code).query_async(client).await,
            answered => answered,
        }
    }
}

impl Call {
    /// Adds a key.
    pub fn key(&mut self, key: impl Into<String>) -> &mut Self {
        self.keys.push(key.into());
        self
    }

    /// Adds an argument.
    pub fn arg(&mut self, argument: impl ToRedisArgs) -> &mut Self {
        self.arguments.extend(argument.to_redis_args());
        self
    }

    fn command(&self, name: &str, script: &str) -> Cmd {
        let mut command = redis::cmd(name);
        command
            .arg(script)
            .arg(self.keys.len())
            .arg(&self.keys)
            .arg(&self.arguments);
        command
    }
}
