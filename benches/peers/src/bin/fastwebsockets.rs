//! fastwebsockets 0.10 on tokio's `current_thread` runtime: one task broadcasts over the write halves of all connections.
//!
//! Tuned: TCP_NODELAY; the handshake is hyper's, then the plain `TcpStream` is taken back out of it, so that no delivery
//! passes hyper's boxed stream; the halves are the socket's own (`into_split`), without a lock; one task a connection sleeps
//! on its reading half and is not woken by a delivery; one timer a sweep, not one a write; both greetings leave in one write.
//! Memory: two halves and the library's buffers each.
//! Errors: a connection whose write fails, or at which a sweep stands still until [`STALL`] is over, is dropped.

use std::convert::Infallible;
use std::error::Error;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use fastwebsockets::{Frame, OpCode, Payload, Role, WebSocket, WebSocketError, WebSocketWrite, upgrade};
use http_body_util::Empty;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use restcast_peers::{BACKLOG, Message, Options, Ticks, Verifier};
use tokio::io::AsyncWriteExt;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::mpsc;

/// How long a sweep may take until the connection at which it stands is dropped.
const STALL: Duration = Duration::from_secs(5);
/// Comings and goings that wait for the broadcaster.
const CHANGES: usize = 1024;

type Writer = WebSocketWrite<OwnedWriteHalf>;

struct Shared {
    verifier: Option<Verifier>,
    /// The frames that greet a connection, one behind the other.
    greeting: Vec<u8>,
    places: Mutex<Places>,
    changes: mpsc::Sender<Change>,
}

/// A connection's place in the broadcaster's table, used again once the broadcaster has cleared it.
#[derive(Default)]
struct Places {
    used: usize,
    free: Vec<usize>,
}

enum Change {
    Come(usize, Writer),
    Gone(usize),
}

impl Shared {
    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().expect("one thread, and nothing panics while it holds this")
    }

    fn place(&self) -> usize {
        let mut places = self.places();
        places.free.pop().unwrap_or_else(|| {
            places.used += 1;
            places.used - 1
        })
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::from_env()?;
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(([127, 0, 0, 1], options.port).into())?;
    let listener = socket.listen(BACKLOG.unsigned_abs())?;
    let (changes, changed) = mpsc::channel(CHANGES);
    let verifier = options.secret.as_deref().map(Verifier::new);
    let mut greeting = Vec::new();
    for text in options.greeting().into_iter().flatten() {
        greeting.extend_from_slice(Frame::text(Payload::Borrowed(text.as_bytes())).write(&mut Vec::new()));
    }
    let shared = Arc::new(Shared { verifier, greeting, places: Mutex::default(), changes });
    tokio::spawn(publish(options, changed, Arc::clone(&shared)));
    restcast_peers::ready(listener.local_addr()?)?;
    loop {
        let (stream, _) = listener.accept().await?;
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            if stream.set_nodelay(true).is_ok() {
                let service = service_fn(move |request| answer(request, Arc::clone(&shared)));
                let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service).with_upgrades();
                // A handshake that fails is the client's to report.
                drop(connection.await);
            }
        });
    }
}

async fn answer(mut request: Request<Incoming>, shared: Arc<Shared>) -> Result<Response<Empty<Bytes>>, Infallible> {
    let refuse = |status| {
        let mut response = Response::new(Empty::new());
        *response.status_mut() = status;
        Ok(response)
    };
    if let Some(verifier) = &shared.verifier
        && !verifier.accepts(request.headers().get(header::AUTHORIZATION).map(|value| value.as_bytes()))
    {
        return refuse(StatusCode::UNAUTHORIZED);
    }
    if request.uri().path() != "/ws" || !upgrade::is_upgrade_request(&request) {
        return refuse(StatusCode::NOT_FOUND);
    }
    let Ok((response, upgraded)) = upgrade::upgrade(&mut request) else { return refuse(StatusCode::BAD_REQUEST) };
    tokio::spawn(async move {
        if let Ok(websocket) = upgraded.await
            && let Ok(parts) = websocket.into_inner().into_inner().downcast::<TokioIo<TcpStream>>()
            && parts.read_buf.is_empty()
        {
            // A connection that ends is no error of the server.
            drop(follow(parts.io.into_inner(), &shared).await);
        }
    });
    Ok(response)
}

/// Hands the writing half to the broadcaster and reads until the client closes.
async fn follow(mut stream: TcpStream, shared: &Shared) -> Result<(), WebSocketError> {
    stream.write_all(&shared.greeting).await?;
    let (mut reader, writer) = WebSocket::after_handshake(stream, Role::Server).split(|stream| stream.into_split());
    // The broadcaster has the other half: a ping is not answered, and no client here sends one.
    reader.set_auto_pong(false);
    reader.set_auto_close(false);
    let place = shared.place();
    if shared.changes.send(Change::Come(place, writer)).await.is_err() {
        return Ok(());
    }
    loop {
        match reader.read_frame::<_, WebSocketError>(&mut |_| async { Ok(()) }).await {
            Ok(frame) if frame.opcode != OpCode::Close => {}
            Ok(_) | Err(_) => break,
        }
    }
    // Without a broadcaster the process is about to end.
    drop(shared.changes.send(Change::Gone(place)).await);
    Ok(())
}

async fn publish(options: Options, mut changed: mpsc::Receiver<Change>, shared: Arc<Shared>) {
    let mut writers: Vec<Option<Writer>> = Vec::new();
    let mut message = Message::new(options.message_bytes);
    let mut ticks = options.interval.map(|interval| Ticks::new(interval, Instant::now()));
    loop {
        tokio::select! {
            biased;
            () = due(ticks) => {}
            change = changed.recv() => match change {
                Some(Change::Come(place, writer)) => {
                    if writers.len() <= place {
                        writers.resize_with(place + 1, || None);
                    }
                    writers[place] = Some(writer);
                }
                Some(Change::Gone(place)) => {
                    writers[place] = None;
                    shared.places().free.push(place);
                }
                None => return,
            },
        }
        if ticks.as_mut().is_some_and(|ticks| ticks.take(Instant::now())) {
            broadcast(&mut writers, &message.stamp()).await;
        }
    }
}

async fn due(ticks: Option<Ticks>) {
    match ticks {
        Some(ticks) => tokio::time::sleep_until(ticks.due().into()).await,
        None => std::future::pending().await,
    }
}

async fn broadcast(writers: &mut [Option<Writer>], text: &str) {
    let mut next = 0;
    while next < writers.len() {
        let sweep = async {
            while let Some(place) = writers.get_mut(next) {
                if let Some(writer) = place {
                    let write = writer.write_frame(Frame::text(Payload::Borrowed(text.as_bytes())));
                    if write.await.is_err() {
                        *place = None;
                    }
                }
                next += 1;
            }
        };
        if tokio::time::timeout(STALL, sweep).await.is_err() {
            // It stands at the connection that takes nothing; the others' sweep goes on behind it.
            writers[next] = None;
            next += 1;
        }
    }
}
