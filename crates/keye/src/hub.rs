//! A hub id to a local directory: downloads what a checkpoint needs into the cache that Hugging Face's tools share.
//!
//! `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_CACHE` and `HF_HUB_OFFLINE` mean what they mean there. All files of a checkpoint come from
//! one commit, and a branch points to that commit only once all of them are there.

mod cache;
mod fetch;
mod http;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;

use crate::disk::free_bytes;
use crate::units::bytes_text;
use cache::{Etag, Repo};
use fetch::{Fetch, RETRIES};
use http::{Client, Failure, segment};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

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
    /// Sent to the endpoint and to nobody whom it names, never shown.
    pub token: Option<String>,
    /// Use the cache only.
    pub offline: bool,
    /// How long to wait for a server.
    pub patience: Patience,
}

/// How long to wait for a server.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For a connection, the head of an answer, and between the bytes of a body.
    pub silence: Duration,
    /// Before a second attempt; before later ones, as many times as there have been attempts.
    pub retry: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { silence: Duration::from_secs(60), retry: Duration::from_millis(500) }
    }
}

impl Patience {
    /// The wait after the failure of so many attempts.
    fn after(&self, attempts: u32, failure: &Failure) -> Duration {
        (self.retry * attempts).max(failure.wait())
    }
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
            patience: Patience::default(),
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
        let is_id = id.split_once('/').is_some_and(|(org, name)| is_word(org) && is_word(name));
        if !is_id || !revision.split('/').all(is_word) {
            bail!("{model:?} is not there; {neither}");
        }
        self.snapshot(id, revision, progress)
            .with_context(|| format!("there is no directory {model} here; as a hub id it cannot be had either"))
    }

    /// The cached directory of `revision` of `id`, downloaded where something of it is missing.
    pub fn snapshot(&self, id: &str, revision: &str, progress: &mut OnDownload<'_>) -> Result<PathBuf> {
        let repo = Repo::new(&self.cache, id)?;
        let cached = cached(&repo, revision);
        let has_length_of_commit = revision.len() == 40;
        if let Some(dir) = cached.as_ref().filter(|_| self.offline || (has_length_of_commit && is_commit(revision))) {
            return Ok(dir.clone());
        }
        if self.offline {
            bail!(
                "{} does not hold all of {id}@{revision}, and --offline or HF_HUB_OFFLINE keeps it from being downloaded",
                self.cache.display()
            );
        }
        let client = Client::new(self);
        let listing = match self.listing(&client, id, revision, cached.is_none()) {
            Ok(listing) => listing,
            // Without a connection the cache is as good as it gets; a refusal is not a missing connection.
            Err(failure) => match cached {
                Some(dir) if failure.may_pass() || matches!(failure, Failure::Answer(_)) => return Ok(dir),
                _ => return Err(self.explain(&failure, id, revision, None)),
            },
        };
        self.download(&client, &repo, id, revision, &listing, progress)
    }

    /// What the hub has of `revision`; a busy hub is asked again if `needed`.
    fn listing(&self, client: &Client<'_>, id: &str, revision: &str, needed: bool) -> Result<Listing, Failure> {
        let path = format!("/api/models/{id}/revision/{}?blobs=true", segment(revision));
        let mut attempts = 0;
        loop {
            match client.json(&path) {
                Err(failure @ Failure::Refused { .. }) if needed && failure.may_pass() && attempts < RETRIES => {
                    attempts += 1;
                    std::thread::sleep(self.patience.after(attempts, &failure));
                }
                result => return result,
            }
        }
    }

    fn download(
        &self,
        client: &Client<'_>,
        repo: &Repo,
        id: &str,
        revision: &str,
        listing: &Listing,
        progress: &mut OnDownload<'_>,
    ) -> Result<PathBuf> {
        let commit = listing.sha.as_str();
        if !is_commit(commit) {
            bail!("{}: expected a commit, found {commit:?}", self.endpoint);
        }
        let dir = repo.snapshot(commit);
        let mut fetch = Fetch { client, patience: &self.patience, repo, id, commit, done: 0, total: 0, progress };
        let explain = |failure: &Failure, file: &File| self.explain(failure, id, revision, Some(&file.rfilename));

        let has = |name: &str| listing.siblings.iter().any(|file| file.rfilename == name);
        let mut files: Vec<&File> = listing.siblings.iter().filter(|file| is_small_file(&file.rfilename)).collect();
        // The index says which weights there are; without one there is one file.
        let shards = if has(INDEX) {
            let index = files.iter().position(|file| file.rfilename == INDEX).map(|at| files.remove(at));
            let index = index.with_context(|| format!("{id}: {INDEX} is not listed"))?;
            let path = fetch.file(index).map_err(|failure| explain(&failure, index))?;
            shards(&fs::read(&path)?).with_context(|| format!("{id}: {INDEX}"))?
        } else {
            vec![SINGLE.to_owned()]
        };
        for shard in &shards {
            let file = listing.siblings.iter().find(|file| file.rfilename == *shard);
            files.push(file.with_context(|| format!("{id}@{revision} has no file {shard}: no safetensors weights"))?);
        }
        let missing: u64 = files.iter().map(|file| missing(repo, commit, file)).sum();
        let free = free_bytes(&self.cache).unwrap_or(u64::MAX);
        if missing > free {
            let (missing, free) = (bytes_text(missing), bytes_text(free));
            bail!(
                "{id} needs {missing} more, {} has room for {free}; HF_HUB_CACHE names another place",
                self.cache.display()
            );
        }
        fetch.total = fetch.done + files.iter().filter_map(|file| file.size).sum::<u64>();
        for file in files {
            fetch.file(file).map_err(|failure| explain(&failure, file))?;
        }
        repo.point(revision, commit).with_context(|| format!("cannot write to {}", self.cache.display()))?;
        Ok(dir)
    }

    /// What a failure means for the user.
    fn explain(&self, failure: &Failure, id: &str, revision: &str, file: Option<&str>) -> anyhow::Error {
        let what = file.map_or_else(|| format!("{id}@{revision}"), |file| format!("{file} of {id}@{revision}"));
        let endpoint = &self.endpoint;
        match failure {
            Failure::Refused { code, at: Some(at), .. } => {
                anyhow!("{at}, where {endpoint} keeps {what}, answered {code}")
            }
            Failure::Refused { code: code @ (401 | 403), .. } if self.token.is_none() => anyhow!(
                "{endpoint} does not show {what} without a token ({code}): it is private, gated or does not exist; set HF_TOKEN"
            ),
            Failure::Refused { code: code @ (401 | 403), .. } => anyhow!(
                "{endpoint} refuses {what} to the token of HF_TOKEN ({code}): it has expired, or may not read this model"
            ),
            Failure::Refused { code: 404, .. } => anyhow!("{endpoint} has no {what} (404)"),
            Failure::Refused { code, .. } => anyhow!("{endpoint} answered {code} for {what}"),
            Failure::Here(reason) | Failure::Held(reason) => anyhow!("{what}: {reason}"),
            Failure::Broken(reason) | Failure::Answer(reason) | Failure::Damaged(reason) => {
                anyhow!("{reason}").context(format!("cannot read {what} from {endpoint}"))
            }
        }
    }
}

/// The snapshot to which `revision` points, if all that is needed is in it.
fn cached(repo: &Repo, revision: &str) -> Option<PathBuf> {
    let pointed = repo.commit(revision).map(|commit| repo.snapshot(&commit));
    let has_config = |dir: &PathBuf| dir.join("config.json").exists();
    let dir = pointed.filter(has_config).or_else(|| Some(repo.snapshot(revision)).filter(has_config))?;
    let shards = match fs::read(dir.join(INDEX)) {
        Ok(index) => shards(&index).ok()?,
        Err(_) => vec![SINGLE.to_owned()],
    };
    shards.iter().all(|shard| dir.join(shard).exists()).then_some(dir)
}

/// Bytes of a listed file that are still to come.
fn missing(repo: &Repo, commit: &str, file: &File) -> u64 {
    let size = file.size.unwrap_or(0);
    if repo.snapshot(commit).join(&file.rfilename).exists() {
        return 0;
    }
    size - file.etag().map_or(0, |etag| repo.present(&etag, size))
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
    /// Git's number of it.
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

/// Where a large file is kept.
#[derive(Deserialize)]
struct Lfs {
    sha256: Option<String>,
}

impl File {
    /// The name of its blob, by the listing; the answer that brings it has the last word.
    fn etag(&self) -> Option<Etag> {
        let sha256 = self.lfs.as_ref().and_then(|lfs| lfs.sha256.as_ref());
        sha256.or(self.blob_id.as_ref()).and_then(|tag| Etag::parse(tag))
    }
}

/// A part of an id, a revision or a cache's path that stays where it is put.
fn is_word(word: &str) -> bool {
    !word.is_empty() && !word.starts_with('.') && word.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

fn is_commit(commit: &str) -> bool {
    (1..=64).contains(&commit.len()) && commit.bytes().all(|b| b.is_ascii_hexdigit())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_needs_no_room() {
        let cache = tempfile::tempdir().unwrap();
        let repo = Repo::new(cache.path(), "org/name").unwrap();
        let file = |json: &str| serde_json::from_str::<File>(json).unwrap();
        let sha256 = "a".repeat(64);
        let large = file(&format!(
            r#"{{"rfilename": "a", "size": 100, "blobId": "b1", "lfs": {{"sha256": "{sha256}", "pointerSize": 9}}}}"#
        ));
        let small = file(r#"{"rfilename": "b", "size": 10, "blobId": "b2"}"#);
        let unknown = file(r#"{"rfilename": "c", "size": 10}"#);
        let room = || [&large, &small, &unknown].map(|file| missing(&repo, "0", file));
        assert_eq!(room(), [100, 10, 10]);
        let blobs = cache.path().join("models--org--name/blobs");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join(format!("{sha256}.part")), [0; 40]).unwrap();
        fs::write(blobs.join("b2.part"), [0; 11]).unwrap();
        fs::create_dir_all(repo.snapshot("0")).unwrap();
        fs::write(repo.snapshot("0").join("c"), "").unwrap();
        assert_eq!(room(), [60, 0, 0]);
    }
}
