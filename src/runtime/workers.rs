//! The worker pool for what would hold a core: comparisons of large values, large answers to actions. Comparisons of streams
//! with a filter have threads of their own, so that a filter that takes long holds up nobody else's.
//!
//! Memory: at most two comparisons wait for each stream that is being polled, one of a body and one for views that are
//! watched anew, and one answer for each action that is under way; those bound them. Errors: work that panics is a poll or
//! an action that has failed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use crate::limits::FILTER_PROCESSES;
use crate::stream::Comparison;
use crate::stream::action::Options;
use crate::stream::poll::{FetchError, FetchResponse, UpstreamCode};

use super::clock;
use super::filters::Runner;
use super::mailbox::{Full, Mailbox, Message};

/// Threads that work.
const WORKERS: usize = 2;

type Job = (Work, Arc<Mailbox>);

#[derive(Debug)]
enum Work {
    Compare(Box<Comparison>),
    Answer { ask: u64, options: Arc<Options>, response: FetchResponse },
}

/// The pool. Its threads end when it is dropped.
#[derive(Debug)]
pub struct Workers {
    // Two jobs a stream at most, as a stream has one poll at most, and one an action: the queue is bounded by
    // `limits.streams` and `limits::ACTIONS_PER_CORE_MAX`.
    jobs: Sender<Job>,
    filters: Sender<Job>,
}

impl Workers {
    /// Starts the threads.
    ///
    /// # Errors
    /// Where the system has no thread left.
    pub fn start() -> std::io::Result<Workers> {
        let (jobs, waiting) = channel::<Job>();
        let waiting = Arc::new(Mutex::new(waiting));
        for number in 0..WORKERS {
            let waiting = Arc::clone(&waiting);
            std::thread::Builder::new().name(format!("compare-{number}")).spawn(move || work(&waiting))?;
        }
        let (filters, waiting) = channel::<Job>();
        let waiting = Arc::new(Mutex::new(waiting));
        for number in 0..FILTER_PROCESSES {
            let waiting = Arc::clone(&waiting);
            std::thread::Builder::new().name(format!("filter-{number}")).spawn(move || work(&waiting))?;
        }
        Ok(Workers { jobs, filters })
    }

    /// Carries out a comparison, and posts its result to `mailbox`.
    pub fn compare(&self, comparison: Box<Comparison>, mailbox: Arc<Mailbox>) {
        let jobs = if comparison.is_filtered() { &self.filters } else { &self.jobs };
        let _ = jobs.send((Work::Compare(comparison), mailbox));
    }

    /// Makes an answer of an action's response, and posts it to `mailbox`.
    pub fn answer(&self, ask: u64, options: Arc<Options>, response: FetchResponse, mailbox: Arc<Mailbox>) {
        let _ = self.jobs.send((Work::Answer { ask, options, response }, mailbox));
    }
}

fn work(waiting: &Mutex<Receiver<Job>>) {
    let mut filters = Runner::default();
    loop {
        let job = waiting.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((work, mailbox)) = job else { return };
        let mut message = match work {
            Work::Compare(mut comparison) => {
                comparison.filter(|filter, body, bytes_max| filters.run(filter, body, bytes_max));
                Message::Compared(Box::new(comparison.run_guarded()))
            }
            Work::Answer { ask, options, response } => {
                let answered = catch_unwind(AssertUnwindSafe(|| options.answer(response)));
                let detail = "a fault of the server ended the action";
                let fault = |_| FetchError { code: UpstreamCode::Protocol, detail: detail.to_owned() };
                Message::Acted { ask, result: answered.map_err(fault) }
            }
        };
        // Somebody waits for it: it may come late, but must come.
        while let Err(Full(back)) = mailbox.post(message) {
            message = back;
            clock::hold_thread(std::time::Duration::from_millis(5));
        }
    }
}
