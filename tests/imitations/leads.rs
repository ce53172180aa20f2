//! An API that answers for every tenant to whoever has its one key, and counts for whom it was asked.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use url::Url;

use super::{Rules, param, segments};
use crate::support::{Reply, RequestSeen};

pub const KEY: &str = "leads-key-hunter2";

pub struct Leads {
    /// Of each company.
    pub companies: BTreeMap<String, Value>,
    asked: u64,
    breaches: Vec<String>,
}

impl Leads {
    pub fn new() -> Leads {
        let companies = ["42", "43"].map(|company| (company.to_owned(), leads(company)));
        Leads { companies: companies.into(), asked: 0, breaches: Vec::new() }
    }

    /// What managers see, but for what is of no event.
    pub fn whole(&self, company: &str) -> Value {
        json!({ "leads": self.companies[company] })
    }

    /// What agents see.
    pub fn for_agents(&self, company: &str) -> Value {
        let of = |lead: &Value| json!({ "id": lead["id"], "name": lead["name"], "status": lead["status"] });
        let leads: Vec<Value> = self.companies[company].as_array().expect("a list").iter().map(of).collect();
        json!({ "leads": leads })
    }

    pub fn change(&mut self, company: &str, at: usize, member: &str, value: Value) {
        self.companies.get_mut(company).expect("a company")[at][member] = value;
    }
}

fn leads(company: &str) -> Value {
    let lead = |id: u32| json!({ "id": id, "name": format!("{company}: {id}"), "status": "open", "value": 1_000 * id });
    (1..=6).map(lead).collect::<Vec<_>>().into()
}

impl Rules for Leads {
    fn answer(&mut self, seen: &RequestSeen, url: &Url) -> Reply {
        self.asked += 1;
        self.wants(seen.header("x-api-key") == Some(KEY), "no key", seen);
        self.wants(seen.header("authorization").is_none(), "a caller's token was sent on", seen);
        let region = param(url, "region").is_some_and(|region| region == "eu" || region == "us");
        match segments(url)[..] {
            ["companies", company, "leads"] if region && self.companies.contains_key(company) => {
                Reply::json(json!({ "generated_at": self.asked, "leads": self.companies[company] }).to_string())
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
