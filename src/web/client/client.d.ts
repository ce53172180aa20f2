// Types of restcast's browser client. SPDX-License-Identifier: MIT OR Apache-2.0

/** What `getToken` may give: a JWT, a one-time ticket (`POST /v1/tickets`), or nothing: cookies are sent, or none is needed. */
export type Credential = string | { ticket: string } | null | undefined;

/** Why a credential is asked for: to connect, because the last one ended or was refused, or because the server asks for the next. */
export type Reason = 'connect' | 'expired' | 'reauthenticate';

export type Transport = 'websocket' | 'sse' | 'polling';

/** What upstream is like: `live`; `stale`: the last poll failed, a value is held; `failing`: failed, and there is none yet. */
export interface Upstream {
  state: 'live' | 'stale' | 'failing' | 'ended';
  /** `UPSTREAM_TIMEOUT` and so on; of a subscription that the server has refused for now `TOO_MANY_STREAMS` and its like, and of one that is over why. */
  code?: string;
  retry_in_ms?: number;
}

export interface Status {
  /** `waiting`: for the next try. `closed`: by `close()`, or for good: `code` says why. */
  state: 'connecting' | 'live' | 'waiting' | 'closed';
  transport?: Transport;
  /** Of the one stream; on `/v1/ws` each subscription has its own. */
  upstream?: Upstream;
  /** When the credential ends, in milliseconds since the Unix epoch, where it does and it is known. */
  expiresAt?: number;
  /** Why it is waiting or closed: a WebSocket close code (4010: signed out), an HTTP status, 1000 for `close()`. */
  code?: number;
  /** The reason of the close (`token_expired`), the code of the refusal (`STREAM_NOT_FOUND`), or what the client saw (`gap`). */
  reason?: string;
  /** When `waiting`: until the next try. */
  retryInMs?: number;
}

/** A frame of the protocol that moved the value. `ts` is in microseconds since the Unix epoch; polling has none. */
export interface Change {
  type: 'snapshot' | 'patch' | 'merge';
  stream?: string;
  epoch?: string;
  seq?: number;
  base?: number;
  ts?: number;
}

/** An operation of RFC 6902. */
export interface Operation {
  op: 'add' | 'remove' | 'replace' | 'move' | 'copy' | 'test';
  path: string;
  from?: string;
  value?: unknown;
}

export interface StreamOptions<T> {
  /** How changes travel; `patch` unless set. The value is the same in each. */
  format?: 'patch' | 'merge' | 'full';
  /** A JSONPath (RFC 9535): what of the value is wanted. */
  select?: string;
  /** At most one event in so many milliseconds. */
  maxRateMs?: number;
  /** A value that is held already, and its place (`at`): the stream goes on from there. */
  value?: T;
  since?: string;
  /** The value as of each change. It is never modified: what changed is a new object, what did not is the same one. */
  onValue?(value: T, change: Change): void;
  /** Before `onValue`, where a change came as one: operations (`patch`) or an RFC 7396 merge (`merge`). */
  onPatch?(delta: Operation[] | unknown, change: Change): void;
}

export interface Options<T> extends StreamOptions<T> {
  /** Asked at every connect and whenever the server wants the next credential; has 30 seconds. */
  getToken?(why: { reason: Reason }): Credential | Promise<Credential>;
  onStatus?(status: Status): void;
  /** Of this connection, after a change of them or a renewal. */
  onPermissions?(rights: { permissions?: string[]; roles?: string[] }): void;
  /** What went wrong and stops nothing: a callback that threw, `getToken` that failed, a refused renewal. `console.error` unless set. */
  onError?(error: RestcastError): void;
  /** One connection for all tabs of this origin that ask for the same stream (`/v1/ws` is not shared). A string (the user's id) keeps users apart. */
  shared?: boolean | string;
  /** Which are tried, best first; `['websocket', 'sse', 'polling']` unless set. */
  transports?: Transport[];
  /** Bound of the first wait before a retry; it doubles. 500 unless set. */
  backoffMs?: number;
  /** The most that bound becomes. 30,000 unless set. */
  backoffMaxMs?: number;
  /** A connection this old has proved itself: the back-off starts anew. 10,000 unless set. */
  stableMs?: number;
  /** About how long a lesser transport is kept before better ones are tried beside it; doubles four times. 60,000 unless set. */
  upgradeMs?: number;
}

/** `code` is one of the protocol's (`ACTION_FAILED`, …), or `DISCONNECTED`, `TIMEOUT`, `CLOSED`, `NO_WEBSOCKET`, `ID_IN_USE`. */
export interface RestcastError extends Error {
  code?: string | number;
  status?: number;
  reason?: string;
  body?: unknown;
}

export interface Subscription<T> {
  /** The newest value; undefined before the first. */
  readonly value: T | undefined;
  /** Its place, `<epoch>-<seq>`: what `since` takes. */
  readonly at: string | undefined;
  close(): void;
}

export interface SubscriptionOptions<T> extends StreamOptions<T> {
  /** The upstream's state; `ended` with `code` when this subscription is over. */
  onStatus?(upstream: Upstream): void;
}

export interface Connection<T> extends Subscription<T> {
  readonly status: Status;
  readonly state: Status['state'];
  readonly transport: Transport | undefined;
  /** Sends an action, over a WebSocket (this tab's or, shared, the leading one's), and gives its result; rejects with a `RestcastError`. An `id` is sent as it is and finds the answer; it may be used again when that has come. */
  send(action: { type: string; id?: number | string; [member: string]: unknown }): Promise<{ status: number; body?: unknown }>;
  /** Asks `getToken` (the leading tab's) now and renews in band, for instance after rights have changed. */
  renew(): Promise<unknown>;
  /** On `/v1/ws` alone: one more stream on this connection, each name once. */
  subscribe<S = unknown>(stream: string, options?: SubscriptionOptions<S>): Subscription<S>;
}

/**
 * Watches `url`: `https://host/v1/streams/{id}` for one stream, `https://host/v1/ws` for many (WebSocket alone). Relative
 * URLs are the page's. It reconnects by itself until `close()`, or until the server's word is final.
 */
export function connect<T = unknown>(url: string | URL, options?: Options<T>): Connection<T>;

/** RFC 6902: `value` with `patch` applied; `value` itself is left as it is. Throws where it does not apply. */
export function applyPatch<T = unknown>(value: unknown, patch: Operation[]): T;

/** RFC 7396: `value` with `merge` applied; `value` itself is left as it is. */
export function applyMerge<T = unknown>(value: unknown, merge: unknown): T;
