//! Filters, each run in a process of its own kind: this program again, as `restcast filter`.
//!
//! A jq program may take for ever, all memory or all stack, and nothing in this process could stop it. So it is run in
//! another: one that can open no file, has a bounded address space, none of our environment, and is ended when a run takes
//! too long. What ends there is a poll that has failed, and the next one has a new process.
//!
//! Source: `stream::filter`; getrlimit(2). Memory: a body and what is made of it, for each of `FILTER_PROCESSES`.
//! Errors: [`FilterFault`]. Not here: the language.
//!
//! Between the two: a head of three little-endian numbers (bytes of the program, of the body, and at most of the answer),
//! the program, the body; back a byte (0, or 1 and up: the place of a fault) and the number of the bytes that follow.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::limits::{
    FILTER_BYTES_MAX, FILTER_MEMORY_BYTES_MAX, FILTER_PROGRAMS_MAX, FILTER_RETIRE_BYTES, FILTER_STACK_BYTES,
    FILTER_TIME_GRACE, FILTER_TIME_MAX,
};
use crate::stream::filter::{Filter, FilterFault, Program};

use super::clock;

/// The argument by which this program is started as such a process.
pub const COMMAND: &str = "filter";

const HEAD_BYTES: usize = 24;
const ANSWER_HEAD_BYTES: usize = 9;
/// Bytes that are read from the process at once.
const READ_BYTES: usize = 64 << 10;

/// A process that filters, started when it is needed and again after it has ended.
#[derive(Debug, Default)]
pub struct Runner {
    process: Option<Process>,
}

#[derive(Debug)]
struct Process {
    child: Child,
    stdin: ChildStdin,
    stdout: ChildStdout,
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be in the middle of a run that has no end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Runner {
    /// What `filter` makes of `body`, at most `bytes_max` bytes.
    ///
    /// # Errors
    /// [`FilterFault`].
    pub fn run(&mut self, filter: &Filter, body: &[u8], bytes_max: u64) -> Result<Vec<u8>, FilterFault> {
        let process = match &mut self.process {
            Some(process) => process,
            None => self.process.insert(Process::start().map_err(|_| FilterFault::Unavailable)?),
        };
        let answer = process.ask(filter.as_str().as_bytes(), body, bytes_max);
        let handled = body.len() + answer.as_ref().map_or(0, Vec::len);
        let ended = matches!(answer, Err(FilterFault::Time | FilterFault::Memory | FilterFault::Unavailable));
        if ended || handled > FILTER_RETIRE_BYTES {
            self.process = None;
        }
        answer
    }
}

impl Process {
    fn start() -> io::Result<Process> {
        // Not by name: what stands at our path now may be another version.
        let mut command = Command::new("/proc/self/exe");
        command.arg(COMMAND).env_clear().current_dir("/");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (stdin, stdout) = pipes.ok_or_else(|| io::Error::other("the process has no pipes"))?;
        let process = Process { child, stdin, stdout };
        rustix::io::ioctl_fionbio(&process.stdin, true)?;
        rustix::io::ioctl_fionbio(&process.stdout, true)?;
        Ok(process)
    }

    /// Sends one order and waits for its answer, as long as a run may take.
    fn ask(&mut self, filter: &[u8], body: &[u8], bytes_max: u64) -> Result<Vec<u8>, FilterFault> {
        let mut order = Vec::with_capacity(HEAD_BYTES + filter.len() + body.len());
        for number in [filter.len() as u64, body.len() as u64, bytes_max] {
            order.extend_from_slice(&number.to_le_bytes());
        }
        order.extend_from_slice(filter);
        order.extend_from_slice(body);
        let deadline = clock::now().at + FILTER_TIME_MAX + FILTER_TIME_GRACE;
        let (mut sent, mut answer) = (0, Vec::new());
        let mut buffer = vec![0; READ_BYTES];
        loop {
            if let Some(whole) = whole(&answer) {
                return whole;
            }
            let left = deadline.since(clock::now().at);
            if left.is_zero() {
                return Err(FilterFault::Time);
            }
            let mut ready = [PollFd::new(&self.stdout, PollFlags::IN), PollFd::new(&self.stdin, PollFlags::OUT)];
            let (heard, _) = ready.split_at_mut(if sent < order.len() { 2 } else { 1 });
            match poll(heard, Timespec::try_from(left).ok().as_ref()) {
                Ok(0) | Err(rustix::io::Errno::INTR) => continue,
                Ok(_) => {}
                Err(_) => return Err(FilterFault::Unavailable),
            }
            match self.stdout.read(&mut buffer) {
                Ok(0) => return Err(FilterFault::Memory),
                Ok(read) => answer.extend_from_slice(buffer.get(..read).unwrap_or_default()),
                Err(error) if would_wait(&error) => {}
                Err(_) => return Err(FilterFault::Memory),
            }
            // It may answer before it has read all, and end.
            match self.stdin.write(order.get(sent..).unwrap_or_default()) {
                Ok(written) => sent += written,
                Err(error) if would_wait(&error) || error.kind() == io::ErrorKind::BrokenPipe => {}
                Err(_) => return Err(FilterFault::Unavailable),
            }
        }
    }
}

fn would_wait(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// The answer in `bytes`, once it is whole.
fn whole(bytes: &[u8]) -> Option<Result<Vec<u8>, FilterFault>> {
    let (head, text) = bytes.split_at_checked(ANSWER_HEAD_BYTES)?;
    let (&fault, length) = head.split_first()?;
    if fault > 0 {
        return Some(Err(*FilterFault::ALL.get(usize::from(fault) - 1).unwrap_or(&FilterFault::Unavailable)));
    }
    let length = usize::try_from(u64::from_le_bytes(length.try_into().ok()?)).ok()?;
    text.get(..length).map(|text| Ok(text.to_vec()))
}

/// One order, as the process reads it.
struct Order {
    filter: String,
    body: Vec<u8>,
    bytes_max: u64,
}

/// What the process itself does: orders in at standard input, answers out at standard output, until the input ends.
///
/// # Errors
/// Where it cannot be bounded, or its pipes break.
pub fn serve() -> io::Result<()> {
    bound(Resource::Core, 0)?;
    bound(Resource::As, FILTER_MEMORY_BYTES_MAX)?;
    let (orders, waiting) = channel::<Order>();
    let (answers, made) = channel();
    let thread = std::thread::Builder::new().name(COMMAND.to_owned()).stack_size(FILTER_STACK_BYTES);
    thread.spawn(move || {
        let mut programs: HashMap<String, Program> = HashMap::new();
        for order in waiting {
            if answers.send(run(&mut programs, &order)).is_err() {
                return;
            }
        }
    })?;
    // From here on nothing can be opened: neither a file nor a connection.
    bound(Resource::Nofile, 0)?;
    let (mut stdin, mut stdout) = (io::stdin().lock(), io::stdout().lock());
    while let Some(order) = read_order(&mut stdin)? {
        if orders.send(order).is_err() {
            return Ok(());
        }
        let (answer, ends) = match made.recv_timeout(FILTER_TIME_MAX) {
            Ok(answer) => (answer, false),
            Err(RecvTimeoutError::Timeout) => (Err(FilterFault::Time), true),
            // It has panicked.
            Err(RecvTimeoutError::Disconnected) => (Err(FilterFault::Failed), true),
        };
        write_answer(&mut stdout, &answer)?;
        if ends {
            return Ok(());
        }
    }
    Ok(())
}

fn bound(resource: Resource, most: u64) -> io::Result<()> {
    Ok(setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })?)
}

fn run(programs: &mut HashMap<String, Program>, order: &Order) -> Result<Vec<u8>, FilterFault> {
    if let Some(program) = programs.get(&order.filter) {
        return program.run(&order.body, order.bytes_max);
    }
    if programs.len() == FILTER_PROGRAMS_MAX {
        programs.clear();
    }
    // It was read when the configuration was.
    let program = Program::compile(&order.filter).map_err(|_| FilterFault::Failed)?;
    programs.entry(order.filter.clone()).or_insert(program).run(&order.body, order.bytes_max)
}

fn read_order(stdin: &mut impl Read) -> io::Result<Option<Order>> {
    let mut head = [0; HEAD_BYTES];
    if let Err(error) = stdin.read_exact(&mut head) {
        return if error.kind() == io::ErrorKind::UnexpectedEof { Ok(None) } else { Err(error) };
    }
    let (numbers, _) = head.as_chunks::<8>();
    let [filter_bytes, body_bytes, bytes_max] = *numbers else { return Ok(None) };
    let [filter_bytes, body_bytes, bytes_max] = [filter_bytes, body_bytes, bytes_max].map(u64::from_le_bytes);
    let mut filter = String::new();
    stdin.by_ref().take(filter_bytes.min(FILTER_BYTES_MAX as u64)).read_to_string(&mut filter)?;
    let mut body = Vec::new();
    stdin.by_ref().take(body_bytes).read_to_end(&mut body)?;
    Ok((body.len() as u64 == body_bytes).then_some(Order { filter, body, bytes_max }))
}

fn write_answer(stdout: &mut impl Write, answer: &Result<Vec<u8>, FilterFault>) -> io::Result<()> {
    let (code, text) = match answer {
        Ok(text) => (0, &**text),
        Err(fault) => {
            let place = FilterFault::ALL.iter().position(|known| known == fault).unwrap_or_default();
            (u8::try_from(place + 1).unwrap_or(u8::MAX), &[][..])
        }
    };
    stdout.write_all(&[code])?;
    stdout.write_all(&(text.len() as u64).to_le_bytes())?;
    stdout.write_all(text)?;
    stdout.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_and_answers_read_back_as_they_were_written() {
        let mut order = Vec::new();
        for number in [1_u64, 2, 3] {
            order.extend_from_slice(&number.to_le_bytes());
        }
        order.extend_from_slice(b".[]");
        let read = read_order(&mut &order[..]).expect("it is read").expect("it is whole");
        assert_eq!((&*read.filter, &*read.body, read.bytes_max), (".", &b"[]"[..], 3));
        assert!(read_order(&mut &order[..26]).expect("it is read").is_none(), "half a body is none");
        assert!(read_order(&mut &b""[..]).expect("it is read").is_none());
        let answers = FilterFault::ALL.map(Err).into_iter().chain([Ok(Vec::new()), Ok(b"[1]".to_vec())]);
        for answer in answers {
            let mut written = Vec::new();
            write_answer(&mut written, &answer).expect("memory takes it");
            assert_eq!(whole(&written), Some(answer));
            assert_eq!(whole(&written[..written.len() - 1]), None);
        }
    }
}
