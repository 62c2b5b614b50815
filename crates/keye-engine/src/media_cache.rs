//! Decoded media of recent requests. A chat sends all of its media again with every turn.

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use keye_media::{Loaded, Loader, Media, MediaError, MediaItem, Pixels, Progress, Source};
use sha2::{Digest, Sha256};

/// How long the content of a URL is taken to be the same.
const URL_AGE: Duration = Duration::from_secs(600);

type Identity = [u8; 32];

struct Entry {
    identity: Identity,
    loaded: Instant,
    found: Found,
}

/// An item, and what is to be said of it: every time, not only to the first who asks.
#[derive(Clone)]
pub(crate) struct Found {
    pub media: Arc<Media>,
    pub warnings: Arc<[String]>,
}

impl From<Loaded> for Found {
    fn from(Loaded { media, warnings }: Loaded) -> Self {
        Self { media: Arc::new(media), warnings: warnings.into() }
    }
}

/// Media by what they were loaded from and with which options, up to a number of bytes; the longest unused go first. What
/// does not fit alone is not kept. Who asks for what another thread is loading waits for it.
pub(crate) struct MediaCache {
    state: Mutex<State>,
    changed: Condvar,
    max_bytes: usize,
}

#[derive(Default)]
struct State {
    /// The last used last.
    entries: Vec<Entry>,
    loading: HashSet<Identity>,
}

/// Ends the loading of an item, however it ends.
struct Loading<'a> {
    cache: &'a MediaCache,
    identity: Identity,
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        self.cache.lock().loading.remove(&self.identity);
        self.cache.changed.notify_all();
    }
}

impl MediaCache {
    pub fn new(max_bytes: usize) -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), max_bytes }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// [`Loader::load_with_warnings`], unless the item is here; and whether it was. While another thread loads it, `give_up`
    /// is asked from time to time.
    pub fn load(
        &self,
        loader: &Loader,
        item: &MediaItem,
        progress: &mut dyn FnMut(Progress) -> bool,
        give_up: &dyn Fn() -> bool,
    ) -> Result<(Found, bool), MediaError> {
        const ASK: Duration = Duration::from_millis(20);
        // Taken before loading: a file that changes meanwhile must not be found under its new state.
        let Some(identity) = identity(item, loader.access.root.as_deref()) else {
            return Ok((loader.load_with_warnings(item, progress)?.into(), false));
        };
        let mut state = self.lock();
        loop {
            state.entries.retain(|entry| entry.loaded.elapsed() < URL_AGE);
            if let Some(found) = state.find(&identity) {
                return Ok((found, true));
            }
            if give_up() {
                return Err(MediaError::Cancelled);
            }
            if state.loading.insert(identity) {
                break;
            }
            state = self.changed.wait_timeout(state, ASK).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        let _loading = Loading { cache: self, identity };
        let found = Found::from(loader.load_with_warnings(item, progress)?);
        self.lock().keep(identity, found.clone(), self.max_bytes);
        Ok((found, false))
    }
}

impl State {
    fn find(&mut self, identity: &Identity) -> Option<Found> {
        let index = self.entries.iter().position(|entry| entry.identity == *identity)?;
        self.entries[index..].rotate_left(1);
        self.entries.last().map(|entry| entry.found.clone())
    }

    fn keep(&mut self, identity: Identity, found: Found, max_bytes: usize) {
        if size(&found.media) > max_bytes {
            return;
        }
        self.entries.push(Entry { identity, loaded: Instant::now(), found });
        let mut bytes = 0;
        let fit = self.entries.iter().rev().take_while(|entry| {
            bytes += size(&entry.found.media);
            bytes <= max_bytes
        });
        let drop = self.entries.len() - fit.count();
        self.entries.drain(..drop);
    }
}

fn size(media: &Media) -> usize {
    let pixels = match &media.patches.pixels {
        Pixels::U8(values) => values.len(),
        Pixels::F32(values) => values.len() * size_of::<f32>(),
    };
    pixels + size_of_val(media.frames.as_slice())
}

/// A hash that is equal only when loading gives the same; `None` when that cannot be known.
fn identity(item: &MediaItem, root: Option<&Path>) -> Option<Identity> {
    let mut hasher = Sha256::new();
    hasher.update(format!("{:?}\0{:?}\0", item.kind, item.options));
    add_source(&mut hasher, &item.source, root)?;
    Some(hasher.finalize().into())
}

fn add_source(hasher: &mut Sha256, source: &Source, root: Option<&Path>) -> Option<()> {
    // Every field is preceded by its length, so that no two sources are written alike.
    let mut field = |bytes: &[u8]| {
        hasher.update((bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    match source {
        Source::Path(path) => {
            let path = root.map_or_else(|| path.clone(), |root| root.join(path));
            field(b"path");
            field(path.as_os_str().as_encoded_bytes());
            field(&file_state(&path)?);
        }
        Source::Url(url) => {
            field(b"url");
            field(url.as_bytes());
        }
        Source::Bytes(bytes) => {
            field(b"bytes");
            field(bytes);
        }
        Source::Frames(frames) => {
            field(b"frames");
            field(&(frames.len() as u64).to_le_bytes());
            for frame in frames {
                hasher.update(format!("{:?}\0", frame.options));
                add_source(hasher, &frame.source, root)?;
            }
        }
    }
    Some(())
}

/// Changes when the file's content does.
fn file_state(path: &Path) -> Option<Vec<u8>> {
    let metadata = std::fs::metadata(path).ok()?;
    if !metadata.is_file() {
        return None;
    }
    let modified = metadata.modified().ok()?.duration_since(std::time::UNIX_EPOCH).ok()?;
    let mut state = format!("{} {}", metadata.len(), modified.as_nanos());
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        state += &format!(" {} {} {} {}", metadata.dev(), metadata.ino(), metadata.ctime(), metadata.ctime_nsec());
    }
    Some(state.into_bytes())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use keye_media::{Access, ItemOptions, MediaConfig, MediaKind};

    use super::*;

    fn loader() -> Loader {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/keye-preview-tiny/inputs");
        Loader { access: Access { root: Some(root), ..Access::default() }, ..Loader::new(MediaConfig::preview()) }
    }

    fn picture(source: Source) -> MediaItem {
        MediaItem { kind: MediaKind::Image, source, options: ItemOptions::default() }
    }

    fn load(cache: &MediaCache, item: &MediaItem) -> Arc<Media> {
        cache.load(&loader(), item, &mut |_| true, &|| false).expect("a fixture").0.media
    }

    #[test]
    fn the_same_source_with_the_same_options_is_loaded_once() {
        let cache = MediaCache::new(1 << 30);
        let bytes = std::fs::read(loader().access.root.expect("set").join("one.png")).expect("a fixture");
        let sources = [Source::Path("one.png".into()), Source::Path("tall.png".into()), Source::Bytes(bytes.into())];
        let items: Vec<MediaItem> = sources.into_iter().map(picture).collect();
        let first: Vec<_> = items.iter().map(|item| load(&cache, item)).collect();
        for (item, first) in items.iter().zip(&first) {
            assert!(Arc::ptr_eq(&load(&cache, item), first));
        }
        let options = ItemOptions { max_pixels: Some(50_000), ..ItemOptions::default() };
        let other = load(&cache, &MediaItem { options, ..items[0].clone() });
        assert!(first.iter().all(|first| !Arc::ptr_eq(first, &other)));
        assert!(!Arc::ptr_eq(&first[0], &first[2]), "a file is not known by its content");
    }

    #[test]
    fn what_several_want_at_once_is_loaded_once() {
        let cache = MediaCache::new(1 << 30);
        let clip = MediaItem { kind: MediaKind::Video, ..picture(Source::Path("clip.mp4".into())) };
        let loaded: Vec<(Found, bool)> = std::thread::scope(|scope| {
            let load = || cache.load(&loader(), &clip, &mut |_| true, &|| false).expect("a fixture");
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(load)).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        assert_eq!(loaded.iter().filter(|(_, hit)| !hit).count(), 1);
        assert!(loaded.iter().all(|(found, _)| Arc::ptr_eq(&found.media, &loaded[0].0.media)));
        let refused = cache.load(&loader(), &picture(Source::Path("none.png".into())), &mut |_| true, &|| false);
        assert!(refused.is_err() && cache.lock().loading.is_empty());
    }

    #[test]
    fn the_longest_unused_goes_when_there_are_too_many_bytes() {
        let (a, b) = (picture(Source::Path("one.png".into())), picture(Source::Path("tall.png".into())));
        let mut cache = MediaCache::new(usize::MAX);
        let (first, second) = (load(&cache, &a), load(&cache, &b));
        assert!(Arc::ptr_eq(&load(&cache, &a), &first));
        let wide = picture(Source::Path("wide.png".into()));
        cache.max_bytes = size(&first) + size(&load(&MediaCache::new(0), &wide));
        load(&cache, &wide);
        assert!(!Arc::ptr_eq(&load(&cache, &b), &second), "unused for longer than the other");
        let nothing = MediaCache::new(0);
        assert!(!Arc::ptr_eq(&load(&nothing, &a), &load(&nothing, &a)));
        assert!(nothing.lock().entries.is_empty());
    }

    #[test]
    fn what_does_not_fit_alone_drives_nothing_out() {
        let small = picture(Source::Path("one.png".into()));
        let large = MediaItem { kind: MediaKind::Video, ..picture(Source::Path("clip.mp4".into())) };
        let mut cache = MediaCache::new(usize::MAX);
        let first = load(&cache, &small);
        cache.max_bytes = size(&load(&MediaCache::new(0), &large)) - 1;
        assert!(size(&first) <= cache.max_bytes);
        load(&cache, &large);
        assert!(Arc::ptr_eq(&load(&cache, &small), &first));
    }
}
