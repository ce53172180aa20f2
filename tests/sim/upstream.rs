//! The model of the upstreams: what each URL has served, and what it answers next.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use restcast::stream::poll::{FetchError, FetchRequest, FetchResponse, FetchResult, UpstreamCode, Validators};
use restcast::time::WallTime;
use serde_json::{Value, json};

use super::dice::Dice;

/// How an upstream behaves at present.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Mood {
    /// Everything happens.
    Wild,
    /// Every answer is a value, which never changes.
    Calm,
}

#[derive(Debug, Default)]
struct Resource {
    /// The version served last.
    version: u64,
    volatile: u64,
    items: BTreeMap<u64, u64>,
    pad: usize,
    /// What agents see of it besides the ids of its items; it changes less often than the rest.
    public: u64,
    text: Vec<u8>,
    /// How many of the last answers were no values.
    polled_badly: u32,
    /// What agents see of it now, and all that they ever saw: members sorted.
    shown: String,
    ever_shown: HashSet<String>,
    /// What each choice leaves of it now, and all that it ever left, by the choice and whether it is made of what agents see.
    chosen: HashMap<(usize, bool), (String, HashSet<String>)>,
    /// Every value served, by version and volatile part, minified.
    served: HashMap<(u64, u64), Vec<u8>>,
}

/// All upstreams.
#[derive(Debug)]
pub struct Upstream {
    resources: BTreeMap<String, Resource>,
    pub mood: Mood,
    pub huge: bool,
}

/// What clients may select of a value.
pub struct Choice {
    /// Two spellings of one path.
    pub spellings: [&'static str; 2],
    /// What it leaves, found by another reader of JSON.
    find: fn(&Value) -> Value,
}

/// The choices that there are.
pub const CHOICES: [Choice; 6] = [
    Choice { spellings: ["$.items", "$ [\"items\"]"], find: |value| member(value, "items") },
    Choice { spellings: ["$.public", "$['public']"], find: |value| member(value, "public") },
    // Agents do not see it: it is null, always.
    Choice { spellings: ["$.version", "$['version']"], find: |value| member(value, "version") },
    Choice {
        spellings: ["$.items[*].id", "$['items'] [*] [\"id\"]"],
        find: |value| items(value).into_iter().map(|item| member(item, "id")).collect(),
    },
    Choice {
        spellings: ["$.items[?@.id<4].value", "$['items'][? @['id'] < 4 ]['value']"],
        find: |value| {
            let low = |item: &&&Value| item["id"].as_u64().is_some_and(|id| id < 4);
            items(value).iter().filter(low).filter_map(|item| item.get("value")).cloned().collect()
        },
    },
    Choice { spellings: ["$.nothing", "$['nothing']"], find: |_| Value::Null },
];

fn member(value: &Value, name: &str) -> Value {
    value.get(name).cloned().unwrap_or_default()
}

fn items(value: &Value) -> Vec<&Value> {
    value["items"].as_array().into_iter().flatten().collect()
}

/// The number behind `"name":` in a value this upstream made.
fn number(value: &[u8], name: &str) -> Option<u64> {
    let text = std::str::from_utf8(value).ok()?;
    let at = text.find(&format!("\"{name}\":"))? + name.len() + 3;
    let digits: String = text[at..].chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

/// The version of a value this upstream made.
pub fn version(value: &[u8]) -> u64 {
    number(value, "version").expect("every value has its version")
}

/// The version and the volatile part of a value this upstream made: no two values of one URL share both.
pub fn place(value: &[u8]) -> (u64, u64) {
    (version(value), number(value, "volatile").unwrap_or(0))
}

/// Whether that is all of a value: it has its version, which agents do not see.
pub fn is_whole(value: &[u8]) -> bool {
    number(value, "version").is_some()
}

/// A value that agents see, members sorted.
pub fn sorted(value: &[u8]) -> String {
    serde_json::from_slice::<serde_json::Value>(value).expect("a value is JSON").to_string()
}

impl Upstream {
    pub fn new() -> Upstream {
        Upstream { resources: BTreeMap::new(), mood: Mood::Wild, huge: false }
    }

    /// The version that `url` served last.
    pub fn newest(&self, url: &str) -> u64 {
        self.resources.get(url).map_or(0, |resource| resource.version)
    }

    /// Whether this is what a choice leaves of the newest of what `url` has served, or of what agents see of that.
    pub fn is_newest_choice(&self, url: &str, choice: usize, value: &[u8]) -> bool {
        let Some(resource) = self.resources.get(url) else { return false };
        let value = sorted(value);
        [false, true].iter().any(|part| resource.chosen.get(&(choice, *part)).is_some_and(|(now, _)| *now == value))
    }

    /// Whether a choice has left exactly this of something that `url` has served; `part`: of what agents see.
    pub fn has_served_choice(&self, url: &str, choice: usize, part: bool, value: &[u8]) -> bool {
        let chosen = self.resources.get(url).and_then(|resource| resource.chosen.get(&(choice, part)));
        chosen.is_some_and(|(_, ever)| ever.contains(&sorted(value)))
    }

    /// Whether this is the newest of what `url` has served: of the part that agents see, where it is such a part.
    pub fn is_newest(&self, url: &str, value: &[u8]) -> bool {
        let Some(resource) = self.resources.get(url) else { return false };
        if is_whole(value) { version(value) == resource.version } else { sorted(value) == resource.shown }
    }

    /// Whether `url` has served exactly this value, or a value of which agents see exactly this.
    pub fn has_served(&self, url: &str, value: &[u8]) -> bool {
        let Some(resource) = self.resources.get(url) else { return false };
        if !is_whole(value) {
            return resource.ever_shown.contains(&sorted(value));
        }
        let Some(served) = resource.served.get(&place(value)) else { return false };
        // Patches may put members in another order, which JSON takes for the same.
        let parse = |text: &[u8]| serde_json::from_slice::<serde_json::Value>(text).ok();
        served == value || parse(served) == parse(value)
    }

    /// The answer to a poll of what is kept under that URL.
    pub fn answer(&mut self, dice: &mut Dice, request: &FetchRequest, url: &str, received: WallTime) -> FetchResult {
        let url = url.to_owned();
        let resource = self.resources.entry(url.clone()).or_default();
        if resource.version == 0 {
            resource.change(dice, &url, false);
        }
        let error = |code| Err(FetchError { code, detail: "a fault of the model".to_owned() });
        let mut response = FetchResponse {
            status: 200,
            validators: Validators::default(),
            retry_after: None,
            fresh_for: None,
            body: Vec::new(),
            received,
        };
        let etag = |resource: &Resource| format!("\"{}.{}\"", resource.version, resource.volatile).into_bytes();
        let described = url.starts_with("http://direct/");
        if self.mood == Mood::Wild && (!described || resource.polled_badly < 2) {
            let fate = dice.below(100);
            // Who fails again and again is left alone for longer than a world rests.
            resource.polled_badly = if fate < 80 { 0 } else { resource.polled_badly + 1 };
            match fate {
                80..83 if described => return error(UpstreamCode::Blocked),
                0..45 => resource.change(dice, &url, self.huge),
                45..55 => resource.change_volatile(&url),
                55..80 => {}
                80..84 => return error(UpstreamCode::Timeout),
                84..87 => return error(UpstreamCode::Unreachable),
                87..91 => {
                    response.status = 500;
                    return Ok(response);
                }
                91..93 => {
                    response.status = 429;
                    response.retry_after = Some(Duration::from_secs(dice.below(3)));
                    return Ok(response);
                }
                93..96 => {
                    response.body = b"<html>oops</html>".to_vec();
                    return Ok(response);
                }
                96..98 => {
                    response.body = b"{\"a\":1,\"a\":2}".to_vec();
                    return Ok(response);
                }
                // A 304 that nothing asked for, or the right answer to what was asked.
                _ => {
                    response.status = 304;
                    return Ok(response);
                }
            }
        }
        resource.polled_badly = 0;
        if request.validators.etag.as_deref() == Some(&*etag(resource)) {
            response.status = 304;
            return Ok(response);
        }
        if dice.percent(60) {
            response.validators.etag = Some(etag(resource).into_boxed_slice());
        }
        response.body = resource.text.clone();
        if self.mood == Mood::Wild && dice.percent(20) {
            // The same value with other white space is the same value.
            response.body = String::from_utf8(response.body).expect("JSON is UTF-8").replace(':', ": ").into_bytes();
        }
        Ok(response)
    }

    /// Gives every resource one more version, which everybody sees: what is held at rest must be that.
    pub fn renew_all(&mut self, dice: &mut Dice) {
        for (url, resource) in &mut self.resources {
            resource.public += 1;
            resource.change(dice, url, false);
        }
    }
}

impl Upstream {
    /// One more version of what `url` serves, with nothing in it that agents see.
    pub fn renew_hidden(&mut self, url: &str) {
        let resource = self.resources.get_mut(url).expect("it has been polled");
        resource.version += 1;
        resource.write(url);
    }
}

impl Resource {
    fn change(&mut self, dice: &mut Dice, url: &str, huge: bool) {
        self.version += 1;
        for _ in 0..=dice.below(3) {
            let id = dice.below(8);
            if dice.percent(30) {
                self.items.remove(&id);
            } else {
                self.items.insert(id, self.version);
            }
        }
        self.public += u64::from(dice.percent(20));
        self.pad = match dice.below(40) {
            0 if huge => 300_000,
            0..3 => 3_000,
            3..6 => 0,
            _ => 200,
        };
        self.write(url);
    }

    fn change_volatile(&mut self, url: &str) {
        self.volatile += 1;
        self.write(url);
    }

    fn write(&mut self, url: &str) {
        let items: Vec<String> =
            self.items.iter().map(|(id, value)| format!("{{\"id\":{id},\"value\":{value}}}")).collect();
        self.text = format!(
            "{{\"source\":{:?},\"version\":{},\"volatile\":{},\"public\":{},\"items\":[{}],\"pad\":\"{}\"}}",
            url.trim_start_matches("http://"),
            self.version,
            self.volatile,
            self.public,
            items.join(","),
            "x".repeat(self.pad)
        )
        .into_bytes();
        self.served.insert((self.version, self.volatile), self.text.clone());
        let ids: Vec<String> = self.items.keys().map(|id| format!("{{\"id\":{id}}}")).collect();
        let source = url.trim_start_matches("http://");
        self.shown = format!("{{\"items\":[{}],\"public\":{},\"source\":{source:?}}}", ids.join(","), self.public);
        self.ever_shown.insert(self.shown.clone());
        let items: Vec<Value> = self.items.iter().map(|(id, value)| json!({ "id": id, "value": value })).collect();
        let whole = json!({ "version": self.version, "public": self.public, "items": items });
        let part: Value = serde_json::from_str(&self.shown).expect("it is JSON");
        for (place, choice) in CHOICES.iter().enumerate() {
            for (is_part, value) in [(false, &whole), (true, &part)] {
                let found = (choice.find)(value).to_string();
                let (now, ever) = self.chosen.entry((place, is_part)).or_default();
                ever.insert(found.clone());
                *now = found;
            }
        }
    }
}
