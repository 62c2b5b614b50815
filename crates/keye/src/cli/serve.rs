//! `keye serve`: the OpenAI-compatible server.

use std::net::{IpAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::ValueEnum;
use keye::Keye;
use keye_engine::EngineOptions;
use keye_media::RemotePolicy;
use keye_server::{Ceilings, MediaAccess, Server, ServerConfig, TlsFiles};

use super::args::ModelArgs;
use super::failure::Usage;
use super::signals;
use super::ui::Status;

const AFTER_HELP: &str = "\
Examples:
  keye serve -m Kwai-Keye/Keye-VL-1_5-8B
  keye serve -m ./model --host 0.0.0.0 --port 8000 --api-key \"$KEY\"
  keye serve -m ./model --tls-cert cert.pem --tls-key key.pem
  keye serve -m ./model --media-path /srv/clips          file:///srv/clips/a.mp4 and a.mp4 may be named
  keye serve -m ./model --allow-remote-media             http(s) URLs with public addresses may be named
  curl localhost:8000/v1/chat/completions -H 'content-type: application/json' \\
    -d '{\"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'

The first Ctrl-C or SIGTERM ends in order: open streams finish, nothing new is taken. The second ends at once.";

/// Serve an OpenAI-compatible API
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Address to listen on, or a name of one; 0.0.0.0 is all of this machine's
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    host: String,
    /// Port; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value = "8000")]
    port: u16,
    /// Speak HTTPS: a certificate and those that vouch for it, PEM
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// With --tls-cert: its private key, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Name of the model for clients [default: what --model says]
    #[arg(long, value_name = "NAME")]
    served_model_name: Option<String>,
    /// Ask for this key; may be given several times
    #[arg(long, value_name = "KEY", env = "KEYE_API_KEY", hide_env_values = true)]
    api_key: Vec<String>,
    /// Let web pages of this origin call, like https://example.org; * is all
    #[arg(long, value_name = "ORIGIN")]
    cors_origin: Vec<String>,
    /// Form of the log on standard error
    #[arg(long, value_name = "FORM", default_value = "text")]
    log: Log,
    /// Collector of OpenTelemetry traces (OTLP over HTTP), like http://localhost:4318
    #[cfg(feature = "otel")]
    #[arg(long, value_name = "URL", env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    otlp_endpoint: Option<String>,
    /// In other builds: here it is told how to build
    #[cfg(not(feature = "otel"))]
    #[arg(long, value_name = "URL", hide = true)]
    otlp_endpoint: Option<String>,
    #[command(flatten)]
    media: MediaFlags,
    #[command(flatten)]
    limits: LimitFlags,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Media that requests may name (bytes in data URLs always may be sent)")]
struct MediaFlags {
    /// Files below this directory
    #[arg(long, value_name = "DIR")]
    media_path: Option<PathBuf>,
    /// http(s) URLs with public addresses
    #[arg(long)]
    allow_remote_media: bool,
    /// With --allow-remote-media: only this domain and those below it; may be given several times
    #[arg(long, value_name = "DOMAIN", requires = "allow_remote_media")]
    media_domain: Vec<String>,
    /// URLs of this host and port, whatever its address is; may be given several times
    #[arg(long, value_name = "HOST:PORT")]
    allow_media_host: Vec<String>,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Limits")]
struct LimitFlags {
    /// Answers that are generated in the same steps
    #[arg(long, value_name = "N", default_value = "8", value_parser = clap::value_parser!(u16).range(1..))]
    max_running: u16,
    /// Most tokens to guess ahead from what stands in prompt and answer already; changes no answer, pauses where it does not
    /// pay, 0 is off
    #[arg(long, value_name = "N", default_value = "8", value_parser = clap::value_parser!(u16).range(..=64))]
    speculate: u16,
    /// Answers that are generated or wait; more get status 429
    #[arg(long, value_name = "N", default_value = "64", value_parser = clap::value_parser!(u16).range(1..))]
    max_streams: u16,
    /// Connections at the same time
    #[arg(long, value_name = "N", default_value = "1024", value_parser = clap::value_parser!(u16).range(1..))]
    max_connections: u16,
    /// Largest request body, in MiB
    #[arg(long, value_name = "MIB", default_value = "256", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    max_body: u32,
    /// All bodies that are held at the same time, in MiB [default: four times --max-body]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..=1 << 22))]
    max_bodies: Option<u32>,
    /// Most tokens of an answer; requests that ask for more get this many [default: what fits]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: Option<u32>,
    /// Most choices (n) of a request
    #[arg(long, value_name = "N", default_value = "16", value_parser = clap::value_parser!(u16).range(1..))]
    max_choices: u16,
    /// Most images and clips of a request
    #[arg(long, value_name = "N", default_value = "64")]
    max_media: usize,
    /// Largest fps
    #[arg(long, value_name = "FPS", default_value = "30")]
    max_fps: f64,
    /// Most frames of a clip
    #[arg(long, value_name = "N", default_value = "2048")]
    max_frames: u32,
    /// Most pixels of a picture or frame that a request may ask for
    #[arg(long, value_name = "PIXELS", default_value = "12845056")]
    max_pixels: u64,
    /// Most pixels of a clip that a request may ask for
    #[arg(long, value_name = "PIXELS", default_value = "102760448")]
    max_total_pixels: u64,
    /// Largest image or clip, in MiB
    #[arg(long, value_name = "MIB", default_value = "2048", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    max_media_size: u32,
    /// Most pixels of a picture or frame as it comes, before it is resized
    #[arg(long, value_name = "PIXELS", default_value = "67108864")]
    max_source_pixels: u64,
    /// Time to fetch and decode one image or clip, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "600", value_parser = clap::value_parser!(u32).range(1..))]
    media_timeout: u32,
    /// Time for open streams to finish after the word to stop, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "30")]
    shutdown_timeout: u32,
}

#[derive(Clone, Copy, ValueEnum)]
enum Log {
    /// Lines to read
    Text,
    /// Lines of json
    Json,
    /// None
    Off,
}

pub fn run(args: Args) -> Result<()> {
    let config = args.config()?;
    let encrypted = config.tls.is_some();
    config.tls.iter().try_for_each(TlsFiles::check).map_err(|error| Usage(error.to_string()))?;
    start_log(args.log);
    let mut options = args.model.options(config.media.access());
    let max_queue = usize::from(args.limits.max_streams);
    options.engine = EngineOptions {
        max_running: usize::from(args.limits.max_running),
        max_queue,
        speculation: usize::from(args.limits.speculate),
        ..options.engine
    };

    let mut status = Status::new(false);
    super::args::warn_of_device(args.model.device, &mut status);
    let ceilings = config.ceilings.clone();
    let model = args.model.chosen(&mut status);
    let keye = Keye::load_adjusted(model, options, &mut |progress| status.loading(progress), |loader| {
        ceilings.apply(loader);
    })?;
    status.clear();
    super::args::warn_of_disk(&keye, &mut status);

    let server = Server::bind(keye.engine().clone(), keye.shared_processor(), keye.default_sampling(), config)?;
    let address = server.address()?;
    status.line(&format!("{model} on {}", keye.device()));
    let scheme = if encrypted { "https" } else { "http" };
    status.line(&format!("listening on {scheme}://{address}, up to {} tokens", keye.engine().max_model_len()));
    let stop = server.shutdown();
    let guard = signals::guard();
    std::thread::Builder::new().name("keye-signals".into()).spawn(move || {
        while !guard.interrupted() {
            std::thread::sleep(Duration::from_millis(50));
        }
        stop.stop();
        // Kept: only the second signal ends at once.
        std::mem::forget(guard);
    })?;
    server.run()?;
    Ok(())
}

impl Args {
    fn config(&self) -> Result<ServerConfig> {
        #[cfg(not(feature = "otel"))]
        if self.otlp_endpoint.is_some() {
            let reason = "--otlp-endpoint: this build sends no traces: build with --features otel, or leave it out";
            return Err(Usage(reason.into()).into());
        }
        let limits = &self.limits;
        let mib = |n: u32| (n as usize) << 20;
        if self.api_key.iter().any(String::is_empty) {
            return Err(Usage("--api-key is empty: leave it out to let everyone in".into()).into());
        }
        if !(limits.max_fps > 0.0 && limits.max_fps.is_finite()) {
            return Err(Usage("--max-fps has to be above 0".into()).into());
        }
        if self.served_model_name.as_deref() == Some("") {
            return Err(Usage("--served-model-name is empty: leave it out for what --model says".into()).into());
        }
        for origin in &self.cors_origin {
            let host = origin.split_once("://").map_or("", |(_, host)| host);
            if origin != "*" && (host.is_empty() || host.contains('/')) {
                let expected = "expected *, or a scheme and a host like https://example.org, without a path";
                return Err(Usage(format!("--cors-origin {origin}: {expected}")).into());
            }
        }
        Ok(ServerConfig {
            host: address(&self.host)?,
            port: self.port,
            tls: self
                .tls_cert
                .clone()
                .zip(self.tls_key.clone())
                .map(|(certificates, key)| TlsFiles { certificates, key }),
            model: self.served_model_name.clone().unwrap_or_else(|| self.model.name().to_owned()),
            api_keys: self.api_key.clone(),
            cors_origins: self.cors_origin.clone(),
            body_bytes: mib(limits.max_body),
            total_body_bytes: limits.max_bodies.map_or(mib(limits.max_body) * 4, mib).max(mib(limits.max_body)),
            max_connections: usize::from(limits.max_connections),
            max_streams: usize::from(limits.max_streams),
            shutdown_timeout: Duration::from_secs(limits.shutdown_timeout.into()),
            #[cfg(feature = "otel")]
            otlp_endpoint: self.otlp_endpoint.clone(),
            media: self.media.access()?,
            ceilings: Ceilings {
                fps: limits.max_fps,
                frames: limits.max_frames,
                pixels: limits.max_pixels,
                total_pixels: limits.max_total_pixels,
                media: limits.max_media,
                max_tokens: limits.max_tokens.map(|n| n as usize),
                choices: limits.max_choices.into(),
                media_bytes: u64::from(limits.max_media_size) << 20,
                source_pixels: limits.max_source_pixels,
                media_time: Duration::from_secs(limits.media_timeout.into()),
            },
            ..ServerConfig::default()
        })
    }
}

impl MediaFlags {
    fn access(&self) -> Result<MediaAccess> {
        let path = match &self.media_path {
            None => None,
            Some(path) => {
                let wrong = |found: &str| {
                    Usage(format!("--media-path {}: expected a directory, found {found}", path.display()))
                };
                let place = path.canonicalize().map_err(|error| wrong(&format!("none: {error}")))?;
                if !place.is_dir() {
                    return Err(wrong("a file").into());
                }
                Some(place)
            }
        };
        let hosts = self.allow_media_host.iter().map(|text| host_and_port(text)).collect::<Result<Vec<_>>>()?;
        let remote = self.allow_remote_media || !hosts.is_empty();
        let policy = RemotePolicy { domains: self.media_domain.clone(), hosts, only_hosts: !self.allow_remote_media };
        Ok(MediaAccess { path, remote: remote.then_some(policy) })
    }
}

/// The address that `host` is or is the name of. Whether it is a loopback one, which decides what clients have to send, is asked
/// of the address, not of the name.
fn address(host: &str) -> Result<IpAddr> {
    if let Ok(address) = host.parse() {
        return Ok(address);
    }
    let found = (host, 0).to_socket_addrs().map_err(|error| error.to_string());
    // Of several one is listened on; clients that know the server by 127.0.0.1 know no other.
    let address = found.map(|found| found.map(|found| found.ip()).min_by_key(IpAddr::is_ipv6));
    let reason = match address {
        Ok(Some(address)) => return Ok(address),
        Ok(None) => "it has none".to_owned(),
        Err(reason) => reason,
    };
    let expected = "expected an address of this machine, like 127.0.0.1, or a name that has one";
    Err(Usage(format!("--host {host}: {expected}: {reason}")).into())
}

fn host_and_port(text: &str) -> Result<(String, u16)> {
    let wrong = || Usage(format!("--allow-media-host {text}: expected HOST:PORT, like nas.local:8080 or [::1]:80"));
    let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let port = port.parse().map_err(|_| wrong())?;
    if host.is_empty() {
        return Err(wrong().into());
    }
    Ok((host.to_owned(), port))
}

fn start_log(log: Log) {
    let builder = tracing_subscriber::fmt().with_writer(std::io::stderr).with_target(false).with_ansi(false);
    match log {
        Log::Text => builder.init(),
        Log::Json => builder.json().flatten_event(true).init(),
        Log::Off => {}
    }
}
