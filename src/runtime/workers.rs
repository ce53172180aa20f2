//! The worker pool for comparisons that would hold a core.
//!
//! Memory: at most two comparisons wait for each stream that is being polled, one of a body and one for views that are
//! watched anew; the stream itself bounds them. Errors:
//! a comparison that panics ends its worker's turn, and its stream is polled again after its time-out.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use crate::stream::Comparison;

use super::clock;
use super::mailbox::{Full, Mailbox, Message};

/// Threads that compare.
const WORKERS: usize = 2;

type Job = (Box<Comparison>, Arc<Mailbox>);

/// The pool. Its threads end when it is dropped.
#[derive(Debug)]
pub struct Workers {
    // Two jobs a stream at most, as a stream has one poll at most: the queue is bounded by `limits.streams`.
    jobs: Sender<Job>,
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
        Ok(Workers { jobs })
    }

    /// Carries out a comparison, and posts its result to `mailbox`.
    pub fn compare(&self, comparison: Box<Comparison>, mailbox: Arc<Mailbox>) {
        let _ = self.jobs.send((comparison, mailbox));
    }
}

fn work(waiting: &Mutex<Receiver<Job>>) {
    loop {
        let job = waiting.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((comparison, mailbox)) = job else { return };
        let compared = comparison.run_guarded();
        let mut message = Message::Compared(Box::new(compared));
        // The stream waits for it: it may come late, but must come.
        while let Err(Full(back)) = mailbox.post(message) {
            message = back;
            clock::hold_thread(std::time::Duration::from_millis(5));
        }
    }
}
