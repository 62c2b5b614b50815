//! Load on a server that runs: mixed text, image and video, streamed, at several numbers of clients.
//!
//! `load HOST:PORT [--seconds 30] [--streams 1,8,32] [--tokens 64] [--image FILE] [--video FILE] [--long WORDS] [--pid PID]`
//!
//! For each number of clients: requests and failures, tokens a second, time to the first text, largest gap between texts of
//! one stream, and, with the server's process id, its resident memory at the end. With `--long` one more client sends
//! prompts of so many words, one after the other, and is counted apart: what the gaps of the others are beside it is how
//! fair the server is.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

struct Plan {
    address: String,
    seconds: u64,
    streams: Vec<usize>,
    tokens: usize,
    /// Parts to choose from; the first is none.
    media: Vec<Option<Value>>,
    /// Words of the prompts of one more client; 0 is none.
    long: usize,
    pid: Option<u32>,
}

/// What one client saw.
#[derive(Default)]
struct Seen {
    requests: usize,
    failed: usize,
    tokens: u64,
    first: Vec<Duration>,
    gaps: Vec<Duration>,
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let plan = plan()?;
    println!("streams requests failed tokens/s first-p50 first-max gap-p50 gap-max rss-MiB");
    for streams in &plan.streams {
        let start = Instant::now();
        let seen: Vec<Seen> = std::thread::scope(|scope| {
            let clients: Vec<_> = (0..*streams)
                .map(|i| {
                    scope.spawn({
                        let plan = &plan;
                        move || client(plan, i)
                    })
                })
                .collect();
            let long = (plan.long > 0).then(|| scope.spawn(|| long_prompts(&plan)));
            let seen = clients.into_iter().map(|client| client.join().unwrap_or_default()).collect();
            if let Some(long) = long.and_then(|long| long.join().ok()) {
                println!("  beside {} long prompts, {} failed", long.requests, long.failed);
            }
            seen
        });
        let seconds = start.elapsed().as_secs_f64();
        let sorted = |of: fn(&Seen) -> &[Duration]| {
            let mut all: Vec<f64> = seen.iter().flat_map(of).map(Duration::as_secs_f64).collect();
            all.sort_by(f64::total_cmp);
            (all.get(all.len() / 2).copied().unwrap_or(0.0), all.last().copied().unwrap_or(0.0))
        };
        let sum = |of: fn(&Seen) -> u64| seen.iter().map(of).sum::<u64>();
        let (first, gap) = (sorted(|seen| &seen.first), sorted(|seen| &seen.gaps));
        println!(
            "{streams} {} {} {:.1} {:.3} {:.3} {:.3} {:.3} {}",
            sum(|seen| seen.requests as u64),
            sum(|seen| seen.failed as u64),
            sum(|seen| seen.tokens) as f64 / seconds,
            first.0,
            first.1,
            gap.0,
            gap.1,
            plan.pid.and_then(resident_mib).map_or("-".into(), |mib| mib.to_string()),
        );
    }
    Ok(())
}

fn plan() -> Result<Plan, Failure> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().ok_or("the first argument is HOST:PORT of the server")?;
    let mut plan =
        Plan { address, seconds: 30, streams: vec![1, 8, 32], tokens: 64, media: vec![None], long: 0, pid: None };
    while let Some(flag) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{flag} needs a value"))?;
        let part = |kind: &str, name: &str| -> Result<Option<Value>, Failure> {
            let url = format!("data:{kind};base64,{}", STANDARD.encode(std::fs::read(&value)?));
            Ok(Some(json!({"type": name, name: {"url": url}})))
        };
        match flag.as_str() {
            "--seconds" => plan.seconds = value.parse()?,
            "--streams" => plan.streams = value.split(',').map(str::parse).collect::<Result<_, _>>()?,
            "--tokens" => plan.tokens = value.parse()?,
            "--image" => plan.media.push(part("image/png", "image_url")?),
            "--video" => plan.media.push(part("video/mp4", "video_url")?),
            "--long" => plan.long = value.parse()?,
            "--pid" => plan.pid = Some(value.parse()?),
            _ => return Err(format!("{flag} is no flag").into()),
        }
    }
    Ok(plan)
}

/// Asks one thing after the other until the time is over.
fn client(plan: &Plan, index: usize) -> Seen {
    let (mut seen, start) = (Seen::default(), Instant::now());
    let mut turn = index;
    while start.elapsed() < Duration::from_secs(plan.seconds) {
        seen.requests += 1;
        let part = plan.media[turn % plan.media.len()].clone();
        turn += 1;
        let text = format!("Question {turn}: what is there?");
        if ask(plan, part, &text, plan.tokens, &mut seen).is_err() {
            seen.failed += 1;
        }
    }
    seen
}

/// Asks one thing after the other that takes long to read and one token to answer.
fn long_prompts(plan: &Plan) -> Seen {
    let (mut seen, start) = (Seen::default(), Instant::now());
    while start.elapsed() < Duration::from_secs(plan.seconds) {
        seen.requests += 1;
        // Another beginning each time, so that nothing is cached.
        let text = format!("{} {}", seen.requests, "word ".repeat(plan.long));
        if ask(plan, None, &text, 1, &mut seen).is_err() {
            seen.failed += 1;
        }
    }
    seen
}

fn ask(plan: &Plan, part: Option<Value>, text: &str, tokens: usize, seen: &mut Seen) -> Result<(), Failure> {
    let text = json!({"type": "text", "text": text});
    let body = json!({
        "messages": [{"role": "user", "content": part.into_iter().chain([text]).collect::<Vec<_>>()}],
        "stream": true, "stream_options": {"include_usage": true}, "max_tokens": tokens, "ignore_eos": true,
    })
    .to_string();
    let start = Instant::now();
    let mut socket = TcpStream::connect(&plan.address)?;
    let (length, host) = (body.len(), &plan.address);
    write!(
        socket,
        "POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n{body}"
    )?;
    let mut lines = BufReader::new(socket).lines();
    let status = lines.next().ok_or("no answer")??;
    if !status.contains(" 200 ") {
        return Err(status.into());
    }
    let (mut last, mut done) = (None, false);
    for line in lines {
        let line = line?;
        let Some(data) = line.strip_prefix("data: ") else { continue };
        if data == "[DONE]" {
            done = true;
            break;
        }
        let event: Value = serde_json::from_str(data)?;
        seen.tokens += event["usage"]["completion_tokens"].as_u64().unwrap_or(0);
        let delta = &event["choices"][0]["delta"];
        let texts = [&delta["content"], &delta["reasoning_content"]];
        if texts.iter().any(|text| text.as_str().is_some_and(|text| !text.is_empty())) {
            match last.replace(Instant::now()) {
                None => seen.first.push(start.elapsed()),
                Some(before) => seen.gaps.push(before.elapsed()),
            }
        }
    }
    if done { Ok(()) } else { Err("the stream ended early".into()) }
}

fn resident_mib(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kib| kib / 1024)
}
