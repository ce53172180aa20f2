//! System calls without a safe wrapper elsewhere: the only file with `unsafe`.
//!
//! Source: pthread_sigmask(3), sigwait(3). Memory: none. Errors: the system's.

#![allow(unsafe_code, reason = "the one file where memory safety is argued by hand, call by call")]

use std::io;
use std::mem::MaybeUninit;

/// A signal the process reacts to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Signal {
    /// SIGTERM or SIGINT: drain and end; a second one ends at once.
    Terminate,
    /// SIGHUP: read the configuration again.
    Hangup,
}

fn watched() -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `sigemptyset` initialises the whole set it is given and cannot fail for a valid pointer; `sigaddset` is
    // called on the set so initialised, with valid signal numbers.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    }
}

/// Masks the signals that [`wait_for_signal`] waits for, in this thread and those it starts from now on. To be called
/// before any other thread is started.
///
/// # Errors
/// The system's; none is known.
pub fn mask_signals() -> io::Result<()> {
    let set = watched();
    // SAFETY: `set` is initialised and lives through the call; a null old set is allowed.
    let failed = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
    if failed == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(failed)) }
}

/// Waits for the next signal. To be called from a thread of its own, after [`mask_signals`].
pub fn wait_for_signal() -> Signal {
    let set = watched();
    loop {
        let mut signal = 0;
        // SAFETY: both pointers are to live, initialised values of the right types.
        let failed = unsafe { libc::sigwait(&set, &mut signal) };
        if failed == 0 {
            return if signal == libc::SIGHUP { Signal::Hangup } else { Signal::Terminate };
        }
    }
}
