//! A provider of market data that counts: 30 requests in 5 s for a key, told by `RateLimit` and `RateLimit-Policy`, and
//! 12 a second at the most, of which 12 may come at once.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use url::Url;

use super::{Rules, Window, param};
use crate::support::{Reply, RequestSeen};

pub const KEY: &str = "market-key-hunter2";

const RATE: f64 = 12.0;
const BURST: f64 = 12.0;

pub struct Market {
    /// The price of each symbol, in cents.
    prices: BTreeMap<String, u64>,
    /// Whether prices move with each request.
    pub moves: bool,
    /// Of this one there is nothing for the next 12 s.
    pub pauses: Option<&'static str>,
    asked: u64,
    pub window: Window,
    bucket: (f64, Instant),
    breaches: Vec<String>,
}

impl Market {
    pub fn new() -> Market {
        Market {
            prices: BTreeMap::new(),
            moves: true,
            pauses: None,
            asked: 0,
            window: Window::new(30, Duration::from_secs(5)),
            bucket: (BURST, Instant::now()),
            breaches: Vec::new(),
        }
    }

    /// What a symbol costs.
    pub fn price(&self, symbol: &str) -> u64 {
        self.prices[symbol]
    }

    pub fn set_price(&mut self, symbol: &str, cents: u64) {
        self.prices.insert(symbol.to_owned(), cents);
    }
}

impl Rules for Market {
    fn answer(&mut self, seen: &RequestSeen, url: &Url) -> Reply {
        self.asked += 1;
        self.wants(param(url, "apikey").as_deref() == Some(KEY), "no key", seen);
        self.window.begin();
        let within = self.window.take();
        self.wants(within, "over the budget", seen);
        let (level, at) = self.bucket;
        let level = (level + at.elapsed().as_secs_f64() * RATE).min(BURST) - 1.0;
        self.bucket = (level, Instant::now());
        self.wants(level >= 0.0, "more than the rate", seen);
        let body: Value = match url.path() {
            _ if !within || level < 0.0 => Value::Null,
            "/v1/ticker" => {
                let symbol = param(url, "symbol").unwrap_or_default();
                let listed =
                    ["BTC", "ETH", "SOL", "XRP", "ADA", "DOT"].iter().any(|name| symbol == format!("{name}-EUR"));
                self.wants(listed, "no such symbol", seen);
                let price = self.prices.entry(symbol.clone()).or_insert(100_000);
                *price += u64::from(self.moves);
                json!({ "symbol": symbol, "price": format!("{}.{:02}", *price / 100, *price % 100), "server_time": self.asked })
            }
            "/v1/shares" | "/v1/settlements" => json!({ "of": url.path() }),
            _ => {
                self.wants(false, "nobody may ask for this", seen);
                Value::Null
            }
        };
        let pauses =
            self.pauses.take_if(|symbol| url.path() == "/v1/ticker" && param(url, "symbol").as_deref() == Some(symbol));
        if pauses.is_some() {
            return Reply::status(429).header("Retry-After", "12");
        }
        let (left, reset) = self.window.told();
        Reply::json(body.to_string())
            .with_status(if body.is_null() { 429 } else { 200 })
            .header("RateLimit-Policy", "\"key\";q=30;w=5")
            .header("RateLimit", &format!("\"key\";r={left};t={}", reset.as_millis().div_ceil(1_000)))
    }

    fn breaches(&mut self) -> &mut Vec<String> {
        &mut self.breaches
    }
}
