//! The link for what is published: three channels of control events, listened to, and two of other processes.
//!
//! Source: <https://redis.io/docs/latest/develop/interact/pubsub/>; protocol version 1, section 6.
//! Memory: none but the link's. Errors: a message that is too long or no text is counted and passed over.
//! Not here: what an event means (`auth::control`), what nobody hears (`follow`).

use std::time::Duration;

use rustix::event::PollFlags;

use super::commands::Said;
use super::link::{Fault, Io, Link, Turn};
use super::peers::{EVERYBODY, channel_of};
use crate::auth::control::ControlEntry;
use crate::codec::resp::{Bounds, Reply, error_code, write_command};
use crate::config::RedisOptions;
use crate::ids::ProcessId;
use crate::limits;
use crate::metrics::{RedisEntry, RedisLink, StoreMetrics};
use crate::time::{Instant, Now};

/// What may be said on this link.
const BOUNDS: Bounds = Bounds {
    line_bytes_max: limits::REDIS_LINE_BYTES_MAX,
    string_bytes_max: limits::PEER_MESSAGE_BYTES_MAX,
    elements_max: 16,
    depth_max: 2,
    reply_bytes_max: limits::PEER_MESSAGE_BYTES_MAX + limits::CONTROL_EVENT_BYTES_MAX,
};

/// The default names of the channels, which are the names of their events.
pub(super) const EVENTS: [&str; 3] = ["user-logged-out", "permission-update", "token-revoked"];

pub(super) struct Events {
    pub(super) link: Link,
    timeout: Duration,
    /// The channels, in the order of [`EVENTS`].
    channels: [String; 3],
    /// Channels of which it is not yet said that they are listened to.
    unconfirmed: usize,
    /// The channels of other processes: everybody's, and this one's own.
    of_peers: [String; 2],
    hears_peers: Hears,
    /// Since when an answer is waited for: to SUBSCRIBE or PING.
    asked: Option<Instant>,
    /// When something was last heard.
    heard: Instant,
}

/// Whether what other processes say is heard.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Hears {
    /// It has not been asked for.
    No,
    /// So many of the channels have not been confirmed.
    Soon(usize),
    Yes,
    /// The user whom this server is there may not.
    Never,
}

impl Events {
    pub(super) fn new(options: &RedisOptions, process: ProcessId, now: Instant) -> Events {
        let channels = [&options.channel_logout, &options.channel_permissions, &options.channel_revoked];
        Events {
            link: Link::new(RedisLink::Events, BOUNDS, now),
            timeout: options.timeout,
            channels: channels.map(String::clone),
            unconfirmed: 0,
            of_peers: [EVERYBODY.to_owned(), channel_of(process)],
            hears_peers: Hears::No,
            asked: None,
            heard: now,
        }
    }

    /// The channel that events of that name are heard on.
    pub(super) fn channel(&self, event: &str) -> &str {
        let named = EVENTS.iter().zip(&self.channels).find(|(name, _)| **name == event);
        named.map_or("", |(_, channel)| channel)
    }

    /// Whether everything that is published is heard.
    pub(super) fn listens(&self) -> bool {
        self.link.is_ready() && self.unconfirmed == 0 && matches!(self.hears_peers, Hears::Yes | Hears::Never)
    }

    /// Whether what other processes say is.
    pub(super) fn hears_peers(&self) -> bool {
        self.link.is_ready() && self.hears_peers == Hears::Yes
    }

    /// Its turn. What is heard is put in `told`, what other processes say in `peers`.
    #[expect(clippy::too_many_arguments, reason = "a turn's parts, each borrowed from elsewhere")]
    pub(super) fn turn(
        &mut self,
        now: Now,
        ready: PollFlags,
        io: &mut Io<'_>,
        metrics: &StoreMetrics,
        said: &mut Vec<Said>,
        told: &mut Vec<ControlEntry>,
        peers: &mut Vec<Vec<u8>>,
    ) -> Vec<Turn> {
        let mut turns = Vec::new();
        let Events { link, channels, unconfirmed, of_peers, hears_peers, asked, heard, .. } = self;
        let turn = link.turn(ready, io, &mut |reply| {
            *heard = now.at;
            if let (Hears::Soon(_), Reply::Error(line)) = (*hears_peers, &reply)
                && error_code(line) == "NOPERM"
            {
                // Without the right to listen to others everything else goes on as it did.
                (*hears_peers, *asked) = (Hears::Never, None);
                let what = "it lets nobody hear restcast:processes and restcast:process:*: connections of other processes \
                            are neither renewed nor listed";
                said.push((RedisLink::Events, what.to_owned()));
                return Ok(());
            }
            match understood(reply, channels, of_peers)? {
                Understood::Subscribed => match (*unconfirmed, *hears_peers) {
                    (0, Hears::Soon(left)) => {
                        *hears_peers = if left <= 1 { Hears::Yes } else { Hears::Soon(left - 1) };
                        if left <= 1 {
                            *asked = None;
                        }
                    }
                    (0, _) => return Err(Fault::OutOfStep),
                    (left, _) => {
                        *unconfirmed = left - 1;
                        if *unconfirmed == 0 {
                            *asked = None;
                        }
                    }
                },
                Understood::Peer(message) => peers.push(message),
                Understood::Alive => *asked = None,
                Understood::Event(event, data) => {
                    metrics.entries.of(RedisEntry::Heard).count();
                    told.push(ControlEntry { event: event.to_owned(), data, at_ms: now.wall.as_micros() / 1000 });
                }
                Understood::Bad => {
                    metrics.entries.of(RedisEntry::Bad).count();
                    said.push((RedisLink::Events, "a message on a control channel is too long or no text".to_owned()));
                }
            }
            Ok(())
        });
        self.after(turn, now.at, &mut turns);
        if self.asked.is_some_and(|asked| now.at >= asked + self.timeout) {
            let turn = self.link.close(Fault::Timeout(self.timeout), io);
            self.after(turn, now.at, &mut turns);
        }
        if self.asked.is_none()
            && self.unconfirmed == 0
            && self.hears_peers == Hears::No
            && let Some(out) = self.link.out()
        {
            // By itself: who may not hear of others is still to hear of logouts.
            let [everybody, own] = self.of_peers.each_ref().map(String::as_bytes);
            write_command(out, [b"SUBSCRIBE".as_slice(), everybody, own]);
            (self.hears_peers, self.asked) = (Hears::Soon(self.of_peers.len()), Some(now.at));
        }
        if self.asked.is_none()
            && now.at >= self.heard + limits::REDIS_PING_INTERVAL
            && let Some(out) = self.link.out()
        {
            write_command(out, [b"PING".as_slice()]);
            self.asked = Some(now.at);
        }
        let turn = self.link.flush(io);
        self.after(turn, now.at, &mut turns);
        turns
    }

    /// What follows from the link's turn.
    pub(super) fn after(&mut self, turn: Turn, now: Instant, turns: &mut Vec<Turn>) {
        match &turn {
            Turn::Same => return,
            Turn::Opened => {
                if let Some(out) = self.link.out() {
                    let channels = self.channels.iter().map(String::as_bytes);
                    let parts: Vec<&[u8]> = std::iter::once(b"SUBSCRIBE".as_slice()).chain(channels).collect();
                    write_command(out, parts);
                    (self.unconfirmed, self.asked, self.heard) = (self.channels.len(), Some(now), now);
                    self.hears_peers = Hears::No;
                }
            }
            Turn::Closed(_) => (self.asked, self.hears_peers) = (None, Hears::No),
        }
        turns.push(turn);
    }

    pub(super) fn next_timeout(&self) -> Option<Instant> {
        let answer = self.asked.map(|asked| asked + self.timeout);
        let ping = (self.link.is_ready() && self.asked.is_none()).then(|| self.heard + limits::REDIS_PING_INTERVAL);
        [answer, ping, self.link.next_timeout()].into_iter().flatten().min()
    }
}

/// What a push says.
enum Understood {
    Subscribed,
    Alive,
    /// The event's name and its payload.
    Event(&'static str, String),
    /// What another process says.
    Peer(Vec<u8>),
    /// A message that is too long, or no text.
    Bad,
}

fn understood(reply: Reply, channels: &[String; 3], of_peers: &[String; 2]) -> Result<Understood, Fault> {
    let elements = match reply {
        Reply::Array(elements) => elements,
        Reply::Error(line) => return Err(Fault::refused("SUBSCRIBE", &line)),
        _ => return Err(Fault::OutOfStep),
    };
    let mut elements = elements.into_iter();
    let Some(Reply::String(kind)) = elements.next() else { return Err(Fault::OutOfStep) };
    match (kind.as_slice(), elements.next(), elements.next()) {
        (b"subscribe", Some(Reply::String(_)), Some(Reply::Integer(_))) => Ok(Understood::Subscribed),
        (b"pong", ..) => Ok(Understood::Alive),
        (b"message", Some(Reply::String(channel)), Some(payload))
            if of_peers.iter().any(|name| name.as_bytes() == channel) =>
        {
            // One that is too long is none that makes sense.
            Ok(Understood::Peer(if let Reply::String(bytes) = payload { bytes } else { Vec::new() }))
        }
        (b"message", Some(Reply::String(channel)), Some(payload)) => {
            let at = channels.iter().position(|name| name.as_bytes() == channel).ok_or(Fault::OutOfStep)?;
            let event = EVENTS.get(at).ok_or(Fault::OutOfStep)?;
            Ok(match payload {
                Reply::String(bytes) if bytes.len() <= limits::CONTROL_EVENT_BYTES_MAX => {
                    String::from_utf8(bytes).map_or(Understood::Bad, |text| Understood::Event(event, text))
                }
                _ => Understood::Bad,
            })
        }
        _ => Err(Fault::OutOfStep),
    }
}
