//! Connections: accepted, bounded, ended.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;

use super::state::State;
use crate::error::{Error, Result};

/// Connections that the kernel keeps until they are accepted.
const BACKLOG: u32 = 4096;
/// Bytes of the head of a request, at most.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// How long the listener rests where the process has no file descriptor left.
const REST: Duration = Duration::from_millis(50);

/// A bound listener.
pub(super) struct Listener {
    pub address: SocketAddr,
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    router: Router,
}

impl Listener {
    /// Binds an address.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] where it is taken or not of this machine.
    pub fn bind(
        option: &'static str,
        address: SocketAddr,
        tls: Option<TlsAcceptor>,
        router: Router,
    ) -> Result<Listener> {
        let bind = || {
            let socket = match address.is_ipv4() {
                true => TcpSocket::new_v4()?,
                false => TcpSocket::new_v6()?,
            };
            socket.set_reuseaddr(true)?;
            socket.bind(address)?;
            let listener = socket.listen(BACKLOG)?;
            Ok((listener.local_addr()?, listener))
        };
        let bound: std::io::Result<(SocketAddr, TcpListener)> = bind();
        let (address, listener) = bound.map_err(|error| Error::InvalidOption {
            option,
            reason: format!("{address} cannot be listened on: {error}; choose another address"),
        })?;
        Ok(Listener { address, listener, tls, router })
    }

    /// Serves connections until `ending` says so, and then waits for those that are open, as long
    /// as the server drains.
    pub async fn serve(self, state: Arc<State>, mut ending: watch::Receiver<bool>) {
        let graceful = GracefulShutdown::new();
        let slots = Arc::new(Semaphore::new(state.limits.connections));
        loop {
            let slot = tokio::select! {
                slot = Arc::clone(&slots).acquire_owned() => slot.expect("it is never closed"),
                _ = ending.wait_for(|is_ending| *is_ending) => break,
            };
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                _ = ending.wait_for(|is_ending| *is_ending) => break,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(target: "sidereal", %error, "a connection was not accepted");
                    tokio::time::sleep(REST).await;
                    continue;
                }
            };
            let (state, router) = (Arc::clone(&state), self.router.clone());
            let (tls, watcher) = (self.tls.clone(), graceful.watcher());
            tokio::spawn(async move {
                let _slot = slot;
                state.metrics.connections_opened.fetch_add(1, Relaxed);
                connection(&state, stream, tls, router, watcher).await;
                state.metrics.connections_closed.fetch_add(1, Relaxed);
            });
        }
        drop(self.listener);
        let _ = tokio::time::timeout(state.models.drain_time(), graceful.shutdown()).await;
    }
}

async fn connection(
    state: &State,
    stream: TcpStream,
    tls: Option<TlsAcceptor>,
    router: Router,
    watcher: hyper_util::server::graceful::Watcher,
) {
    let _ = stream.set_nodelay(true);
    let Some(tls) = tls else {
        return serve(state, stream, router, watcher).await;
    };
    match tokio::time::timeout(state.limits.header_time, tls.accept(stream)).await {
        Ok(Ok(stream)) => serve(state, stream, router, watcher).await,
        Ok(Err(_)) | Err(_) => _ = state.metrics.tls_failures.fetch_add(1, Relaxed),
    }
}

async fn serve<S>(
    state: &State,
    stream: S,
    router: Router,
    watcher: hyper_util::server::graceful::Watcher,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(state.limits.header_time)
        .max_buf_size(MAX_HEAD_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(MAX_HEAD_BYTES as u32)
        .max_concurrent_streams(1024)
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(20));
    let service = TowerToHyperService::new(router);
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!(target: "sidereal", %error, "a connection ended");
    }
}
