//! A server from its start to its end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::access::Access;
use super::feed::Follower;
use super::listen::Listener;
use super::models::Models;
use super::options::ServerOptions;
use super::state::State;
use super::{router, tls};
use crate::error::{Error, Result};

/// Threads that serve connections; engines compute on their own.
const THREADS: usize = 2;

/// A server that runs. Dropped, it ends at once; [`shutdown`](Server::shutdown) lets requests finish.
///
/// ```no_run
/// use sidereal::server::{ModelSource, Server, ServerOptions};
///
/// # fn main() -> sidereal::Result<()> {
/// let model = ModelSource::new("models/industrial", "models/industrial/items.jsonl");
/// let server = Server::start(&ServerOptions::new(model))?;
/// println!("http://{}", server.http());
/// server.wait_for_signal()?;
/// server.shutdown();
/// # Ok(())
/// # }
/// ```
pub struct Server {
    state: Arc<State>,
    runtime: Runtime,
    ending: watch::Sender<bool>,
    listeners: Vec<JoinHandle<()>>,
    follower: Option<std::thread::JoinHandle<()>>,
    http: SocketAddr,
    grpc: Option<SocketAddr>,
}

impl Server {
    /// Opens the models, binds the addresses and serves.
    ///
    /// # Errors
    /// Those of [`Recommender::open`](crate::Recommender::open) and of the catalogs;
    /// [`Error::InvalidOption`] for addresses, certificates and names.
    pub fn start(options: &ServerOptions) -> Result<Server> {
        let http_tls = options.tls.as_ref().map(|files| tls::acceptor(files, &["h2", "http/1.1"]));
        let grpc_tls = options.tls.as_ref().map(|files| tls::acceptor(files, &["h2"]));
        let (http_tls, grpc_tls) = (http_tls.transpose()?, grpc_tls.transpose()?);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("sidereal-server")
            .enable_all()
            .build()
            .map_err(|error| Error::Device {
                device: "cpu".into(),
                reason: format!("the server's threads could not be started: {error}"),
            })?;
        let models = Models::open(options)?;
        let access = Access {
            read_token: options.read_token.clone(),
            write_token: options.write_token.clone(),
            is_exposed: options.is_exposed(),
        };
        let state = Arc::new(State::new(models, access, options.limits, options.defaults.clone()));
        // Before addresses are bound: nobody should reach a server that ends at once.
        let follower =
            options.feed.as_ref().map(|path| Follower::open(&state, path)).transpose()?;
        let _inside = runtime.enter();
        let http = Listener::bind("--http", options.http, http_tls, router::http(&state))?;
        let grpc = match options.grpc {
            Some(address) => {
                Some(Listener::bind("--grpc", address, grpc_tls, router::grpc(&state)?)?)
            }
            None => None,
        };
        let (http_address, grpc_address) =
            (http.address, grpc.as_ref().map(|listener| listener.address));
        let (ending, _) = watch::channel(false);
        let serve = |listener: Listener| {
            runtime.spawn(listener.serve(Arc::clone(&state), ending.subscribe()))
        };
        let listeners = std::iter::once(http).chain(grpc).map(serve).collect();
        drop(_inside);
        let follower = follower.map(|follower| {
            let thread = std::thread::Builder::new().name("sidereal-feed".into());
            thread.spawn(move || follower.run()).map_err(|error| Error::Device {
                device: "cpu".into(),
                reason: format!("the thread that follows the feed could not be started: {error}"),
            })
        });
        Ok(Server {
            state,
            runtime,
            ending,
            listeners,
            follower: follower.transpose()?,
            http: http_address,
            grpc: grpc_address,
        })
    }

    /// Where HTTP is served.
    pub fn http(&self) -> SocketAddr {
        self.http
    }

    /// Where gRPC is served.
    pub fn grpc(&self) -> Option<SocketAddr> {
        self.grpc
    }

    /// Waits until the process is told to end, by SIGTERM or by SIGINT.
    ///
    /// # Errors
    /// [`Error::Device`] where signals cannot be listened to.
    pub fn wait_for_signal(&self) -> Result<()> {
        self.runtime.block_on(signal()).map_err(|error| Error::Device {
            device: "cpu".into(),
            reason: format!("signals cannot be listened to: {error}"),
        })
    }

    /// Refuses new requests, lets those that run finish for as long as the options say, and ends. A
    /// signal meanwhile ends it at once.
    pub fn shutdown(mut self) {
        self.state.drain();
        self.ending.send_replace(true);
        let listeners = std::mem::take(&mut self.listeners);
        let (state, patience) = (Arc::clone(&self.state), self.state.models.drain_time());
        self.runtime.block_on(async move {
            let drained = async {
                for listener in listeners {
                    let _ = listener.await;
                }
                let _ = tokio::task::spawn_blocking(move || state.models.shutdown()).await;
            };
            tokio::select! {
                () = drained => {}
                _ = signal() => {}
                () = tokio::time::sleep(patience + Duration::from_secs(1)) => {}
            }
        });
        if let Some(follower) = self.follower.take() {
            let _ = follower.join();
        }
        self.runtime.shutdown_background();
    }
}

#[cfg(unix)]
async fn signal() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

#[cfg(not(unix))]
async fn signal() -> std::io::Result<()> {
    tokio::signal::ctrl_c().await
}
