//! Servers for tests.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use base64::Engine as _;
use keye_backend::{Cpu, CpuOptions, KvDtype};
use keye_engine::{Engine, EngineOptions, SamplingParams};
use keye_media::Loader;
use keye_model::{KeyeModel, LoadOptions};
use keye_processor::{Checkpoint, Overrides, Processor};
use keye_server::{MediaAccess, Server, ServerConfig, Shutdown};
use serde_json::{Value, json};

use crate::client::{Open, Response, request};

pub const MODEL: &str = "org/keye-tiny";

pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/keye-1_5-tiny").join(name)
}

/// A file as a data URL.
pub fn data_url(kind: &str, name: &str) -> String {
    let bytes = std::fs::read(fixture(name)).expect("the fixture is whole");
    format!("data:{kind};base64,{}", base64::engine::general_purpose::STANDARD.encode(bytes))
}

pub struct TestServer {
    pub address: SocketAddr,
    pub engine: Engine,
    pub shutdown: Shutdown,
    thread: Option<JoinHandle<()>>,
}

/// The settings of tests: media from the fixture's directory.
pub fn config() -> ServerConfig {
    let media = MediaAccess { path: Some(fixture("inputs")), remote: None };
    ServerConfig { port: 0, model: MODEL.into(), media, ..ServerConfig::default() }
}

/// As generation_config.json of the fixture has them.
pub fn defaults() -> SamplingParams {
    SamplingParams { temperature: 0.6, top_k: 20, top_p: 0.95, ..SamplingParams::default() }
}

impl TestServer {
    pub fn start(config: ServerConfig) -> Self {
        let processor = Arc::new(Processor::load(&fixture("model"), &Overrides::default()).expect("a processor"));
        let backend = Cpu::new(CpuOptions { threads: Some(2), isa: None }).expect("a processor that can");
        let checkpoint = Checkpoint::open(&fixture("model")).expect("a checkpoint");
        let options = LoadOptions { cache_tokens: 32_768, kv_dtype: KvDtype::F32 };
        let model = KeyeModel::load(backend, &processor.config, &processor.media.processor, &checkpoint, options);
        let mut loader = Loader::new(processor.media.clone());
        loader.access = config.media.access();
        config.ceilings.apply(&mut loader);
        let options = EngineOptions { max_running: 8, ..EngineOptions::default() };
        let engine = Engine::new(Box::new(model.expect("a model")), Arc::clone(&processor), loader, options);
        let server = Server::bind(engine.clone(), processor, defaults(), config).expect("a port");
        let (address, shutdown) = (server.address().expect("an address"), server.shutdown());
        let thread = std::thread::spawn(move || server.run().expect("a server"));
        Self { address, engine, shutdown, thread: Some(thread) }
    }

    pub fn get(&self, path: &str) -> Response {
        request(self.address, "GET", path, &[], "")
    }

    pub fn post(&self, path: &str, body: &Value) -> Response {
        request(self.address, "POST", path, &[], &body.to_string())
    }

    pub fn chat(&self, body: &Value) -> Response {
        self.post("/v1/chat/completions", body)
    }

    /// A stream that goes on for many seconds.
    pub fn long_stream(&self) -> Open {
        let body = json!({"messages": [{"role": "user", "content": "Go on."}], "stream": true, "ignore_eos": true,
                          "max_tokens": 20_000, "skip_special_tokens": false});
        Open::send(self.address, "POST", "/v1/chat/completions", &[], &body.to_string())
    }

    /// Waits until the engine has nothing to do and nothing holds a block.
    pub fn wait_until_idle(&self) {
        wait_for("an idle engine", || {
            let stats = self.engine.stats();
            stats.waiting == 0 && stats.running == 0 && stats.free_blocks == stats.num_blocks
        });
    }

    /// Stops it and waits for its end.
    pub fn stop(mut self) {
        self.shutdown.stop();
        self.join();
    }

    /// Waits for its end.
    pub fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the server ended in order");
        }
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.shutdown.stop();
    }
}

/// One server for all tests that change nothing about it.
pub fn shared() -> &'static TestServer {
    static SERVER: OnceLock<TestServer> = OnceLock::new();
    SERVER.get_or_init(|| TestServer::start(config()))
}

pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not come in 20 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A chat about media given as parts.
pub fn question(parts: Value, text: &str) -> Value {
    let mut content = parts.as_array().cloned().unwrap_or_default();
    content.push(json!({"type": "text", "text": text}));
    json!({"model": "", "messages": [{"role": "user", "content": content}], "max_tokens": 12, "seed": 7})
}

/// The text of the first choice.
pub fn content(response: &Response) -> String {
    assert_eq!(response.status, 200, "{}", response.body);
    let answer = response.json();
    let message = &answer["choices"][0]["message"];
    format!(
        "{}|{}",
        message["reasoning_content"].as_str().unwrap_or_default(),
        message["content"].as_str().expect("text")
    )
}
