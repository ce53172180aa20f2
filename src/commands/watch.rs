//! `restcast watch URL [--token T] [--sse]`: follows a stream in the terminal, one frame a line, until either side ends it.
//!
//! Source: protocol version 1, sections 1, 3 and 7; RFC 6455 by tungstenite, RFC 9112 and the event stream for `--sse`.
//! Memory: one frame at a time, at most 64 MiB.
//! Errors: a sentence for the person at the terminal that says what to do. It never holds the token or the URL's query.
//! Not here: reconnecting. The command shows what one connection sees, and on standard error why it ended; whoever wants to
//! follow on calls it again.

use std::fmt::Display;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::Value;
use tungstenite::client::IntoClientRequest;
use tungstenite::error::ProtocolError;
use tungstenite::http::HeaderValue;
use tungstenite::protocol::WebSocketConfig;
use tungstenite::{Error as WsError, HandshakeError, Message};
use url::{Host, Position, Url};

use crate::codec::message::CloseReason;
use crate::codec::sse;
use crate::limits::HEADERS_MAX;

/// Bytes of one frame at most: a value of the default `response_bytes_max`, with room.
const FRAME_BYTES_MAX: usize = 64 << 20;
/// Bytes of a response head, and of the body of a refusal.
const HEAD_BYTES_MAX: u64 = 64 << 10;
/// For each address of the host.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// For TLS and the answer to the request.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Follows the stream at `url` (`http`, `https`, `ws` or `wss`) and prints each frame to standard output, over WebSocket or,
/// with `sse`, as an event stream. `token` is sent as `Authorization: Bearer`.
///
/// Ends well when the server closes with a reason, told on standard error, or when standard output is closed; the error is a
/// sentence to print.
pub fn run(url: &str, token: Option<&str>, sse: bool) -> Result<(), String> {
    let target = Target::parse(url, sse)?;
    let token = token.map(bearer).transpose()?;
    if token.is_some() && !target.tls && !target.is_loopback() {
        eprintln!("restcast: {} is not TLS: the token crosses the network in the clear", target.authority());
    }
    let roots = if target.tls { system_roots()? } else { RootCertStore::empty() };
    match follow(&target, roots, token.as_deref(), &mut io::stdout().lock())? {
        Ended::Closed { code, reason } => eprintln!("restcast: {}", tell_close(code, &reason)),
        Ended::OutputClosed => {}
    }
    Ok(())
}

/// How a watch ended well.
#[derive(Debug, Eq, PartialEq)]
enum Ended {
    /// The server closed and said why; 1005 is a close without a code, as RFC 6455 section 7.1.5 has it.
    Closed { code: u16, reason: String },
    /// No one reads the output any more, as after `| head`.
    OutputClosed,
}

/// Where to connect and what to ask for.
struct Target {
    url: Url,
    tls: bool,
    sse: bool,
    port: u16,
}

impl Target {
    fn parse(url: &str, sse: bool) -> Result<Target, String> {
        let mut url = Url::parse(url).map_err(|error| {
            format!("the URL cannot be read ({error}); it looks like http://127.0.0.1:8080/v1/streams/leads")
        })?;
        let (tls, scheme) = match (url.scheme(), sse) {
            ("http" | "ws", false) => (false, "ws"),
            ("http" | "ws", true) => (false, "http"),
            ("https" | "wss", false) => (true, "wss"),
            ("https" | "wss", true) => (true, "https"),
            _ => return Err("the URL must begin with http://, https://, ws:// or wss://".to_owned()),
        };
        if !url.username().is_empty() || url.password().is_some() {
            return Err("the URL holds a user or password, which restcast does not read; use --token".to_owned());
        }
        url.set_fragment(None);
        url.set_scheme(scheme).map_err(|()| "the URL's scheme cannot be changed".to_owned())?;
        let port = url.port_or_known_default().ok_or("the URL has no port")?;
        Ok(Target { url, tls, sse, port })
    }

    /// Host and port, which may be shown: the path is the user's, and the query may hold a ticket.
    fn authority(&self) -> &str {
        &self.url[Position::BeforeHost..Position::AfterPort]
    }

    fn host(&self) -> Result<Host<&str>, String> {
        self.url.host().ok_or_else(|| "the URL has no host".to_owned())
    }

    fn is_loopback(&self) -> bool {
        match self.url.host() {
            Some(Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
            Some(Host::Ipv4(address)) => address.is_loopback(),
            Some(Host::Ipv6(address)) => address.is_loopback(),
            None => false,
        }
    }

    fn connect(&self, roots: RootCertStore) -> Result<Socket, String> {
        let unreachable = |error: io::Error| {
            format!(
                "cannot connect to {}: {error}; is the server running there, and is the port right?",
                self.authority()
            )
        };
        let (host, name) = match self.host()? {
            Host::Domain(host) => {
                let name = ServerName::try_from(host.to_owned());
                (host.to_owned(), name.map_err(|_| format!("{host} is not a name that can be looked up"))?)
            }
            Host::Ipv4(address) => (address.to_string(), ServerName::from(IpAddr::V4(address))),
            Host::Ipv6(address) => (address.to_string(), ServerName::from(IpAddr::V6(address))),
        };
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in (host.as_str(), self.port).to_socket_addrs().map_err(unreachable)? {
            match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
                Ok(tcp) => {
                    set_up(&tcp).map_err(unreachable)?;
                    return if self.tls { self.secure(tcp, name, roots) } else { Ok(Socket::Plain(tcp)) };
                }
                Err(error) => last = error,
            }
        }
        Err(unreachable(last))
    }

    /// Puts TLS around `tcp`, its handshake done: a certificate that is not trusted is told as such.
    fn secure(&self, mut tcp: TcpStream, name: ServerName<'static>, roots: RootCertStore) -> Result<Socket, String> {
        let refused = |error: &dyn Display| {
            let advice =
                "is it a TLS port, and its certificate one that this system trusts? SSL_CERT_FILE can name a CA";
            format!("no TLS with {}: {error}; {advice}", self.authority())
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| refused(&error))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let mut connection = ClientConnection::new(Arc::new(config), name).map_err(|error| refused(&error))?;
        while connection.is_handshaking() {
            connection.complete_io(&mut tcp).map_err(|error| refused(&error))?;
        }
        Ok(Socket::Tls(Box::new(StreamOwned::new(connection, tcp))))
    }
}

fn set_up(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    tcp.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    tcp.set_write_timeout(Some(ANSWER_TIMEOUT))
}

fn system_roots() -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        return Err("this system has no root certificates, which TLS needs; SSL_CERT_FILE can name some".to_owned());
    }
    Ok(roots)
}

/// A blocking byte stream, in TLS or not.
enum Socket {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Socket {
    /// How long a read may wait from now on; `None`: for ever.
    fn set_read_timeout(&self, timeout: Option<Duration>) -> Result<(), String> {
        let tcp = match self {
            Socket::Plain(tcp) => tcp,
            Socket::Tls(tls) => tls.get_ref(),
        };
        tcp.set_read_timeout(timeout).map_err(|error| format!("the socket's time-out cannot be set: {error}"))
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Plain(tcp) => tcp.read(buffer),
            Socket::Tls(tls) => tls.read(buffer),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Plain(tcp) => tcp.write(bytes),
            Socket::Tls(tls) => tls.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Socket::Plain(tcp) => tcp.flush(),
            Socket::Tls(tls) => tls.flush(),
        }
    }
}

/// The value of `Authorization`.
fn bearer(token: &str) -> Result<String, String> {
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("the token is empty or holds white space or characters that no header can carry".to_owned());
    }
    Ok(format!("Bearer {token}"))
}

fn follow(
    target: &Target,
    roots: RootCertStore,
    authorization: Option<&str>,
    out: &mut impl Write,
) -> Result<Ended, String> {
    let socket = target.connect(roots)?;
    if target.sse {
        follow_events(target, socket, authorization, out)
    } else {
        follow_websocket(target, socket, authorization, out)
    }
}

fn follow_websocket(
    target: &Target,
    socket: Socket,
    authorization: Option<&str>,
    out: &mut impl Write,
) -> Result<Ended, String> {
    let mut request = target.url.as_str().into_client_request().map_err(|error| format!("the URL: {error}"))?;
    if let Some(authorization) = authorization {
        let mut value = HeaderValue::from_str(authorization).map_err(|_| "the token cannot stand in a header")?;
        value.set_sensitive(true);
        request.headers_mut().insert("authorization", value);
    }
    let config =
        WebSocketConfig::default().max_message_size(Some(FRAME_BYTES_MAX)).max_frame_size(Some(FRAME_BYTES_MAX));
    let (mut ws, _) = match tungstenite::client::client_with_config(request, socket, Some(config)) {
        Ok(opened) => opened,
        Err(HandshakeError::Failure(WsError::Http(answer))) => {
            return Err(tell_refusal(answer.status().as_u16(), answer.body().as_deref().unwrap_or_default()));
        }
        Err(HandshakeError::Failure(error)) => return Err(tell_websocket_error(target, &error)),
        Err(HandshakeError::Interrupted(_)) => return Err(tell_silence(target)),
    };
    ws.get_ref().set_read_timeout(None)?;
    loop {
        match ws.read() {
            Ok(Message::Text(frame)) => {
                if !print_frame(out, &frame)? {
                    // Nothing is owed to a server whose answers no one reads.
                    return Ok(Ended::OutputClosed);
                }
                if let Some(patience) = patience(&frame) {
                    ws.get_ref().set_read_timeout(Some(patience))?;
                }
            }
            Ok(Message::Close(frame)) => {
                // The close is answered as far as the server still listens; it has said all it will.
                let _ = ws.flush();
                let (code, reason) = frame.map_or((1005, String::new()), |f| (f.code.into(), f.reason.to_string()));
                return Ok(Ended::Closed { code, reason });
            }
            Ok(Message::Binary(bytes)) => eprintln!("restcast: a binary message of {} bytes is not shown", bytes.len()),
            // tungstenite answers pings by itself.
            Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_)) => {}
            Err(WsError::Io(error)) if is_timeout(&error) => return Err(tell_silence(target)),
            Err(error) => return Err(tell_websocket_error(target, &error)),
        }
    }
}

fn follow_events(
    target: &Target,
    mut socket: Socket,
    authorization: Option<&str>,
    out: &mut impl Write,
) -> Result<Ended, String> {
    let broken = |error: io::Error| {
        if is_timeout(&error) {
            tell_silence(target)
        } else {
            format!("{} broke the connection: {error}", target.authority())
        }
    };
    let mut request = format!(
        "GET {} HTTP/1.1\r\nHost: {}\r\nAccept: text/event-stream\r\nCache-Control: no-cache\r\nConnection: close\r\n",
        &target.url[Position::BeforePath..],
        target.authority(),
    );
    if let Some(authorization) = authorization {
        request.push_str("Authorization: ");
        request.push_str(authorization);
        request.push_str("\r\n");
    }
    request.push_str("\r\n");
    socket.write_all(request.as_bytes()).and_then(|()| socket.flush()).map_err(broken)?;

    let mut body = Body::open(BufReader::with_capacity(64 << 10, socket), broken)?;
    body.reader.get_ref().set_read_timeout(None)?;
    let mut decoder = sse::Decoder::new(FRAME_BYTES_MAX);
    let mut closed = None;
    loop {
        let mut piece = body.piece().map_err(broken)?;
        if piece.is_empty() {
            return closed.ok_or_else(|| format!("{} ended the stream without saying why", target.authority()));
        }
        let read = piece.len();
        let mut new_patience = None;
        while let Some(event) = decoder.next(&mut piece).map_err(|error| error.to_string())? {
            if !print_frame(out, event.data)? {
                return Ok(Ended::OutputClosed);
            }
            match event.event {
                "welcome" => new_patience = patience(event.data),
                "close" => closed = Some(closed_by(event.data)),
                _ => {}
            }
        }
        body.consume(read);
        if let Some(patience) = new_patience {
            body.reader.get_ref().set_read_timeout(Some(patience))?;
        }
    }
}

/// How the end of a response body is told (RFC 9112 section 6.3).
enum Framing {
    Chunked,
    Counted,
    UntilClose,
}

/// The body of a response, in the pieces in which it arrives.
struct Body<R> {
    reader: BufReader<R>,
    framing: Framing,
    /// Bytes left of the chunk or of the counted body.
    left: u64,
    /// Whether a chunk's last byte was taken and its line end was not.
    chunk_ended: bool,
}

impl<R: Read> Body<R> {
    /// Reads the head; a response that is no event stream is an error to print.
    fn open(mut reader: BufReader<R>, broken: impl Fn(io::Error) -> String) -> Result<Body<R>, String> {
        let head = read_head(&mut reader).map_err(&broken)?;
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut response = httparse::Response::new(&mut headers);
        let not_http = || "the answer is not HTTP/1.1; is the URL a restcast server's?".to_owned();
        match response.parse(&head) {
            Ok(httparse::Status::Complete(_)) => {}
            Ok(httparse::Status::Partial) | Err(_) => return Err(not_http()),
        }
        let header = |name: &str| {
            let mut found = response.headers.iter().filter(|header| header.name.eq_ignore_ascii_case(name));
            found.next().and_then(|header| std::str::from_utf8(header.value).ok()).unwrap_or("")
        };
        let coded = header("transfer-encoding");
        let (framing, left) = match (coded, header("content-length")) {
            (coded, _) if coded.eq_ignore_ascii_case("chunked") => (Framing::Chunked, 0),
            ("", "") => (Framing::UntilClose, u64::MAX),
            ("", length) => (Framing::Counted, length.parse().map_err(|_| not_http())?),
            _ => return Err("the answer comes in a transfer coding that was not asked for".to_owned()),
        };
        let status = response.code.unwrap_or(0);
        let is_events = header("content-type").to_ascii_lowercase().starts_with("text/event-stream");
        let mut body = Body { reader, framing, left, chunk_ended: false };
        if status != 200 {
            return Err(tell_refusal(status, &body.beginning()));
        }
        if !is_events {
            return Err("the answer is not an event stream; is the URL a stream's, /v1/streams/…?".to_owned());
        }
        Ok(body)
    }

    /// What has arrived, waiting for some; empty at the end of the body. To be followed by `consume`.
    fn piece(&mut self) -> io::Result<&[u8]> {
        if std::mem::take(&mut self.chunk_ended) && !self.line()?.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a chunk does not end where it said"));
        }
        if matches!(self.framing, Framing::Chunked) && self.left == 0 {
            let mut line = self.line()?;
            line.extend_from_slice(b"\r\n");
            self.left = match httparse::parse_chunk_size(&line) {
                Ok(httparse::Status::Complete((_, size))) => size,
                _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "a chunk's size cannot be read")),
            };
            if self.left == 0 {
                self.framing = Framing::Counted;
            }
        }
        if self.left == 0 {
            return Ok(&[]);
        }
        let until_close = matches!(self.framing, Framing::UntilClose);
        let arrived = self.reader.fill_buf()?;
        if arrived.is_empty() && !until_close {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let wanted = usize::try_from(self.left).unwrap_or(usize::MAX).min(arrived.len());
        Ok(arrived.get(..wanted).unwrap_or_default())
    }

    fn consume(&mut self, bytes: usize) {
        self.reader.consume(bytes);
        if !matches!(self.framing, Framing::UntilClose) {
            self.left = self.left.saturating_sub(bytes as u64);
        }
        self.chunk_ended = matches!(self.framing, Framing::Chunked) && self.left == 0;
    }

    /// The next line, without its end.
    fn line(&mut self) -> io::Result<Vec<u8>> {
        let mut line = Vec::new();
        (&mut self.reader).take(HEAD_BYTES_MAX).read_until(b'\n', &mut line)?;
        if line.pop() != Some(b'\n') {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        Ok(line)
    }

    /// As much of the body as can be read, up to a bound: what a refusal says.
    fn beginning(&mut self) -> Vec<u8> {
        let mut beginning = Vec::new();
        while let Ok(piece) = self.piece()
            && !piece.is_empty()
            && beginning.len() as u64 <= HEAD_BYTES_MAX
        {
            let read = piece.len();
            beginning.extend_from_slice(piece);
            self.consume(read);
        }
        beginning
    }
}

/// A response's status line and headers, and the empty line after them; interim responses (RFC 9110 section 15.2) are skipped.
fn read_head(reader: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let mut bounded = reader.take(HEAD_BYTES_MAX);
    let mut head = Vec::new();
    loop {
        let start = head.len();
        if bounded.read_until(b'\n', &mut head)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if matches!(head.get(start..), Some(b"\r\n" | b"\n")) {
            if !head.starts_with(b"HTTP/1.1 1") {
                return Ok(head);
            }
            head.clear();
        }
    }
}

/// Prints a frame as one line; `false`: no one reads the output any more.
///
/// In JSON a line end outside strings is white space, and inside one it is escaped. So are other control characters here,
/// which in a terminal could do more than be seen.
fn print_frame(out: &mut impl Write, frame: &str) -> Result<bool, String> {
    let mut line = String::with_capacity(frame.len() + 1);
    for character in frame.chars() {
        match character {
            '\n' | '\r' | '\t' => line.push(' '),
            control if control.is_control() => line.push_str(&format!("\\u{:04x}", u32::from(control))),
            other => line.push(other),
        }
    }
    line.push('\n');
    match out.write_all(line.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(format!("standard output: {error}")),
    }
}

/// How long the server may be silent from now on, if `frame` is a `welcome` that tells its heartbeat.
fn patience(frame: &str) -> Option<Duration> {
    // Only a small frame can be one: a snapshot is not parsed for this.
    let welcome: Value = (frame.len() < 64 << 10).then(|| serde_json::from_str(frame).ok())??;
    let heartbeat_ms = welcome.get("heartbeat_ms")?.as_u64()?;
    let is_welcome = welcome.get("type")?.as_str()? == "welcome";
    // Two heartbeats, as the server has it for its clients, and time on the way; a day at most.
    is_welcome.then(|| Duration::from_millis(heartbeat_ms.saturating_mul(2).saturating_add(5_000).min(86_400_000)))
}

/// What a `close` event says.
fn closed_by(data: &str) -> Ended {
    let close: Value = serde_json::from_str(data).unwrap_or_default();
    let code = close.get("code").and_then(Value::as_u64).and_then(|code| u16::try_from(code).ok()).unwrap_or(1005);
    let reason = close.get("reason").and_then(Value::as_str).unwrap_or_default().to_owned();
    Ended::Closed { code, reason }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn tell_close(code: u16, reason: &str) -> String {
    let known = CloseReason::ALL.iter().find(|known| known.code() == code && known.reason() == reason);
    let reason: String = reason.chars().filter(|character| !character.is_control()).collect();
    match known {
        Some(known) => format!("closed {code} {reason}: {}", known.client_should()),
        None if reason.is_empty() => format!("closed {code}"),
        None => format!("closed {code} {reason}"),
    }
}

fn tell_silence(target: &Target) -> String {
    format!("{} has been silent for too long; the connection is given up", target.authority())
}

fn tell_websocket_error(target: &Target, error: &WsError) -> String {
    match error {
        WsError::Io(error) => format!("{} broke the connection: {error}", target.authority()),
        WsError::ConnectionClosed
        | WsError::AlreadyClosed
        | WsError::Protocol(ProtocolError::ResetWithoutClosingHandshake) => {
            format!("{} ended the connection without saying why", target.authority())
        }
        error => format!("{} does not speak WebSocket as expected: {error}", target.authority()),
    }
}

/// What a refused request means, with the problem document's code where there is one (RFC 9457).
fn tell_refusal(status: u16, body: &[u8]) -> String {
    let problem: Value = serde_json::from_slice(body).unwrap_or_default();
    let code = problem.get("code").and_then(Value::as_str).unwrap_or_default();
    let code: String = code.chars().filter(|c| c.is_ascii_uppercase() || *c == '_').take(64).collect();
    let space = if code.is_empty() { "" } else { " " };
    let advice = match status {
        401 => "present a valid credential with --token (`restcast token` mints one for development)",
        403 => "this credential may not watch the stream",
        404 => "there is no such stream here; look at the id in the URL",
        406 | 426 => "this path is no stream in the form asked for; try with or without --sse",
        429 => "too many connections or requests; try again later",
        503 => "the server has no room or is going away; try again in a moment",
        200..=299 => "the path exists but opens no stream; a stream's is /v1/streams/…",
        300..=399 => "redirects are not followed; use the URL it leads to",
        _ => "see the server's log",
    };
    format!("the server answered {status}{space}{code}: {advice}")
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread::{self, JoinHandle};

    use tungstenite::handshake::server::{Request, Response};
    use tungstenite::protocol::CloseFrame;

    use super::*;

    const WELCOME: &str = r#"{"type":"welcome","connection":"c_7","heartbeat_ms":25000}"#;

    /// A server for one connection; gives its port.
    fn serve(script: impl FnOnce(TcpStream) + Send + 'static) -> (u16, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let port = listener.local_addr().expect("it is bound").port();
        (port, thread::spawn(move || script(listener.accept().expect("the watch connects").0)))
    }

    /// A server that answers one request with `answer`, and gives back the request.
    fn serve_http(answer: String) -> (u16, JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let port = listener.local_addr().expect("it is bound").port();
        let server = thread::spawn(move || {
            let mut stream = listener.accept().expect("the watch connects").0;
            let request = read_head(&mut BufReader::new(&stream)).expect("a request");
            stream.write_all(answer.as_bytes()).expect("the watch reads");
            String::from_utf8(request).expect("ASCII")
        });
        (port, server)
    }

    fn watch(port: u16, token: Option<&str>, sse: bool) -> (Result<Ended, String>, String) {
        let url = format!("http://127.0.0.1:{port}/v1/streams/leads?since=a-1");
        watch_url(&url, RootCertStore::empty(), token, sse)
    }

    fn watch_url(url: &str, roots: RootCertStore, token: Option<&str>, sse: bool) -> (Result<Ended, String>, String) {
        let mut out = Vec::new();
        let target = Target::parse(url, sse).expect("a URL");
        let token = token.map(|token| bearer(token).expect("a token"));
        let ended = follow(&target, roots, token.as_deref(), &mut out);
        (ended, String::from_utf8(out).expect("UTF-8"))
    }

    fn closed(code: u16, reason: &str) -> Result<Ended, String> {
        Ok(Ended::Closed { code, reason: reason.to_owned() })
    }

    #[test]
    fn a_websocket_is_followed_to_its_close() {
        let (port, server) = serve(|stream| {
            #[expect(clippy::result_large_err, reason = "the callback's type is tungstenite's")]
            let look = |request: &Request, answer: Response| {
                assert_eq!(request.uri().to_string(), "/v1/streams/leads?since=a-1", "the token is not in the URL");
                assert_eq!(request.headers()["authorization"], "Bearer a.b.c");
                Ok(answer)
            };
            let mut ws = tungstenite::accept_hdr(stream, look).expect("a handshake");
            ws.send(Message::text(WELCOME)).expect("the watch reads");
            ws.send(Message::Ping(b"there?".to_vec().into())).expect("the watch reads");
            assert_eq!(ws.read().expect("a pong"), Message::Pong(b"there?".to_vec().into()));
            ws.send(Message::text("{\n\"a\":\"\u{7f}\u{9b}é\"}")).expect("the watch reads");
            let frame = CloseFrame { code: 4001.into(), reason: "token_expired".into() };
            ws.close(Some(frame)).expect("it is open");
            while ws.read().is_ok() {}
        });
        let (ended, out) = watch(port, Some("a.b.c"), false);
        server.join().expect("the server is content");
        assert_eq!(ended, closed(4001, "token_expired"));
        assert_eq!(out, format!("{WELCOME}\n{{ \"a\":\"\\u007f\\u009bé\"}}\n"));
    }

    #[test]
    fn a_websocket_that_breaks_is_an_error() {
        let (port, server) = serve(|stream| drop(tungstenite::accept(stream).expect("a handshake")));
        let (ended, _) = watch(port, None, false);
        server.join().expect("the server is content");
        assert!(ended.expect_err("no close frame").contains("connection"));
    }

    #[test]
    fn a_refusal_says_what_to_do() {
        let body = r#"{"type":"about:blank","status":401,"code":"INVALID_TOKEN"}"#;
        let answer = format!(
            "HTTP/1.1 401 Unauthorized\r\nContent-Type: application/problem+json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        for sse in [false, true] {
            let (port, server) = serve_http(answer.clone());
            let (ended, out) = watch(port, Some("hunter2"), sse);
            server.join().expect("the server is content");
            let error = ended.expect_err("401");
            assert!(error.starts_with("the server answered 401 INVALID_TOKEN: present"), "{error}");
            assert!(out.is_empty() && !error.contains("hunter2"));
        }
    }

    const EVENTS: &str = "event: welcome\ndata: {\"type\":\"welcome\",\"heartbeat_ms\":25000}\n\n:\n\nevent: close\ndata: \
        {\"type\":\"close\",\"code\":1012,\"reason\":\"draining\"}\n\n";
    const EVENTS_SHOWN: &str =
        "{\"type\":\"welcome\",\"heartbeat_ms\":25000}\n{\"type\":\"close\",\"code\":1012,\"reason\":\"draining\"}\n";

    #[test]
    fn events_are_followed_however_the_body_is_framed() {
        let mut chunked = String::from("Transfer-Encoding: chunked\r\n\r\n");
        for piece in EVENTS.as_bytes().chunks(7) {
            let piece = std::str::from_utf8(piece).expect("ASCII");
            chunked.push_str(&format!("{:x};ext=1\r\n{piece}\r\n", piece.len()));
        }
        chunked.push_str("0\r\n\r\n");
        let counted = format!("Content-Length: {}\r\n\r\n{EVENTS}", EVENTS.len());
        for framed in [chunked, counted, format!("\r\n{EVENTS}")] {
            let head =
                "HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n";
            let (port, server) = serve_http(format!("{head}{framed}"));
            let (ended, out) = watch(port, Some("a.b.c"), true);
            let request = server.join().expect("the server is content");
            assert_eq!(ended, closed(1012, "draining"));
            assert_eq!(out, EVENTS_SHOWN);
            assert!(request.starts_with("GET /v1/streams/leads?since=a-1 HTTP/1.1\r\n"), "{request}");
            assert!(request.contains(&format!("\r\nHost: 127.0.0.1:{port}\r\n")));
            assert!(request.contains("\r\nAuthorization: Bearer a.b.c\r\n"));
        }
    }

    #[test]
    fn a_body_that_is_cut_short_or_no_event_stream_is_an_error() {
        let cases = [
            ("Content-Type: text/event-stream\r\n\r\ndata: a\n\n", "without saying why"),
            ("Content-Type: text/event-stream\r\nContent-Length: 100\r\n\r\ndata: a\n\n", "broke the connection"),
            ("Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndata", "broke the connection"),
            (
                "Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n1\r\ndata\n",
                "a chunk does not end",
            ),
            ("Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", "a chunk's size"),
            ("Content-Type: text/event-stream\r\nTransfer-Encoding: gzip\r\n\r\n", "not asked for"),
            ("Content-Type: application/json\r\n\r\n{}", "not an event stream"),
            ("garbage\r\n\r\n", "not HTTP/1.1"),
        ];
        for (rest, expected) in cases {
            let (port, server) = serve_http(format!("HTTP/1.1 200 OK\r\n{rest}"));
            let error = watch(port, None, true).0.expect_err(expected);
            server.join().expect("the server is content");
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn tls_is_spoken_where_the_certificate_is_trusted() {
        let rcgen::CertifiedKey { cert, signing_key } =
            rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
        let key = rustls::pki_types::PrivateKeyDer::try_from(signing_key.serialize_der()).expect("a key");
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key)
            .expect("a certificate and its key");
        let config = Arc::new(config);
        let serve_tls = || {
            let config = config.clone();
            serve(move |tcp| {
                let connection = rustls::ServerConnection::new(config).expect("a connection");
                let Ok(mut ws) = tungstenite::accept(StreamOwned::new(connection, tcp)) else { return };
                ws.send(Message::text(WELCOME)).expect("the watch reads");
                ws.close(None).expect("it is open");
                while ws.read().is_ok() {}
            })
        };

        let mut roots = RootCertStore::empty();
        roots.add(cert.der().clone()).expect("a root");
        let (port, server) = serve_tls();
        let (ended, out) = watch_url(&format!("https://localhost:{port}/"), roots, None, false);
        server.join().expect("the server is content");
        assert_eq!((ended, out), (closed(1005, ""), format!("{WELCOME}\n")));

        let (port, server) = serve_tls();
        let (ended, _) = watch_url(&format!("wss://localhost:{port}/"), RootCertStore::empty(), None, false);
        server.join().expect("the server is content");
        let error = ended.expect_err("no one vouches for it");
        assert!(error.contains("UnknownIssuer") && error.contains("SSL_CERT_FILE"), "{error}");
    }

    #[test]
    fn a_response_head_is_bounded() {
        let endless = io::repeat(b'x').take(HEAD_BYTES_MAX * 2);
        assert!(read_head(&mut BufReader::new(endless)).is_err());
        let head = |bytes: usize| format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "x".repeat(bytes - 24));
        let most = usize::try_from(HEAD_BYTES_MAX).expect("it is small");
        assert!(read_head(&mut head(most).as_bytes()).is_ok());
        assert!(read_head(&mut head(most + 1).as_bytes()).is_err());
    }

    #[test]
    fn urls_of_both_kinds_lead_to_both_transports() {
        let parse = |url, sse| Target::parse(url, sse).map(|target| (target.url.to_string(), target.tls, target.port));
        assert_eq!(parse("http://h/s#f", false), Ok(("ws://h/s".to_owned(), false, 80)));
        assert_eq!(parse("wss://h:8443/s", true), Ok(("https://h:8443/s".to_owned(), true, 8443)));
        assert_eq!(parse("https://h/s", false), Ok(("wss://h/s".to_owned(), true, 443)));
        for bad in ["", "h:8080", "/v1/streams/leads", "ftp://h/s", "http://u@h/s", "http://:hunter2@h/s"] {
            let error = parse(bad, false).expect_err(bad);
            assert!(!error.contains("hunter2"));
        }
        assert!(bearer("a b").is_err() && bearer("").is_err() && bearer("a\r\nX: y").is_err());
    }

    #[test]
    fn no_server_is_an_error_that_asks_for_it() {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port();
        let error = watch(port, None, false).0.expect_err("no one listens");
        assert!(error.contains("is the server running there"), "{error}");
    }

    #[test]
    fn a_closed_output_ends_the_watch() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        assert_eq!(print_frame(&mut Closed, "{}"), Ok(false));
    }

    #[test]
    fn the_end_is_told_with_what_to_do() {
        assert_eq!(tell_close(4001, "token_expired"), "closed 4001 token_expired: get a fresh credential, reconnect");
        assert_eq!(tell_close(1000, ""), "closed 1000");
        assert_eq!(tell_close(4999, "\u{1b}[2Jwhy"), "closed 4999 [2Jwhy");
    }

    #[test]
    fn a_welcome_tells_how_long_to_wait() {
        assert_eq!(patience(WELCOME), Some(Duration::from_secs(55)));
        assert_eq!(patience(r#"{"type":"snapshot","heartbeat_ms":1}"#), None);
        assert_eq!(patience("{}"), None);
    }
}
