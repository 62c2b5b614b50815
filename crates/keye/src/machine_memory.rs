//! The memory that this process may use.

use std::fs;
use std::path::Path;

/// In bytes, where the system tells.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct MachineMemory {
    /// All of it: the machine's, or what its control group (of a container, of `MemoryMax`) may take.
    pub(crate) total: Option<u64>,
    /// What is free or can be freed: cached files can.
    pub(crate) available: Option<u64>,
}

impl MachineMemory {
    pub(crate) fn read() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        Self::of_machine(&read("/proc/meminfo")).within_groups(&read("/proc/self/cgroup"), Path::new("/sys/fs/cgroup"))
    }

    fn of_machine(meminfo: &str) -> Self {
        let field = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes.saturating_mul(1024))
        };
        Self { total: field("MemTotal:"), available: field("MemAvailable:") }
    }

    /// Cut to the limits of the process's control groups and the groups around them. `groups` is what `/proc/self/cgroup` says:
    /// lines of `number:controllers:/path`. Version 2 has no controllers there, and `memory.max` in the folder `/path` of
    /// `root`; version 1 has `memory.limit_in_bytes` in `root/memory/path`. Inside a container the path may be one that only
    /// the host has; then its own folder is `root` itself.
    fn within_groups(mut self, groups: &str, root: &Path) -> Self {
        for line in groups.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
            let (mount, limit, used) = match controllers {
                "" => (root.to_owned(), "memory.max", "anon "),
                names if names.split(',').any(|name| name == "memory") => {
                    (root.join("memory"), "memory.limit_in_bytes", "total_rss ")
                }
                _ => continue,
            };
            for folder in Path::new(path.trim_start_matches('/')).ancestors() {
                let folder = mount.join(folder);
                // A group without a limit says `max` or a number beyond every memory.
                let text = fs::read_to_string(folder.join(limit)).unwrap_or_default();
                let Ok(limit) = text.trim().parse::<u64>() else { continue };
                let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
                let used = stat.lines().find_map(|line| line.strip_prefix(used)?.trim().parse().ok()).unwrap_or(0);
                let least = |known: Option<u64>, bytes: u64| Some(known.map_or(bytes, |known| known.min(bytes)));
                self.total = least(self.total, limit);
                self.available = least(self.available, limit.saturating_sub(used));
            }
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "MemTotal:       24000 kB\nMemFree:         1000 kB\nMemAvailable:   20000 kB\n";

    fn write(root: &Path, files: &[(&str, &str)]) {
        for (name, text) in files {
            let path = root.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }

    #[test]
    fn without_groups_it_is_the_machines() {
        let root = tempfile::tempdir().unwrap();
        let machine = MachineMemory::of_machine(MEMINFO);
        assert_eq!(machine, MachineMemory { total: Some(24_576_000), available: Some(20_480_000) });
        write(root.path(), &[("a/memory.max", "max\n"), ("memory/b/memory.limit_in_bytes", "9223372036854771712\n")]);
        for groups in ["", "garbage", "0::/a", "4:memory:/b\n1:cpu:/b", "0::/no/such"] {
            assert_eq!(machine.within_groups(groups, root.path()), machine, "{groups}");
        }
        assert_eq!(MachineMemory::of_machine("nothing"), MachineMemory::default());
    }

    #[test]
    fn the_narrowest_group_counts_and_its_cached_files_are_free() {
        let root = tempfile::tempdir().unwrap();
        let machine = MachineMemory::of_machine(MEMINFO);
        let stat = "anon 3000000\nfile 90000000\n";
        write(root.path(), &[("a/b/memory.max", "16000000\n"), ("a/memory.max", "8000000\n"), ("a/memory.stat", stat)]);
        let cut = MachineMemory { total: Some(8_000_000), available: Some(5_000_000) };
        assert_eq!(machine.within_groups("0::/a/b", root.path()), cut);
        assert_eq!(MachineMemory::default().within_groups("0::/a/b", root.path()), cut);
        let old =
            [("memory/c/memory.limit_in_bytes", "7000000\n"), ("memory/c/memory.stat", "rss 1\ntotal_rss 1000000\n")];
        write(root.path(), &old);
        let cut = MachineMemory { total: Some(7_000_000), available: Some(6_000_000) };
        assert_eq!(machine.within_groups("5:cpu:/c\n4:hugetlb,memory:/c", root.path()), cut);
        // The host's path in a container that sees only its own folder.
        write(root.path(), &[("memory.max", "6000000\n")]);
        let cut = MachineMemory { total: Some(6_000_000), available: Some(6_000_000) };
        assert_eq!(machine.within_groups("0::/../host/only", root.path()), cut);
    }
}
