//! A shop whose list comes in pages, each of which names the next by a cursor that is good for once, to whoever shows the
//! key in a header, at most 12 requests a second.

use std::collections::BTreeSet;
use std::time::Instant;

use serde_json::{Value, json};
use url::Url;

use super::{Rules, param};
use crate::support::{Reply, RequestSeen};

pub const KEY: &str = "shop-key-hunter2";
const RATE: f64 = 12.0;
const BURST: f64 = 40.0;

pub struct Shop {
    pub products: Vec<Value>,
    /// Cursors that were given and not used: the place that each leads to.
    cursors: BTreeSet<usize>,
    given: usize,
    /// Pages that were asked for since the last first one, and by the poll before.
    pages: usize,
    pub pages_of_last: usize,
    /// The page that fails.
    pub fails_at: Option<usize>,
    /// Polls that were begun.
    pub polls: usize,
    bucket: (f64, Instant),
    breaches: Vec<String>,
}

impl Shop {
    pub fn new(products: usize) -> Shop {
        Shop {
            products: (0..products).map(product).collect(),
            cursors: BTreeSet::new(),
            given: 0,
            pages: 0,
            pages_of_last: 0,
            fails_at: None,
            polls: 0,
            bucket: (BURST, Instant::now()),
            breaches: Vec::new(),
        }
    }

    /// What everybody may see.
    pub fn shown(&self) -> Value {
        let of = |product: &Value| json!({ "sku": product["sku"], "title": product["title"], "price": product["price"], "stock": product["stock"] });
        self.products.iter().map(of).collect::<Vec<_>>().into()
    }
}

/// A product.
pub fn product(number: usize) -> Value {
    json!({ "sku": format!("S{number}"), "title": format!("Thing {number}"), "price": "9.90", "stock": 5, "cost": "4.00" })
}

impl Rules for Shop {
    fn answer(&mut self, seen: &RequestSeen, url: &Url) -> Reply {
        self.wants(seen.header("x-shop-key") == Some(KEY), "no key", seen);
        self.wants(seen.header("if-none-match").is_none(), "a condition on a page", seen);
        self.wants(
            url.path() == "/v2/products" && param(url, "page_size").as_deref() == Some("50"),
            "not the list",
            seen,
        );
        let (level, at) = self.bucket;
        let level = (level + at.elapsed().as_secs_f64() * RATE).min(BURST) - 1.0;
        self.bucket = (level, Instant::now());
        self.wants(level >= 0.0, "more than the rate", seen);
        if level < 0.0 {
            return Reply::status(429);
        }
        let start = match param(url, "cursor") {
            None => {
                (self.polls, self.pages_of_last, self.pages) = (self.polls + 1, self.pages, 0);
                0
            }
            Some(cursor) => {
                let (id, start) = cursor.split_once('-').expect("a cursor of ours");
                let is_good = self.cursors.remove(&id.parse().expect("a number"));
                self.wants(is_good, "a cursor that was used", seen);
                start.parse().expect("a number")
            }
        };
        self.pages += 1;
        if self.fails_at == Some(self.pages) {
            return Reply::status(500);
        }
        let end = (start + 50).min(self.products.len());
        let page = Value::from(self.products[start..end].to_vec());
        let reply = Reply::json(page.to_string()).header("ETag", &format!("\"{start}\""));
        if end == self.products.len() {
            return reply;
        }
        self.given += 1;
        self.cursors.insert(self.given);
        reply.header("Link", &format!("<?page_size=50&cursor={}-{end}>; rel=\"next\"", self.given))
    }

    fn breaches(&mut self) -> &mut Vec<String> {
        &mut self.breaches
    }
}
