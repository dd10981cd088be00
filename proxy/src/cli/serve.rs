//! `serve`

use p2p_sync_proto::{Code, Problem, settings::Problems};
use tokio::signal::unix::{SignalKind, signal};

use super::{Common, log_to_stderr, one};
use crate::app::App;

pub(super) async fn serve(common: &Common) -> Result<(), Problems> {
    let config = common.load()?;
    log_to_stderr(&config.log);
    // Taken before anything is built, so that an early signal is not lost.
    let shutdown = shutdown_signal().map_err(|error| one(internal(&error)))?;
    let app = App::build(&config).await?;
    let url = app.url().map_err(|error| one(internal(&error)))?;
    let mut told = format!("p2p-sync-proxy: serving on {url}\n");
    if let Some(admin_url) = app.admin_url().map_err(|error| one(internal(&error)))? {
        told += &format!("p2p-sync-proxy: tools are served on {admin_url}\n");
    }
    print!("{told}");
    app.serve(shutdown).await.map_err(one)
}

pub(super) fn internal(error: &std::io::Error) -> Problem {
    Problem::new(
        Code::Internal,
        format!("the operating system refuses what serving needs: {error}"),
    )
}

/// Ends at SIGTERM or SIGINT, from now on.
pub(super) fn shutdown_signal() -> std::io::Result<impl Future<Output = ()> + Send> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
