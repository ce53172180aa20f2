//! One upstream resource: polled once, compared, and kept as a log of events.

pub mod apply;
pub mod diff;
pub mod log;
pub mod poll;
pub mod template;

use std::sync::Arc;
use std::time::Duration;

use crate::ids::StreamId;
use crate::secret::Secret;

/// One `[[stream]]` of the configuration, parsed and checked.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its id, and the name in frames where it has no `params`.
    pub id: StreamId,
    /// The upstream's URL, with its placeholders.
    pub url: template::UrlTemplate,
    /// Time from the start of one poll to the start of the next; at least 1 ms.
    pub interval: Duration,
    /// `GET`, `POST`, … (a token, RFC 9110 section 5.6.2, upper case).
    pub method: String,
    /// Static request headers; the values may be secrets and are never shown.
    pub headers: Vec<(String, Secret)>,
    /// The request's body, with its placeholders.
    pub body: Option<template::BodyTemplate>,
    /// Names a caller may fill as `{query.NAME}`, sorted, each with the pattern its value must match, if any.
    pub params: Vec<Param>,
    /// Roots to trust instead of the system's.
    pub ca: Option<CaFile>,
    /// For the TCP and TLS handshakes.
    pub connect_timeout: Duration,
    /// From the request's last byte to the response's first.
    pub first_byte_timeout: Duration,
    /// For the whole exchange.
    pub timeout: Duration,
    /// Bytes of a response body, inflated.
    pub response_bytes_max: u64,
    /// Longest wait between polls that fail.
    pub backoff_max: Duration,
    /// How long polling goes on after the last watcher.
    pub linger: Duration,
    /// Whether polling goes on without watchers.
    pub keep_warm: bool,
    /// Events kept for resume.
    pub history: u32,
    /// Bytes of events kept for resume.
    pub history_bytes: u64,
    /// JSON pointers (RFC 6901) left out of the comparison.
    pub ignore: Vec<diff::Pointer>,
    /// Member by which the objects of an array are matched.
    pub array_key: Option<String>,
    /// Whether a caller without a credential may watch.
    pub allow_anonymous: bool,
    /// Any one of these is needed, where there are some.
    pub roles: Vec<String>,
    /// All of these are needed.
    pub permissions: Vec<String>,
}

/// One name of `params`.
#[derive(Clone, Debug)]
pub struct Param {
    /// The NAME of `{query.NAME}`.
    pub name: String,
    /// What a value must match, anywhere in it unless anchored.
    pub pattern: Option<regex_lite::Regex>,
}

/// A file of PEM certificates, read when the configuration was.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct CaFile {
    /// Where it was read from, for messages.
    pub path: String,
    /// Its contents.
    pub pem: Arc<[u8]>,
}
