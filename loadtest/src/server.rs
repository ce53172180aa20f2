//! What the server's processes and this machine cost, read from /proc.
//!
//! Source: proc(5). Memory: a few strings a sample. Errors: what cannot be read is `None`, not zero.

use std::fs;

/// One reading, of all processes together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    /// Resident memory.
    pub rss_bytes: u64,
    /// Proportional set size.
    pub pss_bytes: u64,
    /// CPU time of all tasks since their start, in nanoseconds.
    pub cpu_ns: u64,
    /// User time, in clock ticks of the kernel's interface.
    pub user_ticks: u64,
    /// System time, likewise.
    pub system_ticks: u64,
    /// Open descriptors.
    pub fds: u64,
    /// `Slab` of the machine: the sockets of both ends of a loopback connection are in it.
    pub slab_bytes: u64,
    /// Pages that TCP buffers of the machine take, in bytes.
    pub tcp_bytes: u64,
    /// TCP sockets of the machine in use.
    pub tcp_sockets: u64,
}

/// Reads everything of `pids` now; `None` where one of them is gone.
pub fn sample(pids: &[u32]) -> Option<Sample> {
    let mut all = Sample::default();
    for &pid in pids {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        all.rss_bytes += kib(&status, "VmRSS:").unwrap_or_default();
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        all.pss_bytes += kib(&rollup, "Pss:").unwrap_or_default();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (user, system) = times(&stat)?;
        all.user_ticks += user;
        all.system_ticks += system;
        // A tick is 10 ms: the fallback where the kernel keeps no schedstat.
        all.cpu_ns += tasks_ns(pid).unwrap_or((user + system) * 10_000_000);
        all.fds += descriptors(pid);
    }
    all.slab_bytes = kib(&fs::read_to_string("/proc/meminfo").unwrap_or_default(), "Slab:").unwrap_or_default();
    let sockets = fs::read_to_string("/proc/net/sockstat").unwrap_or_default();
    all.tcp_sockets = word_after(&sockets, "TCP:", "inuse").unwrap_or_default();
    all.tcp_bytes = word_after(&sockets, "TCP:", "mem").unwrap_or_default() * 4096;
    Some(all)
}

/// CPU time of the tasks of a process: the first number of each schedstat.
fn tasks_ns(pid: u32) -> Option<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task")).ok()? {
        // A task may end while its folder is read.
        let Ok(text) = fs::read_to_string(task.ok()?.path().join("schedstat")) else { continue };
        sum += text.split_whitespace().next()?.parse::<u64>().ok()?;
    }
    (sum > 0).then_some(sum)
}

/// How many descriptors are open: the size of the folder since Linux 6.2, before that its entries counted.
fn descriptors(pid: u32) -> u64 {
    let folder = format!("/proc/{pid}/fd");
    match fs::metadata(&folder).map_or(0, |folder| folder.len()) {
        0 => fs::read_dir(&folder).map_or(0, |fds| fds.count() as u64),
        size => size,
    }
}

/// The number in KiB behind `name`, in bytes.
fn kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok().map(|kib: u64| kib * 1024)
}

/// The number behind `word` in the line that starts with `line`.
fn word_after(text: &str, line: &str, word: &str) -> Option<u64> {
    let line = text.lines().find_map(|text| text.strip_prefix(line))?;
    line.split_whitespace().skip_while(|found| *found != word).nth(1)?.parse().ok()
}

/// User and system ticks of a `stat` line, whose second field may hold spaces and parentheses.
fn times(stat: &str) -> Option<(u64, u64)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_proc_are_read() {
        assert_eq!(kib("Rss:      12 kB\nPss:       7 kB\n", "Pss:"), Some(7168));
        assert_eq!(kib("", "Pss:"), None);
        let sockets = "sockets: used 5\nTCP: inuse 9 orphan 0 tw 3 alloc 9 mem 4\nUDP: inuse 1 mem 2\n";
        assert_eq!(word_after(sockets, "TCP:", "mem"), Some(4));
        assert_eq!(word_after(sockets, "TCP:", "nothing"), None);
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 100 0 0 0 42 17 0 0 20 0 1 0 5 6 7";
        assert_eq!(times(stat), Some((42, 17)));
    }

    #[test]
    fn this_process_can_be_read_and_one_that_is_gone_cannot() {
        let sample = sample(&[std::process::id()]).expect("it lives");
        assert!(sample.rss_bytes > 100_000 && sample.fds >= 3 && sample.cpu_ns > 0, "{sample:?}");
        assert_eq!(super::sample(&[u32::MAX]), None);
    }
}
