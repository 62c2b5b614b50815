//! One checkpoint's files, one after the other, with as many attempts as it takes.

use std::path::PathBuf;

use ureq::Body;
use ureq::http::Response;

use super::cache::{Etag, Part, Repo};
use super::http::{Answer, Client, Failure, segment};
use super::{Download, File, OnDownload, Patience};

/// How often a file is asked for again while nothing of it comes.
pub(super) const RETRIES: u32 = 5;
const BUFFER_BYTES: usize = 64 << 10;
/// What is shown of a header that makes no sense.
const SHOWN_CHARS: usize = 80;

/// One checkpoint's download.
pub(super) struct Fetch<'a, 'b> {
    pub(super) client: &'a Client<'a>,
    pub(super) patience: &'a Patience,
    pub(super) repo: &'a Repo,
    pub(super) id: &'a str,
    pub(super) commit: &'a str,
    /// Bytes of the whole checkpoint that are there, and that it has.
    pub(super) done: u64,
    pub(super) total: u64,
    pub(super) progress: &'a mut OnDownload<'b>,
}

impl Fetch<'_, '_> {
    /// The file in the cache, downloaded unless it is there; what an earlier attempt left is taken up.
    pub(super) fn file(&mut self, file: &File) -> Result<PathBuf, Failure> {
        let path = self.repo.snapshot(self.commit).join(&file.rfilename);
        if !path.exists() {
            self.download(file)?;
        }
        self.done += file.size.unwrap_or(0);
        self.report(file, 0);
        Ok(path)
    }

    fn report(&mut self, file: &File, here: u64) {
        let done = self.done + here;
        (self.progress)(Download { file: &file.rfilename, done, total: self.total.max(done) });
    }

    fn download(&mut self, file: &File) -> Result<(), Failure> {
        let mut part = None;
        let (mut attempt, mut most, mut was_damaged) = (0, 0, false);
        loop {
            let Err(failure) = self.attempt(file, &mut part) else { return Ok(()) };
            let len = part.as_ref().map_or(0, |part| part.len);
            if len > most {
                (attempt, most) = (0, len);
            }
            attempt += 1;
            let is_bad_part = len > 0 && matches!(failure, Failure::Refused { code: 416, .. });
            match &mut part {
                // The server does not know the bytes behind ours.
                Some(part) if is_bad_part => part.restart()?,
                // What an earlier run left may have been the damage, so that another try is worth all of its bytes; once.
                _ if matches!(failure, Failure::Damaged(_)) && !was_damaged => (was_damaged, most) = (true, 0),
                _ if failure.may_pass() => {}
                _ => return Err(failure),
            }
            if attempt > RETRIES {
                return Err(failure);
            }
            std::thread::sleep(self.patience.after(attempt, &failure));
        }
    }

    /// Reads what is missing of the file, to its end or to the first failure; `part` is what is there then.
    fn attempt(&mut self, file: &File, part: &mut Option<Part>) -> Result<(), Failure> {
        let name = &file.rfilename;
        let url = format!("/{}/resolve/{}/{}", self.id, self.commit, segment(name));
        let mut first = None;
        if part.is_none() {
            // Only an answer tells what the file is called in the cache, and with that what is there of it.
            let answer = self.client.get(&url, 0)?;
            let (etag, size) = self.identify(file, &answer)?;
            *part = Part::open(self.repo, &etag, size)?;
            if part.is_none() {
                return self.repo.link(&etag, self.commit, name);
            }
            first = Some(answer);
        }
        if let Some(part) = part.as_mut().filter(|part| part.len < part.size) {
            let answer = match first.filter(|_| part.len == 0) {
                Some(answer) => answer,
                None => self.client.get(&url, part.len)?,
            };
            self.receive(file, answer, part)?;
        }
        let Some(part) = part.take() else { return Ok(()) };
        let etag = part.finish()?;
        self.repo.link(&etag, self.commit, name)
    }

    /// The name of the file in the cache, and its size.
    fn identify(&self, file: &File, answer: &Answer) -> Result<(Etag, u64), Failure> {
        let about = &answer.about;
        if let Some(found) = about.commit.as_ref().filter(|found| *found != self.commit) {
            return Err(Failure::Answer(format!("x-repo-commit: expected {}, found {:?}", self.commit, shown(found))));
        }
        let tag = about.tag().ok_or_else(|| Failure::Answer("expected an ETag, found none".into()))?;
        let etag = Etag::parse(tag).ok_or_else(|| {
            Failure::Answer(format!("ETag: expected letters, digits, dots and dashes, found {:?}", shown(tag)))
        })?;
        let known = file.size.or(about.size);
        let size = match known {
            Some(size) => size,
            None => {
                extent(&answer.response)?.1.ok_or_else(|| Failure::Answer("expected a length, found none".into()))?
            }
        };
        if let Some(found) = about.size.filter(|found| *found != size) {
            return Err(Failure::Answer(format!("x-linked-size: expected {size} as listed, found {found}")));
        }
        Ok((etag, size))
    }

    /// Reads the body of `answer` into `part`, to the end of the file.
    fn receive(&mut self, file: &File, answer: Answer, part: &mut Part) -> Result<(), Failure> {
        if answer.about.tag().and_then(Etag::parse).is_none_or(|etag| etag != part.etag) {
            return Err(Failure::Answer("the ETag is another one than a moment ago".into()));
        }
        let (start, total) = extent(&answer.response)?;
        if let Some(found) = total.filter(|found| *found != part.size) {
            return Err(Failure::Answer(format!("expected a file of {} bytes, found {found}", part.size)));
        }
        if start == 0 && part.len > 0 {
            // It does not give parts of files.
            part.restart()?;
        }
        if start != part.len {
            return Err(Failure::Answer(format!("expected bytes from {} on, found them from {start} on", part.len)));
        }
        let mut body = self.client.body(answer);
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            self.report(file, part.len);
            match body(&mut buffer)? {
                0 if part.len < part.size => {
                    let (len, size) = (part.len, part.size);
                    return Err(Failure::Broken(format!("the connection ended after {len} of {size} bytes")));
                }
                0 => return Ok(()),
                n => part.add(&buffer[..n])?,
            }
        }
    }
}

/// Where in the file a body begins, and the length of the file where that is told.
fn extent(response: &Response<Body>) -> Result<(u64, Option<u64>), Failure> {
    match response.status().as_u16() {
        200 => Ok((0, response.body().content_length())),
        206 => {
            let range =
                response.headers().get("content-range").and_then(|value| value.to_str().ok()).unwrap_or_default();
            content_range(range).ok_or_else(|| {
                Failure::Answer(format!("Content-Range: expected bytes FIRST-LAST/TOTAL, found {:?}", shown(range)))
            })
        }
        code => Err(Failure::Answer(format!("expected status 200 or 206, found {code}"))),
    }
}

/// The first byte and the total of `bytes FIRST-LAST/TOTAL`.
fn content_range(range: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = range.strip_prefix("bytes ")?.split_once('/')?;
    let total = if total == "*" { None } else { Some(total.parse().ok()?) };
    Some((range.split_once('-')?.0.parse().ok()?, total))
}

fn shown(header: &str) -> String {
    header.chars().take(SHOWN_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::content_range;

    #[test]
    fn ranges_of_contents() {
        assert_eq!(content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(content_range("bytes 0-9/*"), Some((0, None)));
        for range in ["", "bytes */10", "bytes 5-9", "bytes x-9/10", "items 5-9/10", "bytes 5-9/-1"] {
            assert_eq!(content_range(range), None, "{range}");
        }
    }
}
