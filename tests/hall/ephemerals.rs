//! The store of ephemeral sessions as a test plays it: what the scripts that Redis is sent do, once more.

use std::collections::BTreeMap;
use std::time::Duration;

use restcast::auth::ephemeral::Place;
use restcast::ids::ProcessId;
use restcast::limits::EPHEMERAL_HOLD;
use restcast::secret::Secret;
use restcast::shard::{EphemeralAsk, EphemeralFound, EphemeralHeld, EphemeralStanding};
use restcast::time::{Instant, Now};

struct Kept {
    /// `None`: it was ended.
    record: Option<Secret>,
    counted: String,
    until: Instant,
    at: BTreeMap<ProcessId, Instant>,
}

/// Sessions by their places, and places by names.
#[derive(Default)]
pub struct Ephemerals {
    kept: BTreeMap<String, Kept>,
    named: BTreeMap<String, (String, Secret)>,
    /// How often a record was read.
    pub reads: usize,
}

impl Ephemerals {
    fn at(&mut self, place: Place, now: Instant) -> Option<&mut Kept> {
        let place = place.to_string();
        self.kept.retain(|_, kept| kept.until > now);
        self.kept.get_mut(&place)
    }

    /// How many sessions there are.
    pub fn len(&mut self, now: Now) -> usize {
        self.kept.values().filter(|kept| kept.record.is_some() && kept.until > now.at).count()
    }

    /// The store loses everything.
    pub fn flush(&mut self) {
        self.kept.clear();
        self.named.clear();
    }

    pub fn answer(&mut self, ask: EphemeralAsk, now: Now) -> EphemeralFound {
        let now = now.at;
        match ask {
            EphemeralAsk::Make(make) => {
                if let Some((name, _)) = make.named.as_ref().filter(|_| !make.anew)
                    && let Some((place, named)) = self.named.get(name).cloned()
                    && let Some(kept) = self.kept.get(&place).filter(|kept| kept.until > now)
                    && let Some(record) = kept.record.clone()
                {
                    return EphemeralFound::Same { named, record };
                }
                let live = |kept: &&Kept| kept.record.is_some() && kept.until > now;
                let all = self.kept.values().filter(live);
                let of = all.clone().filter(|kept| kept.counted == make.counted).count();
                if all.count() >= make.in_all as usize {
                    return EphemeralFound::TooMany;
                }
                if make.each > 0 && of >= make.each as usize {
                    return EphemeralFound::TooManyOfOne;
                }
                let (record, counted) = (Some(make.record), make.counted);
                let kept = Kept { record, counted, until: now + make.life, at: BTreeMap::new() };
                self.kept.insert(make.place.to_string(), kept);
                if let Some((name, named)) = make.named {
                    self.named.insert(name, (make.place.to_string(), named));
                }
                EphemeralFound::Made
            }
            EphemeralAsk::Read(place) => {
                self.reads += 1;
                EphemeralFound::Record(self.at(place, now).and_then(|kept| kept.record.clone()))
            }
            EphemeralAsk::Hold { process, sessions } => {
                EphemeralFound::Held(sessions.into_iter().map(|session| self.hold(process, session, now)).collect())
            }
            EphemeralAsk::Leave { process, session } => {
                if let Some(kept) = self.at(session.place, now) {
                    kept.at.remove(&process);
                    kept.at.retain(|_, until| *until > now);
                    if kept.at.is_empty() && kept.record.is_some() {
                        kept.until = now + session.keep.max(Duration::from_millis(1));
                    }
                }
                EphemeralFound::Done
            }
            EphemeralAsk::End(session) => {
                let until = now + session.left.max(Duration::from_millis(1));
                let kept = Kept { record: None, counted: String::new(), until, at: BTreeMap::new() };
                self.kept.insert(session.place.to_string(), kept);
                EphemeralFound::Done
            }
        }
    }

    fn hold(&mut self, process: ProcessId, session: EphemeralHeld, now: Instant) -> EphemeralStanding {
        let EphemeralHeld { place, counted, keep, record, .. } = session;
        let until = now + keep.max(Duration::from_millis(1));
        match (self.at(place, now), record) {
            (Some(Kept { record: None, .. }), _) => return EphemeralStanding::Ended,
            (Some(kept), _) => {
                kept.until = until;
                kept.at.insert(process, now + EPHEMERAL_HOLD);
            }
            (None, None) => return EphemeralStanding::Lost,
            (None, record) => {
                let at = BTreeMap::from([(process, now + EPHEMERAL_HOLD)]);
                self.kept.insert(place.to_string(), Kept { record, counted, until, at });
            }
        }
        EphemeralStanding::There
    }
}
