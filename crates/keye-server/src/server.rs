//! Connections: accepted up to a number, given up when their head does not come, ended in order.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use keye_engine::{Engine, SamplingParams};
use keye_processor::Processor;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::ServerConfig;
use crate::app::App;
#[cfg(feature = "otel")]
use crate::otel::Exporter;
use crate::routes::router;
use crate::stall::StallGuard;
use crate::tls::TlsFiles;

/// Time for the head of a request to arrive, which is also how long an idle connection stays.
const HEAD_TIMEOUT: Duration = Duration::from_secs(75);
/// Time to agree on TLS.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of a head, and of what is read and written at a time.
const BUFFER_BYTES: usize = 64 << 10;
/// Threads that serve connections; they only pass bytes on.
const WORKERS: usize = 2;
/// Threads that parse bodies.
const PARSERS: usize = 4;
/// Time for clients to hear that their answers are cut off.
const LAST_WORD: Duration = Duration::from_secs(1);
/// Pause when the system has no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Why a server cannot run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The address is taken or not this machine's.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// What was asked for.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// A certificate or key is missing, damaged, or does not belong to the other.
    #[error("cannot use {path} for TLS: {reason}")]
    Tls {
        /// The file.
        path: PathBuf,
        /// What was found instead.
        reason: String,
    },
    /// The system gives no threads or sockets.
    #[error("cannot start the server: {0}")]
    Start(#[from] io::Error),
}

/// A server that has its address and has not begun to answer.
pub struct Server {
    listener: std::net::TcpListener,
    tls: Option<TlsAcceptor>,
    app: Arc<App>,
    stop: Arc<watch::Sender<bool>>,
}

/// Tells a server to stop: it finishes what it streams, up to its deadline, and takes nothing new.
#[derive(Clone)]
pub struct Shutdown {
    app: Arc<App>,
    stop: Arc<watch::Sender<bool>>,
}

impl Shutdown {
    /// Begins to stop; [`Server::run`] returns when it is done.
    pub fn stop(&self) {
        self.app.stop();
        self.stop.send_replace(true);
    }
}

impl Server {
    /// Takes the address. `defaults` are the sampling parameters of requests that say nothing.
    pub fn bind(
        engine: Engine,
        processor: Arc<Processor>,
        defaults: SamplingParams,
        config: ServerConfig,
    ) -> Result<Self, ServeError> {
        let tls = config.tls.as_ref().map(TlsFiles::acceptor).transpose()?;
        let address = SocketAddr::new(config.host, config.port);
        let listener = std::net::TcpListener::bind(address).map_err(|source| ServeError::Bind { address, source })?;
        listener.set_nonblocking(true)?;
        #[cfg(feature = "otel")]
        let exporter = config.otlp_endpoint.as_deref().map(Exporter::start).transpose()?;
        #[cfg_attr(not(feature = "otel"), expect(unused_mut, reason = "for the exporter"))]
        let mut app = App::new(engine, processor, defaults, config);
        #[cfg(feature = "otel")]
        {
            app.exporter = exporter;
        }
        let app = Arc::new(app);
        Ok(Self { listener, tls, app, stop: Arc::new(watch::Sender::new(false)) })
    }

    /// Where it listens.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// The handle that stops it.
    pub fn shutdown(&self) -> Shutdown {
        Shutdown { app: Arc::clone(&self.app), stop: Arc::clone(&self.stop) }
    }

    /// Answers until it is told to stop and the open streams are finished, or their time is over.
    pub fn run(self) -> Result<(), ServeError> {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        runtime.worker_threads(WORKERS).max_blocking_threads(PARSERS).thread_name("keye-http");
        let runtime = runtime.enable_io().enable_time().build()?;
        #[cfg(feature = "otel")]
        let app = Arc::clone(&self.app);
        runtime.block_on(self.serve())?;
        runtime.shutdown_timeout(Duration::from_secs(1));
        #[cfg(feature = "otel")]
        app.exporter.iter().for_each(Exporter::flush);
        Ok(())
    }

    async fn serve(self) -> Result<(), ServeError> {
        let router = router(Arc::clone(&self.app));
        let listener = TcpListener::from_std(self.listener)?;
        let places = Arc::new(Semaphore::new(self.app.config.max_connections));
        let mut connections = JoinSet::new();
        let stop = self.stop.subscribe();
        loop {
            let next = async {
                // The semaphore is never closed.
                let place = Arc::clone(&places).acquire_owned().await.ok();
                (place, listener.accept().await)
            };
            let (place, accepted) = tokio::select! {
                next = next => next,
                Some(_) = connections.join_next() => continue,
                () = told(stop.clone()) => break,
            };
            match accepted {
                Ok((stream, _)) => {
                    // Tokens are small and should not wait for more.
                    let _ = stream.set_nodelay(true);
                    let (router, stop) = (router.clone(), self.stop.subscribe());
                    let stream = StallGuard::new(stream, self.app.config.reader_timeout);
                    let tls = self.tls.clone();
                    connections.spawn(async move {
                        match tls {
                            None => connection(stream, router, stop).await,
                            Some(tls) => encrypted(tls, stream, router, stop).await,
                        }
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        // From here on connections are refused.
        drop(listener);
        tracing::info!(open = connections.len(), "stopping");
        if tokio::time::timeout(self.app.config.shutdown_timeout, all_of(&mut connections)).await.is_err() {
            tracing::warn!(open = connections.len(), "the time to finish is over");
            self.app.cut_off();
            if tokio::time::timeout(LAST_WORD, all_of(&mut connections)).await.is_err() {
                connections.shutdown().await;
            }
        }
        Ok(())
    }
}

/// Waits for the end of all connections.
async fn all_of(connections: &mut JoinSet<()>) {
    while connections.join_next().await.is_some() {}
}

/// Agrees on TLS first. Who cannot, such as somebody who speaks plain HTTP, is let go.
async fn encrypted<S>(tls: TlsAcceptor, stream: S, router: Router, stop: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let agreed = tokio::select! {
        agreed = tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)) => agreed,
        () = told(stop.clone()) => return,
    };
    match agreed {
        Ok(Ok(stream)) => connection(stream, router, stop).await,
        Ok(Err(error)) => tracing::debug!(%error, "TLS handshake"),
        Err(_) => tracing::debug!("TLS handshake took too long"),
    }
}

async fn connection<S>(stream: S, router: Router, stop: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(BUFFER_BYTES);
    let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = told(stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection");
    }
}

/// Waits for the word to stop; whoever could give it being gone is as good.
async fn told(mut stop: watch::Receiver<bool>) {
    let _ = stop.wait_for(|stopping| *stopping).await;
}
