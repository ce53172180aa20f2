//! In the manner of GitHub's REST API: ETags whose 304s are free, an hourly budget told in `X-RateLimit-*` with its reset as
//! a time of the epoch, 403 past it, lists in pages by `Link`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use url::Url;

use super::{Rules, Window, param, segments};
use crate::support::{Reply, RequestSeen};

pub const TOKEN: &str = "github_pat_hunter2";
const HOUR: Duration = Duration::from_secs(3600);
/// Issues of a page.
const PER_PAGE: usize = 100;

pub struct GitHub {
    /// Of each repository: how often they have changed, and the pull requests.
    pulls: BTreeMap<String, (u32, Value)>,
    /// Repositories whose ETag was given.
    tagged: BTreeSet<String>,
    /// Of the repository `website`.
    issues: Vec<Value>,
    pub window: Window,
    /// Answers by their status.
    pub answers: BTreeMap<u16, usize>,
    breaches: Vec<String>,
}

impl GitHub {
    pub fn new() -> GitHub {
        let pulls = ["website", "app"].map(|repo| {
            let pulls: Vec<Value> = (1..=8).map(|number| pull(repo, number)).collect();
            (repo.to_owned(), (0, pulls.into()))
        });
        let issues = (1..=250).map(|number| json!({ "number": number, "title": format!("Issue {number}") })).collect();
        GitHub {
            pulls: pulls.into(),
            tagged: BTreeSet::new(),
            issues,
            window: Window::new(5_000, HOUR),
            answers: BTreeMap::new(),
            breaches: Vec::new(),
        }
    }

    /// Changes a member of a pull request.
    pub fn change(&mut self, repo: &str, at: usize, member: &str, value: Value) {
        let (version, pulls) = self.pulls.get_mut(repo).expect("a repository");
        *version += 1;
        pulls[at][member] = value;
    }

    /// What a page shows of the pull requests.
    pub fn shown(&self, repo: &str) -> Value {
        let of = |pull: &Value| {
            json!({ "number": pull["number"], "title": pull["title"], "draft": pull["draft"],
                    "user": pull["user"]["login"], "updated_at": pull["updated_at"] })
        };
        self.pulls[repo].1.as_array().expect("a list").iter().map(of).collect::<Vec<_>>().into()
    }

    /// All issues.
    pub fn issues(&self) -> Value {
        self.issues.clone().into()
    }

    /// Renames an issue.
    pub fn rename(&mut self, number: usize, title: &str) {
        self.issues[number - 1]["title"] = title.into();
    }

    pub fn answered(&self, status: u16) -> usize {
        self.answers.get(&status).copied().unwrap_or(0)
    }

    fn judge(&mut self, seen: &RequestSeen, url: &Url) -> Reply {
        if seen.header("authorization") != Some(&format!("Bearer {TOKEN}")) {
            return Reply::status(401);
        }
        let told = self.window.begin();
        self.wants(told, "asked although the budget is known to be spent", seen);
        let agent = seen.header("user-agent").is_some_and(|agent| agent.starts_with("restcast/"));
        self.wants(agent, "no User-Agent", seen);
        let versioned = seen.header("x-github-api-version") == Some("2022-11-28")
            && seen.header("accept") == Some("application/vnd.github+json");
        self.wants(versioned, "not the version that was configured", seen);
        self.wants(param(url, "per_page").as_deref() == Some("100"), "another URL", seen);
        if self.window.used > self.window.limit {
            return Reply::json("{\"message\":\"API rate limit exceeded\"}").with_status(403);
        }
        let reply = match segments(url)[..] {
            ["repos", "acme", repo, "pulls"] if self.pulls.contains_key(repo) => {
                let (version, pulls) = &self.pulls[repo];
                let (etag, text) = (format!("W/\"{repo}-{version}\""), pulls.to_string());
                if seen.header("if-none-match") == Some(&etag) {
                    return Reply::status(304).header("ETag", &etag);
                }
                let known = !self.tagged.insert(repo.to_owned());
                let conditional = seen.header("if-none-match").is_some();
                self.wants(conditional || !known, "asked again without a condition", seen);
                Reply::json(text).header("ETag", &etag).header("Cache-Control", "private, max-age=60, s-maxage=60")
            }
            ["repos", "acme", "website", "issues"] | ["repositories", "17", "issues"] => self.page(url),
            _ => {
                self.wants(false, "nobody may ask for this", seen);
                Reply::status(404)
            }
        };
        let within = self.window.take();
        self.wants(within, "over the budget", seen);
        reply
    }

    fn page(&self, url: &Url) -> Reply {
        let page: usize = param(url, "page").map_or(1, |page| page.parse().expect("a page"));
        let mut pages = self.issues.chunks(PER_PAGE);
        let last = pages.len();
        let items = pages.nth(page - 1).unwrap_or_default();
        let mut links = Vec::new();
        let mut link = |page: usize, rel: &str| {
            let mut to = url.clone();
            to.set_path("/repositories/17/issues");
            to.set_query(Some(&format!("state=open&per_page=100&page={page}")));
            links.push(format!("<{to}>; rel=\"{rel}\""));
        };
        if page > 1 {
            link(page - 1, "prev");
        }
        if page < last {
            link(page + 1, "next");
            link(last, "last");
        }
        Reply::json(Value::from(items.to_vec()).to_string())
            .header("ETag", "\"a page\"")
            .header("Link", &links.join(", "))
    }
}

fn pull(repo: &str, number: u32) -> Value {
    json!({
        "number": number, "title": format!("{repo} {number}"), "draft": true, "updated_at": "2026-11-23T02:30:00Z",
        "user": { "login": "ada", "id": 7 }, "body": "x".repeat(500), "head": { "sha": "0".repeat(40) },
    })
}

impl Rules for GitHub {
    fn answer(&mut self, seen: &RequestSeen, url: &Url) -> Reply {
        let reply = self.judge(seen, url);
        *self.answers.entry(reply.code()).or_default() += 1;
        if reply.code() == 401 {
            return reply;
        }
        let (left, until_reset) = self.window.told();
        let reset = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970") + until_reset;
        reply
            .header("X-RateLimit-Limit", &self.window.limit.to_string())
            .header("X-RateLimit-Remaining", &left.to_string())
            .header("X-RateLimit-Used", &self.window.used.to_string())
            .header("X-RateLimit-Reset", &reset.as_millis().div_ceil(1_000).to_string())
            .header("X-RateLimit-Resource", "core")
    }

    fn breaches(&mut self) -> &mut Vec<String> {
        &mut self.breaches
    }
}
