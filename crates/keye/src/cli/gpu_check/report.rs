//! What was found: lines for people as it comes, json at the end.

use anyhow::Result;
use serde_json::{Value, json};

/// The chip and what it is used with.
#[derive(Debug, Clone, Default)]
pub struct DeviceFound {
    /// Name, capability and driver.
    pub name: String,
    /// Bytes of memory: free, and in all.
    pub memory: (u64, u64),
    /// Seconds until kernels could be launched.
    pub start: f64,
    /// NVRTC's version or why there is none, and whether the kernels came with the program.
    pub compiler: String,
    /// Whether cuBLASLt is there, or why not.
    pub library: String,
}

/// Comparisons of one kind.
#[derive(Debug, Clone)]
pub struct Checked {
    pub name: String,
    pub count: usize,
    /// What is wrong, and how much.
    pub failed: Vec<String>,
    /// What is told and no error: another rounding decides between two that are nearly equal.
    pub differs: Vec<String>,
    pub seconds: f64,
}

/// How long something took.
#[derive(Debug, Clone)]
pub struct Timed {
    pub group: &'static str,
    pub name: String,
    pub seconds: f64,
    /// Per second, in units of `unit`.
    pub rate: f64,
    pub unit: &'static str,
    /// Of the floor that was measured in this run, 0 to 1.
    pub fraction: Option<f64>,
}

#[derive(Debug, Clone, Default)]
pub struct Report {
    pub device: Option<DeviceFound>,
    pub checks: Vec<Checked>,
    /// What was asked for and cannot be checked here, and why.
    pub skipped: Vec<(String, String)>,
    pub timings: Vec<Timed>,
    pub error: Option<String>,
}

impl Report {
    pub fn passed(&self) -> bool {
        self.error.is_none() && self.checks.iter().all(|check| check.failed.is_empty())
    }

    pub fn add(&mut self, check: Checked, show: impl Fn(&str) -> Result<()>) -> Result<()> {
        let mut verdict = match check.failed.len() {
            0 => "right".to_owned(),
            failed => format!("{failed} WRONG"),
        };
        if !check.differs.is_empty() {
            verdict += &format!(", {} differ", check.differs.len());
        }
        show(&format!("  {:<44} {:>5} checks  {:>6.1} s  {verdict}\n", check.name, check.count, check.seconds))?;
        for failed in &check.failed {
            show(&format!("    {failed}\n"))?;
        }
        for differs in &check.differs {
            show(&format!("    differs: {differs}\n"))?;
        }
        self.checks.push(check);
        Ok(())
    }

    pub fn skip(&mut self, name: &str, reason: String, show: impl Fn(&str) -> Result<()>) -> Result<()> {
        show(&format!("  {name}: not checked: {reason}\n"))?;
        self.skipped.push((name.to_owned(), reason));
        Ok(())
    }

    pub fn time(&mut self, timing: Timed, show: impl Fn(&str) -> Result<()>) -> Result<()> {
        if self.timings.last().is_none_or(|last| last.group != timing.group) {
            show(&format!("{}\n", timing.group))?;
        }
        let fraction = timing.fraction.map_or(String::new(), |fraction| format!("  {:>4.0} %", fraction * 100.0));
        show(&format!(
            "  {:<44} {:>9.1} us  {:>7.0} {}{fraction}\n",
            timing.name,
            timing.seconds * 1e6,
            timing.rate,
            timing.unit
        ))?;
        self.timings.push(timing);
        Ok(())
    }

    pub fn head(&self) -> String {
        let Some(device) = &self.device else { return String::new() };
        let gigabytes = |bytes: u64| bytes as f64 / 1e9;
        let (free, total) = (gigabytes(device.memory.0), gigabytes(device.memory.1));
        format!(
            "{}\n  memory    {total:.1} GB, {free:.1} free\n  kernels   {}; loaded in {:.2} s\n  cuBLASLt  {}\nchecks\n",
            device.name, device.compiler, device.start, device.library
        )
    }

    pub fn foot(&self) -> String {
        let checks: usize = self.checks.iter().map(|check| check.count).sum();
        let wrong: usize = self.checks.iter().map(|check| check.failed.len()).sum();
        let mut foot = match wrong {
            _ if checks == 0 => "nothing was checked".to_owned(),
            0 => format!("{checks} checks, all right"),
            wrong => format!("{checks} checks, {wrong} WRONG"),
        };
        if !self.skipped.is_empty() {
            foot += &format!("; not checked: {}", self.skipped.len());
        }
        foot + "\n"
    }

    pub fn json(&self) -> Value {
        let device = self.device.as_ref().map(|device| {
            json!({
                "name": device.name,
                "memory_free": device.memory.0,
                "memory_total": device.memory.1,
                "start_seconds": device.start,
                "kernels": device.compiler,
                "cublaslt": device.library,
            })
        });
        let checks = self.checks.iter().map(|check| {
            json!({
                "name": check.name,
                "checks": check.count,
                "failed": check.failed,
                "differs": check.differs,
                "seconds": check.seconds,
            })
        });
        let skipped = self.skipped.iter().map(|(name, reason)| json!({"name": name, "reason": reason}));
        let nothing = self.error.is_none() && self.checks.is_empty();
        let timings = self.timings.iter().map(|timing| {
            json!({
                "group": timing.group,
                "name": timing.name,
                "seconds": timing.seconds,
                "rate": timing.rate,
                "unit": timing.unit,
                "fraction": timing.fraction,
            })
        });
        json!({
            "passed": if nothing { Value::Null } else { self.passed().into() },
            "error": self.error,
            "device": device,
            "checks": checks.collect::<Vec<_>>(),
            "not_checked": skipped.collect::<Vec<_>>(),
            "timings": timings.collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wrong_check_or_an_error_fails_the_whole() {
        let check = |failed: &[&str]| Checked {
            name: "rows".into(),
            count: 3,
            failed: failed.iter().map(|text| (*text).to_owned()).collect(),
            differs: Vec::new(),
            seconds: 0.1,
        };
        let mut report = Report::default();
        report.add(check(&[]), |_| Ok(())).unwrap();
        assert!(report.passed() && report.json()["passed"] == true && report.foot() == "3 checks, all right\n");
        let failed = Report { error: Some("no GPU".into()), ..report.clone() };
        assert!(!failed.passed() && failed.json()["error"] == "no GPU");
        let mut lines = std::cell::RefCell::new(String::new());
        report
            .add(check(&["rope: 1.0 > 0.1"]), |text| {
                lines.borrow_mut().push_str(text);
                Ok(())
            })
            .unwrap();
        assert!(!report.passed() && report.json()["checks"][1]["failed"][0] == "rope: 1.0 > 0.1");
        assert!(lines.get_mut().contains("1 WRONG\n    rope: 1.0 > 0.1\n"));
        assert_eq!(report.foot(), "6 checks, 1 WRONG\n");
    }

    #[test]
    fn what_differs_or_is_not_checked_is_told_and_is_no_error() {
        let lines = std::cell::RefCell::new(String::new());
        let show = |text: &str| {
            lines.borrow_mut().push_str(text);
            Ok(())
        };
        let mut report = Report::default();
        assert!(report.passed() && report.json()["passed"].is_null() && report.foot() == "nothing was checked\n");
        report.skip("cuBLASLt", "no such file".into(), show).unwrap();
        assert!(report.json()["passed"].is_null() && report.json()["not_checked"][0]["reason"] == "no such file");
        assert_eq!(report.foot(), "nothing was checked; not checked: 1\n");
        let answers = Checked {
            name: "answers".into(),
            count: 16,
            failed: Vec::new(),
            differs: vec!["red or orange".into()],
            seconds: 0.1,
        };
        report.add(answers, show).unwrap();
        assert!(report.passed() && report.json()["passed"] == true);
        assert_eq!(report.json()["checks"][0]["differs"][0], "red or orange");
        assert_eq!(report.foot(), "16 checks, all right; not checked: 1\n");
        let lines = lines.into_inner();
        assert!(lines.starts_with("  cuBLASLt: not checked: no such file\n"), "{lines}");
        assert!(lines.ends_with("right, 1 differ\n    differs: red or orange\n"), "{lines}");
    }
}
