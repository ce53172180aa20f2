//! Ephemeral sessions in Redis: the commands that make, read, keep and end them, and their answers.
//!
//! `restcast:ephemeral:<place>` has a session's record, sealed, and lives as long as the session; an empty one says that it
//! was ended. `…:<place>:at` has the processes with connections that live by it, by when they are believed until. Where a
//! session is counted, `restcast:ephemeral:all` and `restcast:ephemeral:of:<maker>`, it stands by when it ends unless more is
//! heard. `restcast:ephemeral:named:<name>` leads from the name that its maker gave it. Each change is one script: what it
//! sees does not change under it.
//!
//! Source: <https://redis.io/docs/latest/commands/eval/>. Memory: none of its own. Errors: an answer that is none of ours.
//! Not here: what a record says (`auth::ephemeral_record`), what becomes of it (`shard`).

use std::time::Duration;

use crate::auth::ephemeral::Place;
use crate::codec::resp::{Reply, write_command};
use crate::limits::EPHEMERAL_HOLD;
use crate::secret::Secret;
use crate::shard::{EphemeralAsk, EphemeralFound, EphemeralHeld, EphemeralMake, EphemeralStanding};

/// Before the place of a session.
const PREFIX: &str = "restcast:ephemeral:";

/// Milliseconds now, by Redis's clock: lives are told as spans, so nobody else's counts.
macro_rules! now {
    () => {
        "local t=redis.call('TIME') local now=t[1]*1000+math.floor(t[2]/1000) "
    };
}

/// Has a session stand where it is counted until it ends, if nothing more is heard.
macro_rules! count {
    () => {
        "local function count(key,place,keep,left) redis.call('ZADD',key,now+keep,place) \
         if redis.call('PTTL',key)<left then redis.call('PEXPIRE',key,left) end end "
    };
}

/// KEYS: record, all, of the maker[, name]. ARGV: record, place, life, most in all, most of the maker[, named, anew].
const MAKE: &str = concat!(
    now!(),
    count!(),
    "if KEYS[4] and ARGV[7]=='0' then local n=redis.call('GET',KEYS[4]) \
     if n then local r=redis.call('GET','restcast:ephemeral:'..string.sub(n,1,43)) \
     if r and #r>0 then return {n,r} end end end \
     for i=2,3 do redis.call('ZREMRANGEBYSCORE',KEYS[i],'-inf',now) end \
     if redis.call('ZCARD',KEYS[2])>=tonumber(ARGV[4]) then return 1 end \
     local each=tonumber(ARGV[5]) if each>0 and redis.call('ZCARD',KEYS[3])>=each then return 2 end \
     local life=tonumber(ARGV[3]) redis.call('SET',KEYS[1],ARGV[1],'PX',life) \
     for i=2,3 do count(KEYS[i],ARGV[2],life,life) end \
     if KEYS[4] then redis.call('SET',KEYS[4],ARGV[6],'PX',life) end return 0"
);

/// KEYS: record, its processes, all, of the maker. ARGV: process, place, left, keep, hold, record or nothing. 1: it is
/// there, 0: it is not known, -1: it was ended.
const HOLD: &str = concat!(
    now!(),
    count!(),
    "local left,keep,hold=tonumber(ARGV[3]),tonumber(ARGV[4]),tonumber(ARGV[5]) \
     if redis.call('EXISTS',KEYS[1])==1 then if redis.call('STRLEN',KEYS[1])==0 then return -1 end \
     redis.call('PEXPIRE',KEYS[1],keep) \
     elseif ARGV[6]~='' then redis.call('SET',KEYS[1],ARGV[6],'PX',keep) else return 0 end \
     for i=3,4 do count(KEYS[i],ARGV[2],keep,left) end \
     redis.call('ZADD',KEYS[2],now+hold,ARGV[1]) redis.call('PEXPIRE',KEYS[2],math.min(hold,keep)) return 1"
);

/// KEYS as above. ARGV: process, place, left, keep. It ends then, where no other process has connections.
const LEAVE: &str = concat!(
    now!(),
    count!(),
    "redis.call('ZREM',KEYS[2],ARGV[1]) redis.call('ZREMRANGEBYSCORE',KEYS[2],'-inf',now) \
     if redis.call('ZCARD',KEYS[2])==0 and redis.call('STRLEN',KEYS[1])>0 then \
     local left,keep=tonumber(ARGV[3]),tonumber(ARGV[4]) redis.call('PEXPIRE',KEYS[1],keep) \
     for i=3,4 do count(KEYS[i],ARGV[2],keep,left) end end return 1"
);

/// KEYS as above. ARGV: place, left. That it has ended is kept for as long as anybody may hold it to be there.
const END: &str = "redis.call('SET',KEYS[1],'','PX',tonumber(ARGV[2])) redis.call('DEL',KEYS[2]) \
                   redis.call('ZREM',KEYS[3],ARGV[1]) redis.call('ZREM',KEYS[4],ARGV[1]) return 1";

/// An answer as far as it has come.
pub(super) enum Gathering {
    Made,
    Read,
    Held(Vec<EphemeralStanding>),
    Done,
}

/// The name of its command, for the operator.
pub(super) fn command_of(gathering: &Gathering) -> &'static str {
    match gathering {
        Gathering::Read => "GET",
        _ => "EVAL",
    }
}

/// Writes the commands of a question: what is to be gathered, and how many answers there will be.
pub(super) fn write(out: &mut Vec<u8>, ask: EphemeralAsk) -> (Gathering, usize) {
    match ask {
        EphemeralAsk::Make(make) => {
            write_make(out, &make);
            (Gathering::Made, 1)
        }
        EphemeralAsk::Read(place) => {
            write_command(out, [b"GET".as_slice(), record_key(place).as_bytes()]);
            (Gathering::Read, 1)
        }
        EphemeralAsk::Hold { process, sessions } => {
            let process = process.to_string();
            for session in &sessions {
                let record = session.record.as_ref().map_or(&b""[..], Secret::expose_secret);
                let arguments = [session.left, session.keep, EPHEMERAL_HOLD].map(millis);
                let [left, keep, hold] = arguments.each_ref().map(String::as_bytes);
                write_script(out, HOLD, session, &[process.as_bytes()], &[left, keep, hold, record]);
            }
            (Gathering::Held(Vec::with_capacity(sessions.len())), sessions.len())
        }
        EphemeralAsk::Leave { process, session } => {
            let process = process.to_string();
            let arguments = [session.left, session.keep].map(millis);
            write_script(out, LEAVE, &session, &[process.as_bytes()], &arguments.each_ref().map(String::as_bytes));
            (Gathering::Done, 1)
        }
        EphemeralAsk::End(session) => {
            write_script(out, END, &session, &[], &[millis(session.left).as_bytes()]);
            (Gathering::Done, 1)
        }
    }
}

fn write_make(out: &mut Vec<u8>, make: &EphemeralMake) {
    let EphemeralMake { place, record, counted, life, in_all, each, named, anew } = make;
    let keys = [record_key(*place), format!("{PREFIX}all"), format!("{PREFIX}of:{counted}")];
    let named_key = named.as_ref().map(|(name, _)| format!("{PREFIX}named:{name}"));
    let (count, place, life) = ((keys.len() + named.iter().len()).to_string(), place.to_string(), millis(*life));
    let (in_all, each) = (in_all.to_string(), each.to_string());
    let mut parts: Vec<&[u8]> = vec![b"EVAL", MAKE.as_bytes(), count.as_bytes()];
    parts.extend(keys.iter().chain(&named_key).map(String::as_bytes));
    parts.extend([record.expose_secret(), place.as_bytes(), life.as_bytes(), in_all.as_bytes(), each.as_bytes()]);
    if let Some((_, named)) = named {
        parts.extend([named.expose_secret(), if *anew { b"1" } else { b"0" }]);
    }
    write_command(out, parts);
}

/// Writes a script about a session: before its place stands `before`, behind it `behind`.
fn write_script(out: &mut Vec<u8>, script: &str, session: &EphemeralHeld, before: &[&[u8]], behind: &[&[u8]]) {
    let (record, place) = (record_key(session.place), session.place.to_string());
    let (processes, counted) = (format!("{record}:at"), format!("{PREFIX}of:{}", session.counted));
    let all = format!("{PREFIX}all");
    let mut parts: Vec<&[u8]> = vec![b"EVAL", script.as_bytes(), b"4"];
    parts.extend([&record, &processes, &all, &counted].map(String::as_bytes));
    parts.extend(before);
    parts.push(place.as_bytes());
    parts.extend(behind);
    write_command(out, parts);
}

fn record_key(place: Place) -> String {
    format!("{PREFIX}{place}")
}

/// A span in milliseconds, at least one: none at all would be an error there.
fn millis(span: Duration) -> String {
    span.as_millis().max(1).to_string()
}

/// Takes one reply, which is no error; `Err`: it is none to that question. `Some`: the answer is whole.
pub(super) fn gather(gathering: &mut Gathering, reply: Reply, last: bool) -> Result<Option<EphemeralFound>, ()> {
    let found = match (gathering, reply) {
        (Gathering::Made, Reply::Integer(0)) => EphemeralFound::Made,
        (Gathering::Made, Reply::Integer(1)) => EphemeralFound::TooMany,
        (Gathering::Made, Reply::Integer(2)) => EphemeralFound::TooManyOfOne,
        (Gathering::Made, Reply::Array(parts)) => {
            let mut parts = parts.into_iter();
            match (parts.next(), parts.next(), parts.next()) {
                (Some(Reply::String(named)), Some(Reply::String(record)), None) => {
                    EphemeralFound::Same { named: Secret::new(named), record: Secret::new(record) }
                }
                // Somebody else has written there: it is none of ours.
                (Some(_), Some(_), None) => {
                    EphemeralFound::Same { named: Secret::default(), record: Secret::default() }
                }
                _ => return Err(()),
            }
        }
        (Gathering::Read, Reply::String(record)) if !record.is_empty() => {
            EphemeralFound::Record(Some(Secret::new(record)))
        }
        (Gathering::Read, Reply::String(_) | Reply::Nil | Reply::TooLong(_)) => EphemeralFound::Record(None),
        (Gathering::Held(standings), Reply::Integer(standing)) => {
            standings.push(match standing {
                1 => EphemeralStanding::There,
                0 => EphemeralStanding::Lost,
                -1 => EphemeralStanding::Ended,
                _ => return Err(()),
            });
            return Ok(last.then(|| EphemeralFound::Held(std::mem::take(standings))));
        }
        (Gathering::Done, Reply::Integer(_)) => EphemeralFound::Done,
        _ => return Err(()),
    };
    Ok(Some(found))
}
