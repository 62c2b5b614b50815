//! What all requests share.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use keye_engine::{Engine, SamplingParams};
use keye_processor::Processor;
use sha2::{Digest, Sha256};
use tokio::sync::{Semaphore, watch};

use crate::ServerConfig;
use crate::admission::UNIT;
use crate::metrics::Metrics;

pub(crate) struct App {
    pub engine: Engine,
    pub processor: Arc<Processor>,
    /// The checkpoint's sampling defaults.
    pub defaults: SamplingParams,
    pub config: ServerConfig,
    pub metrics: Metrics,
    #[cfg(feature = "otel")]
    pub exporter: Option<crate::otel::Exporter>,
    /// A permit for each choice that is generated or waits.
    pub streams: Arc<Semaphore>,
    /// A permit for each [`UNIT`] of body in memory.
    pub bodies: Arc<Semaphore>,
    /// When the server started, in seconds since 1970.
    pub created: u64,
    /// SHA-256 of the keys: digests compare in the same time wherever they differ.
    key_digests: Vec<[u8; 32]>,
    stopping: AtomicBool,
    /// True when what is still open has to end.
    cut: watch::Sender<bool>,
}

impl App {
    pub fn new(engine: Engine, processor: Arc<Processor>, defaults: SamplingParams, config: ServerConfig) -> Self {
        let permits = |n: usize| Arc::new(Semaphore::new(n.min(Semaphore::MAX_PERMITS)));
        Self {
            engine,
            processor,
            defaults,
            metrics: Metrics::new(),
            #[cfg(feature = "otel")]
            exporter: None,
            streams: permits(config.max_streams),
            bodies: permits(config.total_body_bytes.div_ceil(UNIT)),
            created: seconds_since_1970(),
            key_digests: config.api_keys.iter().map(|key| digest(key)).collect(),
            stopping: AtomicBool::new(false),
            cut: watch::Sender::new(false),
            config,
        }
    }

    pub fn needs_key(&self) -> bool {
        !self.key_digests.is_empty()
    }

    /// Whether a key is one of those configured; all are looked at, and all bytes of each.
    pub fn knows_key(&self, key: &str) -> bool {
        let found = digest(key);
        let differs = |known: &[u8; 32]| known.iter().zip(&found).fold(0u8, |sum, (a, b)| sum | (a ^ b));
        self.key_digests.iter().fold(false, |known, key| known | (std::hint::black_box(differs(key)) == 0))
    }

    pub fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    /// Ends what is still open: the time to finish is over.
    pub fn cut_off(&self) {
        self.cut.send_replace(true);
    }

    /// Waits for [`App::cut_off`].
    pub async fn cut(&self) {
        // The sender is held as long as this.
        let _ = self.cut.subscribe().wait_for(|cut| *cut).await;
    }

    /// Choices that are generated or wait.
    pub fn open_streams(&self) -> usize {
        self.config.max_streams.saturating_sub(self.streams.available_permits())
    }
}

fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

pub(crate) fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// 64 random bits: hashers are seeded by the system.
pub(crate) fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}
