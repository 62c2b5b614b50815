//! The figures of `keye bench`, for people and for programs.

use keye_limits::Limits;
use keye_media::MediaCost;
use serde_json::{Value, json};

use super::ui;

/// Everything that was measured. Rates are in units per second.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    pub model: String,
    pub quant: String,
    pub device: String,
    pub threads: usize,
    /// The machine's, when it computes.
    pub limits: Option<Limits>,
    /// Seconds from opening the files to the first logits of 16 tokens.
    pub first_token: Option<f64>,
    pub prefill: Vec<Prefill>,
    pub decode: Vec<Decode>,
    pub vision: Vec<Vision>,
    pub media: Vec<MediaCost>,
    /// Tokens of cache that fit in the machine's memory beside the weights, when it computes.
    pub cache_tokens: Option<u64>,
    /// Most memory that was resident, mapped weights included, in bytes.
    pub rss: u64,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Prefill {
    pub tokens: usize,
    pub seconds: f64,
    /// Operations of the whole prompt.
    pub operations: f64,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Decode {
    pub context: usize,
    /// A token.
    pub seconds: f64,
    /// Of weights and cache that a token reads.
    pub bytes: f64,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Vision {
    pub patches: usize,
    pub seconds: f64,
    pub operations: f64,
}

impl Report {
    /// The arithmetic peak that fractions are of: int8, or f32 on a machine without.
    fn peak(&self) -> Option<f64> {
        self.limits.and_then(|limits| limits.int8.or(limits.f32))
    }

    fn of_peak(&self, operations: f64, seconds: f64) -> Option<f64> {
        self.peak().map(|peak| operations / seconds / peak)
    }

    fn of_read(&self, decode: &Decode) -> Option<f64> {
        self.limits.map(|limits| decode.bytes / decode.seconds / limits.read)
    }

    pub fn json(&self) -> Value {
        let giga = |rate: Option<f64>| rate.map(|rate| round(rate / 1e9));
        let prefill = self.prefill.iter().map(|run| {
            let fraction = self.of_peak(run.operations, run.seconds).map(round);
            json!({"tokens": run.tokens, "tok_s": round(run.tokens as f64 / run.seconds), "fraction": fraction})
        });
        let decode = self.decode.iter().map(|run| {
            json!({"context": run.context, "tok_s": round(1.0 / run.seconds), "fraction": self.of_read(run).map(round)})
        });
        let vision = self.vision.iter().map(|run| {
            let fraction = self.of_peak(run.operations, run.seconds).map(round);
            json!({"patches": run.patches, "seconds": round(run.seconds), "fraction": fraction})
        });
        let media = self.media.iter().map(|run| {
            json!({
                "clip": run.clip, "cpu_s": round(run.cpu_s), "wall_s": round(run.wall_s),
                "rss_mb": round(run.rss_mb + run.child_rss_mb), "ratio_to_decode": round(run.ratio_to_decode),
            })
        });
        json!({
            "model": self.model,
            "quant": self.quant,
            "device": self.device,
            "threads": self.threads,
            "limits": self.limits.map(|limits| json!({
                "read_gb_s": giga(Some(limits.read)),
                "int8_gop_s": giga(limits.int8),
                "f16_gflop_s": giga(limits.f16),
                "f32_gflop_s": giga(limits.f32),
            })),
            "prefill": prefill.collect::<Vec<_>>(),
            "decode": decode.collect::<Vec<_>>(),
            "vision": vision.collect::<Vec<_>>(),
            "media": media.collect::<Vec<_>>(),
            "first_token_s": self.first_token.map(round),
            "cache_tokens": self.cache_tokens,
            "rss_gb": round(self.rss as f64 / 1e9),
        })
    }

    pub fn text(&self) -> String {
        let giga = |rate: Option<f64>, unit: &str| rate.map_or("none".to_owned(), |r| format!("{:.0} {unit}", r / 1e9));
        let percent = |part: Option<f64>| part.map_or(String::new(), |part| format!("{:>6.1} %", 100.0 * part));
        let mut text = format!("{}, {} weights; {}\n", self.model, self.quant, self.device);
        if let Some(limits) = self.limits {
            text += &format!(
                "limits      reads {:.1} GB/s, int8 {}, f16 {}, f32 {}\n",
                limits.read / 1e9,
                giga(limits.int8, "GOP/s"),
                giga(limits.f16, "GFLOP/s"),
                giga(limits.f32, "GFLOP/s"),
            );
        }
        if let Some(seconds) = self.first_token {
            text += &format!("start       first token of a prompt of 16 after {seconds:.2} s\n");
        }
        for run in &self.prefill {
            let fraction = percent(self.of_peak(run.operations, run.seconds));
            let rate = run.tokens as f64 / run.seconds;
            text += &format!("prefill     {:>5} tokens   {rate:>8.2} tok/s  {fraction}\n", run.tokens);
        }
        for run in &self.decode {
            let fraction = percent(self.of_read(run));
            text += &format!("decode      {:>5} before   {:>8.2} tok/s  {fraction}\n", run.context, 1.0 / run.seconds);
        }
        for run in &self.vision {
            let fraction = percent(self.of_peak(run.operations, run.seconds));
            text += &format!("vision      {:>5} patches  {:>8.2} s      {fraction}\n", run.patches, run.seconds);
        }
        for run in &self.media {
            text += &format!(
                "media       {}: {:.2} s, {:.2} s of processor time, {:.2} times ffmpeg's decoding, {:.0} MB\n",
                run.clip,
                run.wall_s,
                run.cpu_s,
                run.ratio_to_decode,
                run.rss_mb + run.child_rss_mb,
            );
        }
        if let Some(tokens) = self.cache_tokens {
            text += &format!("cache       {} tokens fit beside the weights\n", ui::grouped(tokens));
        }
        text + &format!("memory      {} at most\n", ui::bytes(self.rss))
    }
}

/// Four decimals.
fn round(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The keys that programs read.
    #[test]
    fn json_has_rates_and_fractions_of_the_limits() {
        let report = Report {
            model: "m".into(),
            quant: "int4".into(),
            device: "d".into(),
            threads: 2,
            limits: Some(Limits { read: 30e9, int8: Some(1000e9), f16: None, f32: Some(200e9) }),
            first_token: Some(1.25),
            prefill: vec![Prefill { tokens: 512, seconds: 8.0, operations: 4000e9 }],
            decode: vec![Decode { context: 128, seconds: 0.2, bytes: 3e9 }],
            vision: vec![Vision { patches: 1024, seconds: 2.0, operations: 1000e9 }],
            media: vec![MediaCost {
                clip: "c".into(),
                cpu_s: 3.0,
                wall_s: 2.0,
                rss_mb: 20.0,
                child_rss_mb: 30.0,
                decode_cpu_s: 2.4,
                decode_wall_s: 1.2,
                ratio_to_decode: 1.25,
                wall_ratio_to_decode: 1.6,
                frames: 120,
                patches: 5,
                decoder: "ffmpeg".into(),
            }],
            cache_tokens: Some(12_345),
            rss: 5_000_000_000,
        };
        let json = report.json();
        assert_eq!(
            json["limits"],
            json!({"read_gb_s": 30.0, "int8_gop_s": 1000.0, "f16_gflop_s": null, "f32_gflop_s": 200.0})
        );
        assert_eq!(json["prefill"], json!([{"tokens": 512, "tok_s": 64.0, "fraction": 0.5}]));
        assert_eq!(json["decode"], json!([{"context": 128, "tok_s": 5.0, "fraction": 0.5}]));
        assert_eq!(json["vision"], json!([{"patches": 1024, "seconds": 2.0, "fraction": 0.5}]));
        assert_eq!(
            json["media"],
            json!([{"clip": "c", "cpu_s": 3.0, "wall_s": 2.0, "rss_mb": 50.0, "ratio_to_decode": 1.25}])
        );
        assert_eq!((&json["rss_gb"], &json["first_token_s"]), (&json!(5.0), &json!(1.25)));
        let limits = report.limits.map(|limits| Limits { int8: None, ..limits });
        let without = Report { limits, ..report.clone() };
        assert_eq!(without.json()["vision"][0]["fraction"], 2.5);
        for text in ["12,345 tokens fit", "64.00 tok/s", "50.0 %", "1.25 times", "5.00 GB", "f16 none"] {
            assert!(report.text().contains(text), "{text}: {}", report.text());
        }
    }
}
