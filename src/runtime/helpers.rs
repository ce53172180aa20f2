//! Threads for what blocks, so that no core does: a bounded queue, a few threads, and of both a share for each who asks.
//!
//! Whoever asks for more than the share waits behind what that very asker has asked for, not in front of others: shares take
//! turns. Where the queue is full, the longest share gives way to a shorter one.
//!
//! Source: «On packet switches with infinite storage» (RFC 970) for the turns. Memory: [`Bounds::queue_max`] jobs, an entry for
//! each share that has one, [`Bounds::threads_max`] threads, which start as they are needed.
//! Errors: [`Busy`]. Not here: what the jobs are (`resolver`), who waits for them (`resolver::Flight`).

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::ids::Holder;

/// What a job takes up. Dropped undone, it tells those who wait for it by itself.
pub(super) type Job = Box<dyn FnOnce() + Send>;

/// Who asks; `None`: all who are not told apart.
pub(super) type Share = Option<Holder>;

/// How much is done at once, and how much waits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// What the threads are called.
    pub(super) name: &'static str,
    /// Threads.
    pub(super) threads_max: usize,
    /// Jobs that wait.
    pub(super) queue_max: usize,
    /// Jobs of one share that are under way.
    pub(super) share_threads_max: usize,
    /// Jobs of one share that wait.
    pub(super) share_queue_max: usize,
}

/// As many jobs wait as may, the helpers have ended, or no thread can be started. The job is dropped.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Busy;

/// Helper threads and what waits for them.
pub(super) struct Helpers {
    bounds: Bounds,
    work: Mutex<Work>,
    has_work: Condvar,
}

#[derive(Default)]
struct Work {
    /// Those who have something waiting or under way.
    shares: HashMap<Share, Part>,
    /// Those of them that have something waiting and may have more under way, each once, in the order of their turns.
    turns: VecDeque<Share>,
    /// Jobs that wait.
    waiting: usize,
    threads: usize,
    idle: usize,
    closed: bool,
}

#[derive(Default)]
struct Part {
    waiting: VecDeque<Job>,
    under_way: usize,
    has_turn: bool,
}

impl Helpers {
    /// Without a thread yet.
    pub(super) fn new(bounds: Bounds) -> Arc<Helpers> {
        Arc::new(Helpers { bounds, work: Mutex::default(), has_work: Condvar::new() })
    }

    /// Has `job` done in the turn of `share`.
    ///
    /// # Errors
    /// [`Busy`].
    pub(super) fn run(self: &Arc<Helpers>, share: Share, job: Job) -> Result<(), Busy> {
        let mut work = self.work();
        let own = work.shares.get(&share).map_or(0, |part| part.waiting.len());
        if work.closed || own >= self.bounds.share_queue_max {
            return Err(Busy);
        }
        let mut given_up = None;
        if work.waiting >= self.bounds.queue_max {
            given_up = Some(work.give_up_for(own).ok_or(Busy)?);
        }
        let is_first = work.threads == 0;
        if is_first && !self.start(&mut work) {
            return Err(Busy);
        }
        let part = work.shares.entry(share).or_default();
        part.waiting.push_back(job);
        work.waiting += 1;
        work.line_up(share, self.bounds.share_threads_max);
        if !is_first {
            self.wake(&mut work);
        }
        drop(work);
        drop(given_up); // Which tells those who wait for it.
        Ok(())
    }

    /// Ends: what has not begun is dropped, what is under way is the last.
    pub(super) fn close(&self) {
        let unstarted = {
            let mut work = self.work();
            work.closed = true;
            (work.waiting, work.turns) = (0, VecDeque::new());
            std::mem::take(&mut work.shares)
        };
        self.has_work.notify_all();
        drop(unstarted);
    }

    /// Sees to it that somebody takes the next turn, if there is one.
    fn wake(self: &Arc<Helpers>, work: &mut Work) {
        if work.turns.is_empty() {
            return;
        }
        if work.turns.len() > work.idle && work.threads < self.bounds.threads_max {
            // Fewer threads than wanted is slower, not wrong.
            self.start(work);
        }
        self.has_work.notify_one();
    }

    /// Starts one more thread; whether the system has one.
    fn start(self: &Arc<Helpers>, work: &mut Work) -> bool {
        let body = Arc::clone(self);
        let started = thread::Builder::new().name(self.bounds.name.to_owned()).spawn(move || body.serve()).is_ok();
        work.threads += usize::from(started);
        started
    }

    fn serve(self: Arc<Helpers>) {
        let mut work = self.work();
        while !work.closed {
            if let Some((share, job)) = work.next(self.bounds.share_threads_max) {
                // Whatever is left is for another thread, which may have to be started.
                self.wake(&mut work);
                drop(work);
                // A job that panics tells its waiters as it unwinds; the thread goes on.
                let _ = catch_unwind(AssertUnwindSafe(job));
                work = self.work();
                work.done(share, self.bounds.share_threads_max);
            } else {
                work.idle += 1;
                work = self.has_work.wait(work).unwrap_or_else(PoisonError::into_inner);
                work.idle -= 1;
            }
        }
    }

    /// A panic while this is held leaves nothing half done: each critical section is a few pushes and pops.
    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Jobs that wait, and threads.
    #[cfg(test)]
    pub(super) fn counts(&self) -> (usize, usize) {
        let work = self.work();
        (work.waiting, work.threads)
    }
}

impl Work {
    /// The next job, of whose turn it is.
    fn next(&mut self, share_threads_max: usize) -> Option<(Share, Job)> {
        let share = self.turns.pop_front()?;
        let part = self.shares.get_mut(&share)?;
        part.has_turn = false;
        let job = part.waiting.pop_front()?;
        part.under_way += 1;
        self.waiting -= 1;
        self.line_up(share, share_threads_max);
        Some((share, job))
    }

    /// A job of that share has ended.
    fn done(&mut self, share: Share, share_threads_max: usize) {
        let Some(part) = self.shares.get_mut(&share) else { return };
        part.under_way -= 1;
        if part.under_way == 0 && part.waiting.is_empty() {
            self.shares.remove(&share);
        }
        self.line_up(share, share_threads_max);
    }

    /// Puts a share at the end of the turns, if it is not among them and has something that may begin.
    fn line_up(&mut self, share: Share, share_threads_max: usize) {
        let Some(part) = self.shares.get_mut(&share) else { return };
        if !part.has_turn && !part.waiting.is_empty() && part.under_way < share_threads_max {
            part.has_turn = true;
            self.turns.push_back(share);
        }
    }

    /// The newest job of the longest share, taken out of the queue for a share of which only `own` wait; `None`: it is among
    /// the longest itself.
    fn give_up_for(&mut self, own: usize) -> Option<Job> {
        let (&longest, part) = self.shares.iter_mut().max_by_key(|(_, part)| part.waiting.len())?;
        if part.waiting.len() <= own + 1 {
            return None;
        }
        let job = part.waiting.pop_back();
        self.waiting -= usize::from(job.is_some());
        debug_assert!(self.shares.get(&longest).is_some_and(|part| !part.waiting.is_empty()));
        job
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Duration;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);
    const BOUNDS: Bounds =
        Bounds { name: "test", threads_max: 3, queue_max: 6, share_threads_max: 2, share_queue_max: 4 };

    fn share(of: u64) -> Share {
        Some(Holder::from_hash(of))
    }

    /// Jobs that tell when they begin, and end when they are let go.
    struct Stage {
        helpers: Arc<Helpers>,
        begun: (Sender<&'static str>, Receiver<&'static str>),
        dropped: (Sender<&'static str>, Receiver<&'static str>),
    }

    /// Tells when it is dropped, and whether it was run.
    struct Told(&'static str, Sender<&'static str>, bool);

    impl Drop for Told {
        fn drop(&mut self) {
            if !self.2 {
                let _ = self.1.send(self.0);
            }
        }
    }

    impl Stage {
        fn new(bounds: Bounds) -> Stage {
            Stage { helpers: Helpers::new(bounds), begun: channel(), dropped: channel() }
        }

        /// A job that goes on until what is returned is dropped.
        fn run(&self, of: u64, name: &'static str) -> Result<Sender<()>, Busy> {
            let (hold, held) = channel::<()>();
            let (begun, told) = (self.begun.0.clone(), Told(name, self.dropped.0.clone(), false));
            let job = move || {
                // The whole of it, which is dropped with the job.
                let mut told = told;
                told.2 = true;
                let _ = begun.send(name);
                let _ = held.recv();
            };
            self.helpers.run(share(of), Box::new(job)).map(|()| hold)
        }

        fn begins(&self) -> &'static str {
            self.begun.1.recv_timeout(PATIENCE).expect("a job begins")
        }

        fn is_quiet(&self) -> bool {
            self.begun.1.recv_timeout(Duration::from_millis(30)).is_err()
        }
    }

    #[test]
    fn one_who_asks_for_much_leaves_a_thread_to_others_and_takes_turns_with_them() {
        let stage = Stage::new(BOUNDS);
        let of = |share, name| stage.run(share, name).expect("there is room");
        let mut first: Vec<_> = ["a1", "a2", "a3", "a4"].map(|name| of(1, name)).into();
        let mut begun = [stage.begins(), stage.begins()];
        begun.sort_unstable();
        assert_eq!(begun, ["a1", "a2"]);
        assert!(stage.is_quiet(), "two of one share at once");
        let other = of(2, "b1");
        assert_eq!(stage.begins(), "b1", "at once, past those that wait");
        let last = of(2, "b2");
        assert!(stage.is_quiet(), "all threads are taken");
        assert_eq!(stage.helpers.counts(), (3, 3));
        drop(first.remove(0));
        assert_eq!(stage.begins(), "b2", "it is that share's turn, though the other has waited for longer");
        drop(other);
        assert_eq!(stage.begins(), "a3");
        drop((first, last));
        assert_eq!(stage.begins(), "a4");
    }

    #[test]
    fn as_many_wait_as_may_and_the_longest_share_gives_way() {
        let stage = Stage::new(BOUNDS);
        let held: Vec<_> = [(1, "a1"), (1, "a2"), (2, "b1")].map(|(of, name)| stage.run(of, name)).into();
        let mut begun: Vec<_> = (0..3).map(|_| stage.begins()).collect();
        begun.sort_unstable();
        assert_eq!(begun, ["a1", "a2", "b1"]);
        let waiting: Vec<_> = ["a3", "a4", "a5", "a6"].map(|name| stage.run(1, name)).into();
        assert!(held.iter().chain(&waiting).all(Result::is_ok));
        assert!(stage.run(1, "a7").is_err(), "its own bound");
        assert_eq!(stage.dropped.1.try_recv(), Ok("a7"));
        let more = [stage.run(2, "b2"), stage.run(2, "b3")];
        assert!(more.iter().all(Result::is_ok));
        assert_eq!(stage.helpers.counts().0, BOUNDS.queue_max);
        // Full: the share that has most waiting loses its newest, which is told.
        let third = stage.run(3, "c1");
        assert!(third.is_ok());
        assert_eq!(stage.dropped.1.try_recv(), Ok("a6"));
        let fourth = stage.run(4, "d1");
        assert!(fourth.is_ok());
        assert_eq!(stage.dropped.1.try_recv(), Ok("a5"));
        assert!(stage.run(2, "b4").is_err(), "it would be the longest itself");
        assert_eq!((stage.dropped.1.try_recv(), stage.helpers.counts().0), (Ok("b4"), BOUNDS.queue_max));
        assert!(stage.dropped.1.try_recv().is_err(), "and nobody else's was");
        drop((held, waiting, more, third, fourth));
        let mut rest: Vec<_> = (0..BOUNDS.queue_max).map(|_| stage.begins()).collect();
        rest.sort_unstable();
        assert_eq!(rest, ["a3", "a4", "b2", "b3", "c1", "d1"]);
    }

    #[test]
    fn a_panic_costs_one_job_and_what_has_not_begun_at_the_end_is_dropped() {
        let stage = Stage::new(Bounds { threads_max: 1, share_threads_max: 1, ..BOUNDS });
        stage.helpers.run(None, Box::new(|| panic!("a job with a defect"))).expect("there is room");
        let held = stage.run(1, "a1").expect("there is room");
        assert_eq!(stage.begins(), "a1", "the thread goes on");
        let waits = stage.run(1, "a2").expect("there is room");
        stage.helpers.close();
        assert_eq!(stage.dropped.1.try_recv(), Ok("a2"));
        assert!(stage.run(1, "a3").is_err());
        drop((held, waits));
        let weak = Arc::downgrade(&stage.helpers);
        drop(stage);
        let begun = super::super::clock::now().at;
        while weak.strong_count() > 0 {
            assert!(super::super::clock::now().at.since(begun) < PATIENCE, "a thread holds on to the helpers");
            thread::yield_now();
        }
    }

    #[test]
    fn nothing_is_left_behind_of_shares_that_have_nothing_to_do() {
        let stage = Stage::new(BOUNDS);
        for of in 0..20 {
            let held = stage.run(of, "a").expect("there is room");
            stage.begins();
            drop(held);
        }
        let begun = super::super::clock::now().at;
        while !stage.helpers.work().shares.is_empty() {
            assert!(super::super::clock::now().at.since(begun) < PATIENCE, "a share is left");
            thread::yield_now();
        }
        assert!(stage.helpers.work().turns.is_empty());
        assert!(stage.helpers.counts().1 <= BOUNDS.threads_max);
    }
}
