//! axum 0.8 on tokio's `current_thread` runtime: WebSocket at `/ws`, SSE at `/sse`, a tokio broadcast channel behind both.
//!
//! Tuned: TCP_NODELAY, 4 KiB read buffers and no write buffering in tungstenite, a message whose bytes are shared by every
//! connection, one task a connection. Memory: the channel holds [`HISTORY`] messages.
//! Errors: a receiver that falls out of the channel misses messages, which the load tester counts as lost.

use std::convert::Infallible;
use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::State;
use axum::extract::ws::{Message as Frame, Utf8Bytes, WebSocket, WebSocketUpgrade};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::serve::ListenerExt;
use futures_util::stream;
use restcast_peers::{BACKLOG, Message, Options, Ticks, Verifier};
use tokio::net::TcpSocket;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::broadcast::{Receiver, Sender};

/// Messages that a slow connection may be behind.
const HISTORY: usize = 64;

#[derive(Clone)]
struct Shared {
    messages: Sender<Utf8Bytes>,
    verifier: Option<Arc<Verifier>>,
    greeting: Option<[Utf8Bytes; 2]>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::from_env()?;
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(([127, 0, 0, 1], options.port).into())?;
    let listener = socket.listen(BACKLOG.unsigned_abs())?;
    let address = listener.local_addr()?;
    let messages = Sender::new(HISTORY);
    let shared = Shared {
        messages: messages.clone(),
        verifier: options.secret.as_deref().map(|secret| Arc::new(Verifier::new(secret))),
        greeting: options.greeting().map(|greeting| greeting.map(Utf8Bytes::from)),
    };
    let router = Router::new().route("/ws", get(websocket)).route("/sse", get(events)).with_state(shared);
    tokio::spawn(publish(options, messages));
    restcast_peers::ready(address)?;
    // A connection that cannot be set so is closed by its peer anyway.
    let listener = listener.tap_io(|connection| drop(connection.set_nodelay(true)));
    axum::serve(listener, router).await?;
    Ok(())
}

async fn publish(options: Options, messages: Sender<Utf8Bytes>) {
    let Some(interval) = options.interval else { return };
    let mut message = Message::new(options.message_bytes);
    let mut ticks = Ticks::new(interval, Instant::now());
    loop {
        tokio::time::sleep_until(ticks.due().into()).await;
        if ticks.take(Instant::now()) {
            // With nobody connected there is nobody to miss it.
            drop(messages.send(message.stamp().into()));
        }
    }
}

fn refused(shared: &Shared, headers: &HeaderMap) -> bool {
    let authorization = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes());
    shared.verifier.as_ref().is_some_and(|verifier| !verifier.accepts(authorization))
}

async fn websocket(State(shared): State<Shared>, headers: HeaderMap, upgrade: WebSocketUpgrade) -> Response {
    if refused(&shared, &headers) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let messages = shared.messages.subscribe();
    let upgrade = upgrade.read_buffer_size(4 << 10).write_buffer_size(0);
    upgrade.on_upgrade(move |socket| follow(socket, messages, shared.greeting))
}

async fn follow(mut socket: WebSocket, mut messages: Receiver<Utf8Bytes>, greeting: Option<[Utf8Bytes; 2]>) {
    for message in greeting.into_iter().flatten() {
        if socket.send(Frame::Text(message)).await.is_err() {
            return;
        }
    }
    loop {
        tokio::select! {
            biased;
            message = messages.recv() => match message {
                Ok(message) => if socket.send(Frame::Text(message)).await.is_err() {
                    return;
                },
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return,
            },
            received = socket.recv() => if !matches!(received, Some(Ok(_))) {
                return;
            },
        }
    }
}

async fn events(State(shared): State<Shared>, headers: HeaderMap) -> Response {
    if refused(&shared, &headers) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let messages = shared.messages.subscribe();
    let events = stream::unfold(messages, |mut messages| async move {
        loop {
            match messages.recv().await {
                Ok(message) => return Some((Ok::<_, Infallible>(Event::default().data(message.as_str())), messages)),
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return None,
            }
        }
    });
    Sse::new(events).into_response()
}
