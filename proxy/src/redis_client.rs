//! The connection to Redis: shared by all who use it, opened when first needed, healing by itself. Beside it only what others
//! publish is heard by one of its own.

use std::time::Duration;

use redis::{
    Client, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, RedisConnectionInfo, RedisResult,
    aio::{ConnectionManager, ConnectionManagerConfig},
};

use crate::config::Redis;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A command that takes longer is as good as failed: whoever waits has a way without Redis.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(1);

/// What connections are made by; makes none.
pub fn client(settings: &Redis) -> RedisResult<Client> {
    let mut login = RedisConnectionInfo::default()
        .set_db(i64::from(settings.db))
        .set_skip_set_lib_name();
    if !settings.password.expose().is_empty() {
        login = login.set_password(settings.password.expose());
    }
    let address = ConnectionAddr::Tcp(settings.host.clone(), settings.port);
    let info: ConnectionInfo = address.into_connection_info()?.set_redis_settings(login);
    Client::open(info)
}

/// A connection that is opened by its first command. Must be called inside the tokio runtime.
pub fn connect(settings: &Redis) -> RedisResult<ConnectionManager> {
    let timeouts = ConnectionManagerConfig::new()
        .set_connection_timeout(Some(CONNECT_TIMEOUT))
        .set_response_timeout(Some(RESPONSE_TIMEOUT))
        .set_number_of_retries(1);
    ConnectionManager::new_lazy_with_config(client(settings)?, timeouts)
}
