//! A CRM and its identity provider: access tokens that end, client credentials, and refresh tokens each of which is good for
//! one use.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use url::Url;

use super::{Rules, segments};
use crate::support::{Reply, RequestSeen};

pub const CLIENT_SECRET: &str = "crm-client-hunter2";
pub const REFRESH_TOKEN: &str = "crm-refresh-hunter2-0";
/// What an access token says that its life is, and how much longer it is good.
pub const LIFE: Duration = Duration::from_secs(6);
const GRACE: Duration = Duration::from_secs(1);

/// For whom a token was given.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Whose {
    Client,
    Person,
}

/// What both of them know.
#[derive(Default)]
pub struct Book {
    /// Access tokens that are good, whose, and until when.
    good: HashMap<String, (Whose, Instant)>,
    /// The refresh token that may be used.
    refresh: BTreeSet<String>,
    /// How many tokens were given, for whom.
    given: BTreeMap<Whose, usize>,
    /// When the last of them was given to the process that has it.
    last: BTreeMap<Whose, Instant>,
    /// Whether a 401 has been answered since the last one was given.
    refused: BTreeSet<Whose>,
    /// What the provider answers to everybody.
    pub down: bool,
    /// Answers 401 of the API.
    pub unauthorized: usize,
    /// What there is: each list's members.
    pub lists: BTreeMap<&'static str, Vec<Value>>,
}

impl Book {
    /// Takes all access tokens back.
    pub fn revoke(&mut self) {
        self.good.clear();
    }

    pub fn given(&self, whose: Whose) -> usize {
        self.given.get(&whose).copied().unwrap_or(0)
    }

    /// How long ago the last one was given.
    pub fn age(&self, whose: Whose) -> Duration {
        self.last.get(&whose).map_or(Duration::MAX, |last| last.elapsed())
    }

    /// The process that had the tokens is gone, and they with it.
    pub fn forget(&mut self) {
        self.last.clear();
    }

    pub fn list(&self, name: &str) -> Value {
        json!({ "results": self.lists[name] })
    }
}

pub type SharedBook = Arc<Mutex<Book>>;

fn open(book: &SharedBook) -> MutexGuard<'_, Book> {
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A new one.
pub fn book() -> SharedBook {
    let row = |list: &str, id: u32| json!({ "id": id, "name": format!("{list} {id}"), "stage": "open" });
    let lists = ["contacts", "companies", "deals"].map(|list| (list, (1..=5).map(|id| row(list, id)).collect()));
    let refresh = [REFRESH_TOKEN.to_owned()].into();
    Arc::new(Mutex::new(Book { lists: lists.into(), refresh, ..Book::default() }))
}

/// The API.
pub struct Crm {
    pub book: SharedBook,
    pub breaches: Vec<String>,
}

/// The identity provider.
pub struct Provider {
    pub book: SharedBook,
    pub breaches: Vec<String>,
}

impl Rules for Crm {
    fn answer(&mut self, seen: &RequestSeen, url: &Url) -> Reply {
        let shared = Arc::clone(&self.book);
        let mut book = open(&shared);
        let needed = if url.path().starts_with("/v3/deals") { Whose::Person } else { Whose::Client };
        let shown = seen.header("authorization").and_then(|value| value.strip_prefix("Bearer "));
        self.wants(shown.is_some(), "asked without a token", seen);
        let good = shown.and_then(|token| book.good.get(token)).copied();
        let Some((whose, _)) = good.filter(|(_, until)| Instant::now() < *until) else {
            self.wants(good.is_none(), "a token that has ended was shown", seen);
            book.unauthorized += 1;
            book.refused.insert(needed);
            return Reply::status(401).header("WWW-Authenticate", "Bearer error=\"invalid_token\"");
        };
        self.wants(whose == needed, "another's token was shown", seen);
        match (&*seen.method, &segments(url)[..]) {
            ("GET", ["v3", list @ ("contacts" | "companies" | "deals")]) => Reply::json(book.list(list).to_string()),
            ("PUT", ["v3", "deals", id, "stage"]) => {
                let said: Value = serde_json::from_slice(&seen.body).expect("JSON");
                let deals = book.lists.get_mut("deals").expect("a list");
                match deals.iter_mut().find(|deal| deal["id"].as_u64() == id.parse().ok()) {
                    Some(deal) => {
                        deal["stage"] = said["stage"].clone();
                        Reply::json(deal.to_string())
                    }
                    None => Reply::status(404),
                }
            }
            _ => {
                self.wants(false, "nobody may ask for this", seen);
                Reply::status(404)
            }
        }
    }

    fn breaches(&mut self) -> &mut Vec<String> {
        &mut self.breaches
    }
}

impl Rules for Provider {
    fn answer(&mut self, seen: &RequestSeen, url: &Url) -> Reply {
        let shared = Arc::clone(&self.book);
        let mut book = open(&shared);
        self.wants((&*seen.method, url.path()) == ("POST", "/oauth/token"), "nobody may ask for this", seen);
        let client = STANDARD.encode(format!("restcast:{CLIENT_SECRET}"));
        self.wants(seen.header("authorization") == Some(&format!("Basic {client}")), "another client", seen);
        if book.down {
            return Reply::status(503);
        }
        let form: HashMap<String, String> = url::form_urlencoded::parse(&seen.body).into_owned().collect();
        let whose = match form.get("grant_type").map(String::as_str) {
            Some("client_credentials") => {
                self.wants(form.get("scope").is_some_and(|scope| scope == "contacts.read"), "another scope", seen);
                Whose::Client
            }
            Some("refresh_token") => {
                let is_good = form.get("refresh_token").is_some_and(|token| book.refresh.remove(token));
                self.wants(is_good, "a refresh token that was used", seen);
                if !is_good {
                    return Reply::json("{\"error\":\"invalid_grant\"}").with_status(400);
                }
                Whose::Person
            }
            _ => {
                self.wants(false, "no grant that is known", seen);
                return Reply::status(400);
            }
        };
        let number = book.given(whose) + 1;
        book.given.insert(whose, number);
        // Nobody asks for another one before seven tenths of its life are over, unless it was refused. The request for this
        // one may have come late, and that for the next one in time.
        let early = book.age(whose) < LIFE * 6 / 10;
        book.last.insert(whose, Instant::now());
        let was_refused = book.refused.remove(&whose);
        self.wants(!early || was_refused, "asked for a token too early", seen);
        let token = format!("crm-access-hunter2-{whose:?}-{number}");
        let mut answer = json!({ "access_token": token, "token_type": "Bearer", "expires_in": LIFE.as_secs() });
        if whose == Whose::Person {
            let next = format!("crm-refresh-hunter2-{number}");
            answer["refresh_token"] = next.clone().into();
            book.refresh.insert(next);
        }
        book.good.insert(token, (whose, Instant::now() + LIFE + GRACE));
        Reply::json(answer.to_string())
    }

    fn breaches(&mut self) -> &mut Vec<String> {
        &mut self.breaches
    }
}
