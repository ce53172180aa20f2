//! Listening sockets: one a core on the same port, so that the kernel spreads connections.
//!
//! Source: socket(7), tcp(7). Memory: the kernel's. Errors: say which address and why.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};

/// Connections that may wait to be accepted, as far as `net.core.somaxconn` lets them.
const BACKLOG: i32 = 4096;
/// Send buffer of a connection: large enough for a burst, small enough for a million.
const SEND_BUFFER_BYTES: usize = 64 << 10;
/// How long the kernel goes on sending to a peer that acknowledges nothing, at the least.
const USER_TIMEOUT: Duration = Duration::from_secs(30);
/// How much longer it does than a socket may take nothing: it counts from a closed window on, which is before our socket is
/// full, and what it ends has no close code.
const USER_TIMEOUT_SLACK: Duration = Duration::from_secs(10);

/// The most that the kernel takes for it: 24 days.
const USER_TIMEOUT_MAX: Duration = Duration::from_millis(i32::MAX as u64);

/// Listens on `address`; accepted connections inherit their options from the listener.
///
/// # Errors
/// The system's, with what was tried.
pub fn listen(address: SocketAddr, shared: bool) -> io::Result<TcpListener> {
    let explained = |error: io::Error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}"));
    let open = || -> io::Result<TcpListener> {
        let socket =
            Socket::new(Domain::for_address(address), Type::STREAM.cloexec().nonblocking(), Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        if shared {
            socket.set_reuse_port(true)?;
        }
        if address.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        socket.set_send_buffer_size(SEND_BUFFER_BYTES)?;
        socket.set_tcp_nodelay(true)?;
        socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
        socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(Duration::from_secs(60)))?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    };
    open().map_err(explained)
}

/// How long the kernel goes on sending to a client that acknowledges nothing, or takes nothing, where `limits.write_stall`
/// is `write_stall`: longer, so that it is the shard that ends a reader which has stopped.
pub fn user_timeout(write_stall: Duration) -> Duration {
    USER_TIMEOUT.max(write_stall.saturating_add(USER_TIMEOUT_SLACK)).min(USER_TIMEOUT_MAX)
}

/// Sets that for one connection.
pub fn set_user_timeout(socket: &impl std::os::fd::AsFd, timeout: Duration) {
    // Where it fails it stays what the listener has given it, and the kernel ends some readers earlier.
    let _ = SockRef::from(socket).set_tcp_user_timeout(Some(timeout));
}

/// Makes closing the socket reset the connection.
pub fn reset_on_close(socket: &impl std::os::fd::AsFd) {
    // Where it fails the connection is closed in order instead, which is no harm.
    let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
}
