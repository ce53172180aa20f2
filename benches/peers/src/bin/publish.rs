//! What sets the pace of a peer that only relays: POSTs each message to `--port`, path `/publish`, over one connection.
//!
//! It runs on the load tester's core and its CPU is not counted. A message is posted once the answer to the one before is
//! there, so a server that is late skips places of the grid as the other peers do.
//! Memory: one message and one answer. Errors: an answer other than 2xx, or a connection that ends, ends it.

use std::error::Error;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use restcast_peers::{Message, Options, Ticks};

/// Longest an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);

fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::from_env()?;
    let Some(interval) = options.interval else { return Err("nothing to publish: --interval is 0".into()) };
    let mut stream = TcpStream::connect(("127.0.0.1", options.port))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut message = Message::new(options.message_bytes);
    let mut ticks = Ticks::new(interval, Instant::now());
    restcast_peers::ready(stream.local_addr()?)?;
    loop {
        std::thread::sleep(ticks.due().saturating_duration_since(Instant::now()));
        if ticks.take(Instant::now()) {
            post(&mut stream, &message.stamp())?;
        }
    }
}

fn post(stream: &mut TcpStream, text: &str) -> Result<(), Box<dyn Error>> {
    let head = "POST /publish HTTP/1.1\r\nHost: peer\r\nContent-Type: application/json\r\nContent-Length: ";
    stream.write_all(format!("{head}{}\r\n\r\n{text}", text.len()).as_bytes())?;
    let mut answer = Vec::new();
    let mut piece = [0; 4096];
    while !whole(&answer) {
        match stream.read(&mut piece)? {
            0 => return Err("the server closed the connection".into()),
            bytes => answer.extend_from_slice(&piece[..bytes]),
        }
        if answer.len() > 64 << 10 {
            return Err("an answer without an end".into());
        }
    }
    if answer.get(9) == Some(&b'2') { Ok(()) } else { Err(String::from_utf8_lossy(&answer).into_owned().into()) }
}

/// Whether an answer with a `Content-Length` is there to its end.
fn whole(answer: &[u8]) -> bool {
    let Some(end) = memchr::memmem::find(answer, b"\r\n\r\n") else { return false };
    let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
    answer.len() >= end + 4 + length.unwrap_or(0usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_whole_with_its_body() {
        let head = "HTTP/1.1 201 Created\r\nContent-Length: 4\r\n\r\n";
        assert!(!whole(b"HTTP/1.1 201 Created\r\n"));
        assert!(!whole(format!("{head}abc").as_bytes()));
        assert!(whole(format!("{head}abcd").as_bytes()));
        assert!(whole(b"HTTP/1.1 202 Accepted\r\n\r\n"));
    }
}
