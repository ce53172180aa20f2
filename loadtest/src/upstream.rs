//! `loadtest upstream`: a sample REST upstream whose values change on a schedule, and that notes when it is asked.
//!
//! What a resource holds is computed from the time of the request: the counter is how many intervals have passed, `ts` when
//! the last one did. So nothing has to be kept up to date, and ten thousand resources cost what one costs.
//!
//! Source: RFC 9112 and 9110 as far as polling needs them. Memory: at most [`CONNECTIONS_MAX`] connections of
//! [`HEAD_BYTES_MAX`] each, 24 bytes a resource, one body being written per connection. Errors: text for standard error;
//! a client's faults are answered and its connection closed.

use std::io::{self, Read as _, Write as _};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, accept_with, recv, send, sockopt};
use rustls::{ServerConfig, ServerConnection};
use serde_json::{Value, json};

use crate::cli::UpstreamOptions;
use crate::clock::wall_us;
use crate::histogram::Distribution;
use crate::tls;

/// Connections served at once; one more is closed.
const CONNECTIONS_MAX: usize = 10_000;
/// Of one request; more is answered 431.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// Bytes waiting for a client that does not read; past it it is closed.
const OUT_BYTES_MAX: usize = 256 << 20;
/// A gap between two polls that is this many intervals is a pause: nobody watched.
const PAUSE_INTERVALS: u64 = 10;
/// What stands for the listener among the events.
const LISTENER: u64 = u64::MAX;

/// Serves until a signal ends it.
///
/// # Errors
/// What keeps it from starting.
pub fn run(options: &UpstreamOptions) -> Result<(), String> {
    let ended = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&ended)).map_err(|error| error.to_string())?;
    }
    let config = tls_config(options)?;
    let listener = TcpListener::bind(options.listen).map_err(|error| format!("{}: {error}", options.listen))?;
    listener.set_nonblocking(true).map_err(|error| error.to_string())?;
    let address = listener.local_addr().map_err(|error| error.to_string())?;
    let scheme = if options.tls { "https" } else { "http" };
    let ready = json!({
        "ready": true,
        "listen": address.to_string(),
        "url": format!("{scheme}://{address}"),
        "streams": options.streams,
        "pid": std::process::id(),
        "ca": options.write_ca,
    });
    tell(&ready)?;
    let mut upstream = Upstream {
        resources: Resources::new(options, wall_us()),
        etag: options.etag,
        epoll: epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|error| error.to_string())?,
        config,
        clients: Vec::new(),
        free: Vec::new(),
        scratch: vec![0; 64 << 10],
    };
    let watched = epoll::add(&upstream.epoll, &listener, EventData::new_u64(LISTENER), EventFlags::IN);
    watched.map_err(|error| error.to_string())?;
    let mut events: Vec<epoll::Event> = Vec::with_capacity(256);
    let patience = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
    while !ended.load(Ordering::Relaxed) {
        events.clear();
        match epoll::wait(&upstream.epoll, spare_capacity(&mut events), Some(&patience)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.to_string()),
        }
        for event in &events {
            let (data, flags) = (event.data, event.flags);
            if data.u64() == LISTENER {
                upstream.accept(&listener);
            } else {
                upstream.happened(data.u64() as u32, (data.u64() >> 32) as u32, flags);
            }
        }
    }
    tell(&upstream.resources.stats())
}

fn tls_config(options: &UpstreamOptions) -> Result<Option<Arc<ServerConfig>>, String> {
    if !options.tls {
        return Ok(None);
    }
    if let (Some(cert), Some(key)) = (&options.cert, &options.key) {
        return tls::server_from_files(cert, key).map(Some);
    }
    let (config, pem) = tls::server_made_now()?;
    if let Some(path) = &options.write_ca {
        std::fs::write(path, pem).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(Some(config))
}

fn tell(line: &Value) -> Result<(), String> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(|error| error.to_string())
}

/// The values, and when they were asked for.
struct Resources {
    /// When all began.
    from_us: u64,
    interval_us: u64,
    burst: bool,
    bytes: usize,
    poll_us: u64,
    /// Of each: when it was last asked for; 0: never. And the earliest place in the polling interval so far.
    asked: Vec<(u64, u64)>,
    requests: u64,
    not_modified: u64,
    connections: u64,
    pauses: u64,
    /// How much more than the interval lay between two polls of the same.
    late: Distribution,
    /// How far a poll lay behind the earliest place at which the same was polled.
    late_in_phase: Distribution,
}

impl Resources {
    fn new(options: &UpstreamOptions, from_us: u64) -> Resources {
        Resources {
            from_us,
            interval_us: options.interval.as_micros() as u64,
            burst: options.burst,
            bytes: options.bytes,
            poll_us: (options.poll_interval.as_micros() as u64).max(1),
            asked: vec![(0, 0); options.streams as usize],
            requests: 0,
            not_modified: 0,
            connections: 0,
            pauses: 0,
            late: Distribution::new(3),
            late_in_phase: Distribution::new(3),
        }
    }

    /// Counter of a resource at a time, and when it last moved.
    fn state(&self, resource: usize, now_us: u64) -> (u64, u64) {
        if self.interval_us == 0 {
            return (0, self.from_us);
        }
        let spread = if self.burst { 0 } else { self.interval_us * resource as u64 / self.asked.len() as u64 };
        let passed = (now_us.saturating_sub(self.from_us) + self.interval_us).saturating_sub(spread);
        let counter = passed / self.interval_us;
        (counter, (self.from_us + spread + counter * self.interval_us).saturating_sub(self.interval_us))
    }

    /// Appends the body, padded to the asked length where it is shorter.
    fn body(&self, resource: usize, now_us: u64, out: &mut Vec<u8>) {
        let (counter, ts) = self.state(resource, now_us);
        let start = out.len();
        write!(out, r#"{{"id":{resource},"n":{counter},"ts":{ts},"pad":""#).expect("a Vec takes every write");
        let written = out.len() - start + 2;
        out.resize(out.len() + self.bytes.saturating_sub(written), b'x');
        out.extend_from_slice(b"\"}");
    }

    /// Notes a poll.
    fn asked(&mut self, resource: usize, now_us: u64) {
        self.requests += 1;
        let Some((last, phase)) = self.asked.get_mut(resource) else { return };
        let before = std::mem::replace(last, now_us);
        let gap = now_us.saturating_sub(before);
        if before == 0 || gap > self.poll_us * PAUSE_INTERVALS {
            self.pauses += u64::from(before != 0);
            // The first poll is at once; the next one shows the phase.
            *phase = 0;
            return;
        }
        self.late.record(gap.saturating_sub(self.poll_us));
        if *phase == 0 {
            *phase = now_us;
            return;
        }
        // The nearest place of the phase: behind it the poll is late; before it, the phase was learnt from a late one.
        let places = (now_us.saturating_sub(*phase) + self.poll_us / 2) / self.poll_us;
        let place = *phase + places * self.poll_us;
        *phase = place.min(now_us);
        self.late_in_phase.record(now_us.saturating_sub(place));
    }

    fn stats(&self) -> Value {
        json!({
            "requests": self.requests,
            "not_modified": self.not_modified,
            "connections": self.connections,
            "streams_asked": self.asked.iter().filter(|(last, _)| *last > 0).count(),
            "pauses": self.pauses,
            "poll_interval_us": self.poll_us,
            "late_us": self.late.summary(),
            "late_in_phase_us": self.late_in_phase.summary(),
        })
    }
}

/// A request, as far as it matters here.
#[derive(Debug, Eq, PartialEq)]
struct Request<'a> {
    method: &'a str,
    path: &'a str,
    if_none_match: Option<&'a str>,
    close: bool,
    /// Bytes of head and body.
    length: usize,
}

/// The request that `bytes` start with; `None` where it is not whole yet.
fn request(bytes: &[u8]) -> Result<Option<Request<'_>>, u16> {
    let Some(end) = memchr::memmem::find(bytes, b"\r\n\r\n") else {
        return if bytes.len() >= HEAD_BYTES_MAX { Err(431) } else { Ok(None) };
    };
    let text = std::str::from_utf8(&bytes[..end]).map_err(|_| 400u16)?;
    let mut lines = text.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ');
    let (Some(method), Some(target), Some("HTTP/1.1"), None) = (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(400);
    };
    let (mut if_none_match, mut close, mut body) = (None, false, 0);
    for line in lines {
        let (name, value) = line.split_once(':').ok_or(400u16)?;
        let value = value.trim();
        match name {
            _ if name.eq_ignore_ascii_case("if-none-match") => if_none_match = Some(value),
            _ if name.eq_ignore_ascii_case("connection") => close = value.eq_ignore_ascii_case("close"),
            _ if name.eq_ignore_ascii_case("content-length") => body = value.parse().map_err(|_| 400u16)?,
            _ if name.eq_ignore_ascii_case("transfer-encoding") => return Err(411),
            _ => {}
        }
    }
    if body > HEAD_BYTES_MAX {
        return Err(413);
    }
    let length = end + 4 + body;
    if bytes.len() < length {
        return Ok(None);
    }
    let path = target.split('?').next().unwrap_or_default();
    Ok(Some(Request { method, path, if_none_match, close, length }))
}

struct Client {
    socket: OwnedFd,
    tls: Option<Box<ServerConnection>>,
    partial: Vec<u8>,
    out: Vec<u8>,
    wants_out: bool,
    /// Nothing more is read; it is closed when all is written.
    closing: bool,
}

struct Upstream {
    resources: Resources,
    etag: bool,
    epoll: OwnedFd,
    config: Option<Arc<ServerConfig>>,
    clients: Vec<(u32, Option<Client>)>,
    free: Vec<u32>,
    scratch: Vec<u8>,
}

/// The connection is over.
struct Over;

impl Upstream {
    fn accept(&mut self, listener: &TcpListener) {
        // What is left comes with the next turn; without descriptors a pause keeps it from spinning.
        for _ in 0..64 {
            let socket = match accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok(socket) => socket,
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    std::thread::sleep(std::time::Duration::from_millis(20));
                    return;
                }
                Err(_) => return,
            };
            if self.clients.len() - self.free.len() >= CONNECTIONS_MAX {
                continue;
            }
            let tls = self.config.clone().map(ServerConnection::new).transpose();
            let (Ok(tls), Ok(())) = (tls, sockopt::set_tcp_nodelay(&socket, true)) else { continue };
            let index = self.free.pop().unwrap_or_else(|| {
                self.clients.push((0, None));
                self.clients.len() as u32 - 1
            });
            let (generation, place) = &mut self.clients[index as usize];
            let data = EventData::new_u64(u64::from(*generation) << 32 | u64::from(index));
            if epoll::add(&self.epoll, &socket, data, EventFlags::IN).is_err() {
                self.free.push(index);
                continue;
            }
            self.resources.connections += 1;
            *place = Some(Client {
                socket,
                tls: tls.map(Box::new),
                partial: Vec::new(),
                out: Vec::new(),
                wants_out: false,
                closing: false,
            });
        }
    }

    fn happened(&mut self, index: u32, generation: u32, flags: EventFlags) {
        let Some((known, place)) = self.clients.get_mut(index as usize) else { return };
        if *known != generation {
            return;
        }
        let Some(mut client) = place.take() else { return };
        if self.serve(&mut client, index, generation, flags).is_ok() {
            self.clients[index as usize].1 = Some(client);
        } else {
            self.clients[index as usize].0 = generation.wrapping_add(1);
            self.free.push(index);
        }
    }

    fn serve(&mut self, client: &mut Client, index: u32, generation: u32, flags: EventFlags) -> Result<(), Over> {
        if flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR) {
            self.read(client)?;
        }
        let done = flush(client)?;
        if done && client.closing {
            return Err(Over);
        }
        if client.wants_out == done {
            client.wants_out = !done;
            let out = if done { EventFlags::empty() } else { EventFlags::OUT };
            let data = EventData::new_u64(u64::from(generation) << 32 | u64::from(index));
            epoll::modify(&self.epoll, &client.socket, data, EventFlags::IN | out).map_err(|_| Over)?;
        }
        Ok(())
    }

    fn read(&mut self, client: &mut Client) -> Result<(), Over> {
        let received = match recv(&client.socket, &mut self.scratch[..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Err(Over),
            Ok((received, _)) => received,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(_) => return Err(Over),
        };
        let now_us = wall_us();
        match &mut client.tls {
            None => client.partial.extend_from_slice(&self.scratch[..received]),
            Some(tls) => {
                let mut input = &self.scratch[..received];
                while !input.is_empty() {
                    tls.read_tls(&mut input).map_err(|_| Over)?;
                    let ready = tls.process_new_packets().map_err(|_| Over)?.plaintext_bytes_to_read();
                    let start = client.partial.len();
                    client.partial.resize(start + ready, 0);
                    tls.reader().read_exact(&mut client.partial[start..]).map_err(|_| Over)?;
                }
            }
        }
        if client.closing {
            client.partial.clear();
            return Ok(());
        }
        let partial = std::mem::take(&mut client.partial);
        let mut start = 0;
        let mut answers = Vec::new();
        while !client.closing {
            match request(&partial[start..]) {
                Ok(None) => break,
                Ok(Some(request)) => {
                    start += request.length;
                    client.closing = request.close;
                    self.answer(&request, now_us, &mut answers);
                }
                Err(status) => {
                    client.closing = true;
                    plain(&mut answers, status, true);
                }
            }
        }
        client.partial = if start == partial.len() { Vec::new() } else { partial[start..].to_vec() };
        match &mut client.tls {
            None => client.out.extend_from_slice(&answers),
            Some(tls) => {
                tls.set_buffer_limit(None);
                tls.writer().write_all(&answers).map_err(|_| Over)?;
            }
        }
        if client.out.len() > OUT_BYTES_MAX { Err(Over) } else { Ok(()) }
    }

    fn answer(&mut self, request: &Request<'_>, now_us: u64, out: &mut Vec<u8>) {
        let with_body = request.method != "HEAD";
        let resource = request.path.strip_prefix('/').and_then(|name| name.parse::<usize>().ok());
        if !matches!(request.method, "GET" | "HEAD") {
            return plain(out, 405, request.close);
        }
        let mut body = Vec::new();
        let mut etag = String::new();
        match resource.filter(|resource| *resource < self.resources.asked.len()) {
            Some(resource) => {
                self.resources.asked(resource, now_us);
                if self.etag {
                    etag = format!("\"{resource}-{}\"", self.resources.state(resource, now_us).0);
                    if request.if_none_match == Some(&etag) {
                        self.resources.not_modified += 1;
                        write!(out, "HTTP/1.1 304 Not Modified\r\nETag: {etag}\r\n\r\n")
                            .expect("a Vec takes every write");
                        return;
                    }
                    etag = format!("ETag: {etag}\r\n");
                }
                self.resources.body(resource, now_us, &mut body);
            }
            None if request.path == "/stats" => body = self.resources.stats().to_string().into_bytes(),
            None => return plain(out, 404, request.close),
        }
        write!(out, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n{etag}Content-Length: {}\r\n", body.len())
            .expect("a Vec takes every write");
        out.extend_from_slice(if request.close { b"Connection: close\r\n\r\n" } else { b"\r\n" });
        if with_body {
            out.extend_from_slice(&body);
        }
    }
}

/// An answer without a body.
fn plain(out: &mut Vec<u8>, status: u16, close: bool) {
    let reason = match status {
        404 => "Not Found",
        405 => "Method Not Allowed",
        411 => "Length Required",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        _ => "Bad Request",
    };
    let (allow, end) =
        (if status == 405 { "Allow: GET, HEAD\r\n" } else { "" }, if close { "Connection: close\r\n" } else { "" });
    write!(out, "HTTP/1.1 {status} {reason}\r\n{allow}Content-Length: 0\r\n{end}\r\n")
        .expect("a Vec takes every write");
}

/// Writes what waits as far as the socket takes it; true when all is written.
fn flush(client: &mut Client) -> Result<bool, Over> {
    if let Some(tls) = &mut client.tls {
        while tls.wants_write() {
            tls.write_tls(&mut client.out).map_err(|_| Over)?;
        }
    }
    let mut sent = 0;
    while sent < client.out.len() {
        match send(&client.socket, &client.out[sent..], SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(length) => sent += length,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                client.out.drain(..sent);
                return Ok(false);
            }
            Err(_) => return Err(Over),
        }
    }
    client.out.clear();
    client.out.shrink_to(64 << 10);
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::time::Duration;

    use super::*;

    fn resources(streams: u32, interval_ms: u64, burst: bool, bytes: usize) -> Resources {
        let options = UpstreamOptions {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            streams,
            interval: Duration::from_millis(interval_ms),
            burst,
            bytes,
            etag: false,
            poll_interval: Duration::from_secs(1),
            tls: false,
            cert: None,
            key: None,
            write_ca: None,
        };
        Resources::new(&options, 1_000_000_000)
    }

    #[test]
    fn values_change_every_interval_spread_or_at_once() {
        let from = 1_000_000_000;
        let spread = resources(4, 200, false, 0);
        assert_eq!(spread.state(0, from), (1, from));
        assert_eq!(spread.state(0, from + 199_999), (1, from));
        assert_eq!(spread.state(0, from + 200_000), (2, from + 200_000));
        assert_eq!(spread.state(1, from + 49_999).0, 0);
        assert_eq!(spread.state(1, from + 50_000), (1, from + 50_000));
        assert_eq!(spread.state(3, from + 350_000), (2, from + 350_000));
        let burst = resources(4, 200, true, 0);
        assert!((0..4).all(|resource| burst.state(resource, from + 400_000) == (3, from + 400_000)));
        assert_eq!(resources(1, 0, false, 0).state(0, from + 5), (0, from), "it never changes");
    }

    #[test]
    fn bodies_are_json_of_the_asked_length() {
        for bytes in [0, 100, 128, 5000] {
            let resources = resources(10, 200, false, bytes);
            let mut body = Vec::new();
            resources.body(7, 1_000_300_000, &mut body);
            let value: Value = serde_json::from_slice(&body).expect("JSON");
            assert_eq!((&value["id"], &value["n"]), (&json!(7), &json!(1)));
            if bytes >= 100 {
                assert_eq!(body.len(), bytes);
            }
        }
    }

    #[test]
    fn late_polls_are_told_from_those_in_time() {
        let mut resources = resources(2, 200, false, 0);
        let second = 1_000_000;
        // The first at once, then a phase; one comes 30 ms late, the next in its place again.
        for at in [5_000_000, 5_400_000, 6_400_000, 7_430_000, 8_400_000] {
            resources.asked(0, at);
        }
        let stats = resources.stats();
        assert_eq!((stats["requests"].as_u64(), stats["late_us"]["count"].as_u64()), (Some(5), Some(4)));
        assert_eq!(resources.late.max().map(|late| late / 1000), Some(30));
        assert_eq!(resources.late_in_phase.max().map(|late| late / 1000), Some(30));
        assert_eq!(resources.late_in_phase.quantile(0.5), Some(0));
        resources.asked(0, 8_400_000 + 11 * second);
        assert_eq!(resources.stats()["pauses"], 1);
        // A phase that was learnt from a late poll is corrected by one in time.
        for at in [5_000_000, 6_050_000, 7_000_000, 8_001_000] {
            resources.asked(1, at);
        }
        assert_eq!(resources.late_in_phase.max().map(|late| late / 1000), Some(30));
    }

    #[test]
    fn requests_cut_at_any_byte_wait_for_the_rest() {
        let wire = b"GET /7?x=1 HTTP/1.1\r\nHost: h\r\nIf-None-Match: \"7-1\"\r\nConnection: Close\r\nContent-Length: 2\r\n\r\nab";
        for cut in 0..wire.len() {
            assert_eq!(request(&wire[..cut]), Ok(None), "cut at {cut}");
        }
        let read = request(wire).expect("HTTP").expect("whole");
        let expected =
            Request { method: "GET", path: "/7", if_none_match: Some("\"7-1\""), close: true, length: wire.len() };
        assert_eq!(read, expected);
    }

    #[test]
    fn what_is_no_request_is_refused() {
        let check = |wire: &[u8], status| assert_eq!(request(wire), Err(status));
        check(b"GET /\r\n\r\n", 400);
        check(b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400);
        check(b"\xff\r\n\r\n", 400);
        check(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 411);
        check(b"POST / HTTP/1.1\r\nContent-Length: 99999\r\n\r\n", 413);
        check(&[b'x'; HEAD_BYTES_MAX], 431);
    }
}
