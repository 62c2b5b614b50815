//! A hub id to a local directory: downloads what a checkpoint needs into the cache that Hugging Face's tools share.
//!
//! `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_CACHE` and `HF_HUB_OFFLINE` mean what they mean there. All files of a checkpoint come from
//! one commit, and a branch points to that commit only once all of them are there.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use serde::Deserialize;

use crate::disk::free_bytes;

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// How often a file is asked for again after the connection broke, and how long to wait before that, times the attempt.
const RETRIES: u32 = 5;
const RETRY_WAIT: Duration = Duration::from_millis(500);

/// How far a download is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Download<'a> {
    /// The file that is being read.
    pub file: &'a str,
    /// Bytes of the whole checkpoint that are there.
    pub done: u64,
    /// Bytes of the whole checkpoint.
    pub total: u64,
}

/// Is told how far a download is.
pub type OnDownload<'a> = dyn FnMut(Download<'_>) + 'a;

/// Where checkpoints come from and where they are kept.
pub struct Hub {
    /// `https://huggingface.co`, or a mirror.
    pub endpoint: String,
    /// The cache: `models--org--name` directories.
    pub cache: PathBuf,
    /// Sent to the endpoint, never shown.
    pub token: Option<String>,
    /// Use the cache only.
    pub offline: bool,
}

/// The local directory of `model`: an existing directory, or a hub id `org/name` or `org/name@revision`, which is downloaded.
pub fn resolve(model: &str, progress: &mut OnDownload<'_>) -> Result<PathBuf> {
    let hub = Hub::from_lookup(&|name| std::env::var(name).ok().filter(|value| !value.is_empty()))?;
    hub.resolve(model, progress)
}

impl Hub {
    /// Settings from environment variables, which `variable` looks up.
    pub fn from_lookup(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let home = match (variable("HF_HOME"), variable("XDG_CACHE_HOME"), variable("HOME")) {
            (Some(home), ..) => PathBuf::from(home),
            (None, Some(cache), _) => Path::new(&cache).join("huggingface"),
            (None, None, Some(home)) => Path::new(&home).join(".cache/huggingface"),
            (None, None, None) => bail!("neither HF_HOME nor HOME is set: there is no place for downloaded models"),
        };
        let token_file = variable("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let token = variable("HF_TOKEN").or_else(|| fs::read_to_string(token_file).ok());
        let is_on = |value: String| ["1", "on", "yes", "true"].contains(&value.to_lowercase().as_str());
        Ok(Self {
            endpoint: variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into()),
            cache: variable("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            token: token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty()),
            offline: variable("HF_HUB_OFFLINE").is_some_and(is_on),
        })
    }

    /// As [`resolve`].
    pub fn resolve(&self, model: &str, progress: &mut OnDownload<'_>) -> Result<PathBuf> {
        let path = Path::new(model);
        if path.is_dir() {
            return Ok(path.to_owned());
        }
        let neither = "expected a checkpoint directory, or a hub id like org/name or org/name@revision";
        if path.exists() {
            bail!("{model} is a file; {neither}");
        }
        let (id, revision) = model.split_once('@').unwrap_or((model, "main"));
        let is_word = |word: &str| {
            !word.is_empty()
                && !word.starts_with('.')
                && word.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let is_id = id.split_once('/').is_some_and(|(org, name)| is_word(org) && is_word(name));
        if !is_id || !revision.split('/').all(is_word) {
            bail!("{model:?} is not there; {neither}");
        }
        self.snapshot(id, revision, progress)
            .with_context(|| format!("there is no directory {model} here; as a hub id it cannot be had either"))
    }

    /// The cached directory of `revision` of `id`, downloaded where something of it is missing.
    pub fn snapshot(&self, id: &str, revision: &str, progress: &mut OnDownload<'_>) -> Result<PathBuf> {
        let cached = self.cached(id, revision);
        let is_commit = revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit());
        if let Some(dir) = cached.as_ref().filter(|_| self.offline || is_commit) {
            return Ok(dir.clone());
        }
        if self.offline {
            bail!(
                "{} does not hold all of {id}@{revision}, and --offline or HF_HUB_OFFLINE keeps it from being downloaded",
                self.cache.display()
            );
        }
        let cache = std::path::absolute(&self.cache)?;
        // Retries are ours: hf-hub's own would append to a file what it already has.
        let api = ApiBuilder::from_cache(Cache::new(cache))
            .with_endpoint(self.endpoint.trim_end_matches('/').to_owned())
            .with_token(self.token.clone())
            .with_retries(0)
            .with_user_agent("keye", env!("CARGO_PKG_VERSION"))
            .build()?;
        let listing = match self.listing(&api, id, revision) {
            Ok(listing) => listing,
            // Without a connection the cache is as good as it gets; a refusal is not a missing connection.
            Err(error) => match (status(&error), cached) {
                (None | Some(500..), Some(dir)) => return Ok(dir),
                _ => return Err(self.explain(error, id, revision, None)),
            },
        };
        self.download(&api, id, revision, &listing, progress)
    }

    fn repo(&self, id: &str, revision: &str) -> Repo {
        Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned())
    }

    /// The snapshot to which `revision` points, if all that is needed is in it.
    fn cached(&self, id: &str, revision: &str) -> Option<PathBuf> {
        let cache = Cache::new(self.cache.clone()).repo(self.repo(id, revision));
        let config = cache.get("config.json").or_else(|| {
            let config = cache.pointer_path(revision).join("config.json");
            config.exists().then_some(config)
        })?;
        let dir = config.parent()?.to_owned();
        let shards = match fs::read(dir.join(INDEX)) {
            Ok(index) => shards(&index).ok()?,
            Err(_) => vec![SINGLE.to_owned()],
        };
        shards.iter().all(|shard| dir.join(shard).exists()).then_some(dir)
    }

    fn listing(&self, api: &Api, id: &str, revision: &str) -> Result<Listing, ApiError> {
        let request = api.repo(self.repo(id, revision)).info_request().query("blobs", "true");
        let mut response = request.call().map_err(Box::new)?;
        Ok(response.body_mut().read_json().map_err(Box::new)?)
    }

    fn download(
        &self,
        api: &Api,
        id: &str,
        revision: &str,
        listing: &Listing,
        progress: &mut OnDownload<'_>,
    ) -> Result<PathBuf> {
        let commit = &listing.sha;
        if commit.is_empty() || !commit.bytes().all(|b| b.is_ascii_hexdigit()) {
            bail!("{}: expected a commit, found {commit:?}", self.endpoint);
        }
        let cache = Cache::new(std::path::absolute(&self.cache)?).repo(self.repo(id, revision));
        let dir = cache.pointer_path(commit);
        let repo = api.repo(self.repo(id, commit));
        let mut fetch = Fetch { hub: self, api, id, revision, repo, dir: &dir, done: 0, total: 0, progress };

        let has = |name: &str| listing.siblings.iter().any(|file| file.rfilename == name);
        let mut files: Vec<&File> = listing.siblings.iter().filter(|file| is_small_file(&file.rfilename)).collect();
        // The index says which weights there are; without one there is one file.
        let shards = if has(INDEX) {
            let index = files.iter().position(|file| file.rfilename == INDEX).map(|at| files.remove(at));
            let index = index.with_context(|| format!("{id}: {INDEX} is not listed"))?;
            let path = fetch.file(index)?;
            shards(&fs::read(&path)?).with_context(|| format!("{id}: {INDEX}"))?
        } else {
            vec![SINGLE.to_owned()]
        };
        for shard in &shards {
            let file = listing.siblings.iter().find(|file| file.rfilename == *shard);
            files.push(file.with_context(|| format!("{id}@{revision} has no file {shard}: no safetensors weights"))?);
        }
        let missing: u64 =
            files.iter().filter(|file| !dir.join(&file.rfilename).exists()).filter_map(|file| file.size).sum();
        let free = free_bytes(&self.cache).unwrap_or(u64::MAX);
        if missing > free {
            let gigabytes = |bytes: u64| bytes as f64 / 1e9;
            bail!(
                "{id} needs {:.1} GB more, {} has room for {:.1} GB; HF_HUB_CACHE names another place",
                gigabytes(missing),
                self.cache.display(),
                gigabytes(free)
            );
        }
        fetch.total = fetch.done + files.iter().filter_map(|file| file.size).sum::<u64>();
        for file in files {
            fetch.file(file)?;
        }
        cache.create_ref(commit).with_context(|| format!("cannot write to {}", self.cache.display()))?;
        Ok(dir)
    }

    /// What an error of the hub means for the user.
    fn explain(&self, error: ApiError, id: &str, revision: &str, file: Option<&str>) -> anyhow::Error {
        let what = file.map_or_else(|| format!("{id}@{revision}"), |file| format!("{file} of {id}@{revision}"));
        let endpoint = &self.endpoint;
        match status(&error) {
            Some(code @ (401 | 403)) if self.token.is_none() => anyhow!(
                "{endpoint} does not show {what} without a token ({code}): it is private, gated or does not exist; set HF_TOKEN"
            ),
            Some(code @ (401 | 403)) => anyhow!(
                "{endpoint} refuses {what} to the token of HF_TOKEN ({code}): it has expired, or may not read this model"
            ),
            Some(404) => anyhow!("{endpoint} has no {what} (404)"),
            Some(code) => anyhow!("{endpoint} answered {code} for {what}"),
            None => anyhow::Error::from(error).context(format!("cannot read {what} from {endpoint}")),
        }
    }
}

/// One checkpoint's download.
struct Fetch<'a, 'b> {
    hub: &'a Hub,
    api: &'a Api,
    id: &'a str,
    revision: &'a str,
    repo: ApiRepo,
    dir: &'a Path,
    done: u64,
    total: u64,
    progress: &'a mut OnDownload<'b>,
}

impl Fetch<'_, '_> {
    /// The file in the cache, downloaded unless it is there; what an earlier attempt left is taken up.
    fn file(&mut self, file: &File) -> Result<PathBuf> {
        let name = file.rfilename.as_str();
        let path = self.dir.join(name);
        let mut attempt = 0;
        while !path.exists() {
            let watch =
                Watch { file: name, before: self.done, here: 0, total: self.total, progress: &mut *self.progress };
            let error = match self.repo.download_with_progress(name, watch) {
                Ok(found) => {
                    let size = fs::metadata(&found)?.len();
                    let Some(expected) = file.size.filter(|expected| *expected != size) else { break };
                    self.discard(&found);
                    ApiError::IoError(std::io::Error::other(format!("expected {expected} bytes, found {size}")))
                }
                Err(error) => error,
            };
            // 416: a part that is already whole or too long, which hf-hub would ask for again and again.
            let is_bad_part = status(&error) == Some(416) || matches!(error, ApiError::InvalidResume);
            if is_bad_part {
                self.discard_part(name);
            }
            let refused = matches!(status(&error), Some(400..500)) && !is_bad_part;
            attempt += 1;
            if refused || attempt > RETRIES || matches!(error, ApiError::LockAcquisition(_)) {
                return Err(self.hub.explain(error, self.id, self.revision, Some(name)));
            }
            std::thread::sleep(RETRY_WAIT * attempt);
        }
        self.done += file.size.unwrap_or(0);
        (self.progress)(Download { file: name, done: self.done, total: self.total.max(self.done) });
        Ok(path)
    }

    /// Takes away a file of the wrong size and what it points to.
    fn discard(&self, path: &Path) {
        // What stays is found again by the next attempt.
        if let Ok(blob) = fs::canonicalize(path) {
            let _ = fs::remove_file(blob);
        }
        let _ = fs::remove_file(path);
    }

    fn discard_part(&self, name: &str) {
        if let Ok(metadata) = self.api.metadata(&self.repo.url(name)) {
            let cache = Cache::new(self.hub.cache.clone()).repo(self.hub.repo(self.id, self.revision));
            let _ = fs::remove_file(cache.blob_path(metadata.etag()).with_extension("part"));
        }
    }
}

struct Watch<'a, 'b> {
    file: &'a str,
    before: u64,
    here: u64,
    total: u64,
    progress: &'a mut OnDownload<'b>,
}

impl hf_hub::api::Progress for Watch<'_, '_> {
    fn init(&mut self, _size: usize, _filename: &str) {
        self.here = 0;
    }

    fn update(&mut self, size: usize) {
        self.here += size as u64;
        let done = self.before + self.here;
        (self.progress)(Download { file: self.file, done, total: self.total.max(done) });
    }

    fn finish(&mut self) {}
}

#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<File>,
}

#[derive(Deserialize)]
struct File {
    rfilename: String,
    size: Option<u64>,
}

/// Configuration, template and tokenizer files; never code or other weights.
fn is_small_file(name: &str) -> bool {
    let kind = Path::new(name).extension().and_then(|extension| extension.to_str());
    is_plain(name) && matches!(kind, Some("json" | "jinja" | "txt"))
}

fn is_plain(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', '\0'])
}

/// The files that an index names.
fn shards(index: &[u8]) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(index)?;
    let mut shards: Vec<String> = index.weight_map.into_values().collect();
    shards.sort_unstable();
    shards.dedup();
    match shards.iter().find(|shard| !is_plain(shard) || !shard.ends_with(".safetensors")) {
        Some(shard) => bail!("weight_map: expected names of .safetensors files beside it, found {shard:?}"),
        None => Ok(shards),
    }
}

/// The HTTP status with which the hub refused.
fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(code) => Some(code),
            _ => None,
        },
        _ => None,
    }
}
