//! What the server's processes and this machine cost, read from /proc.
//!
//! Source: proc(5). Memory: a few strings a sample. Errors: what cannot be read is `None`, not zero.

use std::fs;

/// One reading, of all processes together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    /// Resident memory.
    pub rss_bytes: Option<u64>,
    /// Proportional set size.
    pub pss_bytes: Option<u64>,
    /// CPU time of all tasks since their start, in nanoseconds.
    pub cpu_ns: u64,
    /// User time, in clock ticks of the kernel's interface.
    pub user_ticks: u64,
    /// System time, likewise.
    pub system_ticks: u64,
    /// Open descriptors.
    pub fds: Option<u64>,
    /// `Slab` of the machine: the sockets of both ends of a loopback connection are in it.
    pub slab_bytes: Option<u64>,
    /// Pages that TCP buffers of the machine take, in bytes.
    pub tcp_bytes: Option<u64>,
    /// TCP sockets of the machine in use.
    pub tcp_sockets: Option<u64>,
}

impl Sample {
    /// What could not be read, by name.
    pub fn unread(&self) -> impl Iterator<Item = &'static str> {
        let figures = [
            ("RSS", self.rss_bytes),
            ("PSS", self.pss_bytes),
            ("the number of descriptors", self.fds),
            ("the machine's slab", self.slab_bytes),
            ("the machine's TCP buffers", self.tcp_bytes),
            ("the machine's TCP sockets", self.tcp_sockets),
        ];
        figures.into_iter().filter_map(|(name, figure)| figure.is_none().then_some(name))
    }
}

/// Reads everything of `pids` now; `None` where one of them is gone.
pub fn sample(pids: &[u32]) -> Option<Sample> {
    let mut all = Sample { rss_bytes: Some(0), pss_bytes: Some(0), fds: Some(0), ..Sample::default() };
    // What cannot be read of one process is not known of all.
    let plus = |sum: &mut Option<u64>, part: Option<u64>| *sum = sum.zip(part).map(|(sum, part)| sum + part);
    for &pid in pids {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        plus(&mut all.rss_bytes, kib(&status, "VmRSS:"));
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok();
        plus(&mut all.pss_bytes, rollup.and_then(|rollup| kib(&rollup, "Pss:")));
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (user, system) = times(&stat)?;
        all.user_ticks += user;
        all.system_ticks += system;
        // A tick is 10 ms: the fallback where the kernel keeps no schedstat.
        all.cpu_ns += tasks_ns(pid).unwrap_or((user + system) * 10_000_000);
        plus(&mut all.fds, descriptors(pid));
    }
    all.slab_bytes = fs::read_to_string("/proc/meminfo").ok().and_then(|text| kib(&text, "Slab:"));
    let sockets = fs::read_to_string("/proc/net/sockstat").ok();
    let of_tcp = |word: &str| sockets.as_deref().and_then(|text| word_after(text, "TCP:", word));
    all.tcp_sockets = of_tcp("inuse");
    all.tcp_bytes = of_tcp("mem").map(|pages| pages * 4096);
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
fn descriptors(pid: u32) -> Option<u64> {
    let folder = format!("/proc/{pid}/fd");
    match fs::metadata(&folder).ok()?.len() {
        0 => Some(fs::read_dir(&folder).ok()?.count() as u64),
        size => Some(size),
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
        assert!(sample.rss_bytes > Some(100_000) && sample.pss_bytes > Some(10_000), "{sample:?}");
        assert!(sample.fds >= Some(3) && sample.cpu_ns > 0, "{sample:?}");
        assert_eq!(sample.unread().count(), 0, "{sample:?}");
        assert_eq!(super::sample(&[u32::MAX]), None);
    }

    #[test]
    fn memory_that_cannot_be_read_is_not_zero() {
        // A process that has ended and was not waited for has a name and no memory.
        let mut ended = std::process::Command::new("true").spawn().expect("it starts");
        let state = |pid| fs::read_to_string(format!("/proc/{pid}/stat")).expect("it was not waited for");
        while !state(ended.id()).contains(") Z ") {
            std::thread::yield_now();
        }
        let sample = sample(&[std::process::id(), ended.id()]).expect("both are there");
        assert_eq!((sample.rss_bytes, sample.pss_bytes), (None, None));
        assert!(sample.unread().eq(["RSS", "PSS"]) || sample.fds.is_none(), "{sample:?}");
        ended.wait().expect("it ended");
    }
}
