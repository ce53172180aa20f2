//! Places at the admin listener: so many connections are served at once, each on a thread of its own.
//!
//! Where all are taken, whoever has shown no key makes place for who comes, the one that has idled longest first: silent peers
//! keep nobody from asking whether the server is well. A call with the admin key keeps its place until it is answered.
//!
//! Memory: an entry for each connection. Errors: none. Not here: what is asked.

use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::time::Instant;

/// How long one that makes place may take to leave before another is told to go as well.
const LEAVE_TIME: Duration = Duration::from_millis(250);

/// The places, shared by the threads.
#[derive(Default)]
pub struct Places {
    taken: Mutex<Vec<Taken>>,
    left: Condvar,
}

struct Taken {
    socket: Arc<TcpStream>,
    /// Since when it can be told to go; `None`: a call with the key is under way, or it has been told.
    idle_since: Option<Instant>,
}

/// A place that is taken, until this is dropped.
pub struct Place {
    places: Arc<Places>,
    socket: Arc<TcpStream>,
}

impl Places {
    fn lock(&self) -> MutexGuard<'_, Vec<Taken>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place for a connection, of `most`. Where there is none, waits until somebody leaves.
    pub fn take(places: &Arc<Places>, socket: TcpStream, most: usize, now: impl Fn() -> Instant) -> Place {
        let socket = Arc::new(socket);
        let mut taken = places.lock();
        while taken.len() >= most {
            let idle = taken.iter_mut().filter(|one| one.idle_since.is_some());
            if let Some(oldest) = idle.min_by_key(|one| one.idle_since) {
                oldest.idle_since = None;
                let _ = oldest.socket.shutdown(Shutdown::Both);
            }
            taken = places.left.wait_timeout(taken, LEAVE_TIME).unwrap_or_else(PoisonError::into_inner).0;
        }
        taken.push(Taken { socket: Arc::clone(&socket), idle_since: Some(now()) });
        Place { places: Arc::clone(places), socket }
    }
}

impl Place {
    /// The connection.
    pub fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// It can be told to go again since then; `None`: it cannot.
    pub fn idles(&self, since: Option<Instant>) {
        let mut taken = self.places.lock();
        if let Some(own) = taken.iter_mut().find(|one| Arc::ptr_eq(&one.socket, &self.socket)) {
            own.idle_since = since;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.lock().retain(|one| !Arc::ptr_eq(&one.socket, &self.socket));
        self.places.left.notify_one();
    }
}
