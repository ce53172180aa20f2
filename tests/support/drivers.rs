//! Runs a test in the runtime, once with each of its drivers.

use std::thread;
use std::time::Duration;

use monoio::{IoUringDriver, LegacyDriver, RuntimeBuilder};

/// What waits for longer than this waits for ever.
const PATIENCE: Duration = Duration::from_secs(300);

/// Runs `test` over io_uring, where the kernel has it, and then over epoll; a panic's thread name says which it was.
pub fn on_each_driver(test: impl AsyncFn() + Send + Sync) {
    let test = &async || monoio::time::timeout(PATIENCE, test()).await.expect("a test does not hang");
    let run = |name: &str, body: &(dyn Fn() + Sync)| {
        thread::scope(|scope| {
            let thread = thread::Builder::new().name(name.to_owned()).spawn_scoped(scope, body).expect("a thread");
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        });
    };
    if monoio::utils::detect_uring() {
        run("io_uring", &|| {
            let mut runtime = RuntimeBuilder::<IoUringDriver>::new().enable_timer().build().expect("a ring");
            runtime.block_on(test());
        });
    }
    run("epoll", &|| {
        let mut runtime = RuntimeBuilder::<LegacyDriver>::new().enable_timer().build().expect("an epoll descriptor");
        runtime.block_on(test());
    });
}
