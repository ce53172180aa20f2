// Verifies what restcast proves of its events. Node 18 or newer, no dependency.
//
//   verifyFrame(text, keys, expected)         the text of a frame, byte for byte as it came (over SSE: its `data`)
//   verifyResponse(header, stream, etag, body, keys, expected)    a JSON answer and its X-Restcast-Signature
//   scopeOf(expected, secret)                 what `scope` of an event must be
//   parse(text) / canonical(value)            JSON with numbers that keep their spelling / its canonical form
//   hashOf(value)                             what `hash` of an event must be of the value that you hold
//
// `keys` maps a `kid` to its secret, a Buffer or string. `expected` says whose value it has to be: `{ stream, claims, view,
// select }`: the stream's name in frames, the claims that fill its templates, the number of the view, what is selected in its
// normal spelling; what is left out is none. Without `expected` a frame of another tenant, view or `select` is as good.
import { createHash, createHmac, timingSafeEqual } from "node:crypto";

function same(a, b) {
  const [left, right] = [Buffer.from(a, "utf8"), Buffer.from(b, "utf8")];
  return left.length === right.length && timingSafeEqual(left, right);
}

/** What `scope` is where the sequence is the one `expected`. */
export function scopeOf({ stream, claims = {}, view = null, select = null }, secret) {
  const form = canonical(new Map(Object.entries({ claims: new Map(Object.entries(claims)), select, stream, view })));
  return createHmac("sha256", secret).update(`scope.${form}`, "utf8").digest("hex");
}

/** Whether `text` was signed with one of `keys`. What is signed is all of it before `,"sig":`, its last member. */
export function verifyFrame(text, keys, expected) {
  const end = /,"sig":"([0-9a-f]{64})"\}$/.exec(text);
  if (!end) return false;
  const signed = text.slice(0, end.index);
  const named = /,"scope":"([0-9a-f]{64})","kid":"([A-Za-z0-9._:~-]{1,64})"$/.exec(signed);
  if (!named || !Object.hasOwn(keys, named[2])) return false;
  const secret = keys[named[2]];
  const isMeant = expected === undefined || same(scopeOf(expected, secret), named[1]);
  return isMeant && same(createHmac("sha256", secret).update(signed, "utf8").digest("hex"), end[1]);
}

/** The same of a JSON answer: `header` is its X-Restcast-Signature, `etag` its ETag, `body` its bytes. */
export function verifyResponse(header, stream, etag, body, keys, expected) {
  const parts = /^ts=(\d+),scope=([0-9a-f]{64}),kid=([A-Za-z0-9._:~-]{1,64}),v1=([0-9a-f]{64})$/.exec(header ?? "");
  if (!parts || !Object.hasOwn(keys, parts[3])) return false;
  const [, ts, scope, kid, signature] = parts;
  const isMeant = expected === undefined || same(scopeOf({ stream, ...expected }, keys[kid]), scope);
  const before = `${ts}.${scope}.${stream}.${etag.replaceAll('"', "")}.`;
  return isMeant && same(createHmac("sha256", keys[kid]).update(before, "utf8").update(body).digest("hex"), signature);
}

/** A number as it was spelled. */
export class JsonNumber {
  constructor(spelling) {
    this.spelling = spelling;
  }
}

/** The value of a JSON text: objects are Maps, numbers `JsonNumber`s. */
export function parse(text) {
  let at = 0;
  const token = /[ \t\r\n]*(?:([{}[\]:,])|("(?:[^"\\\u0000-\u001f]|\\.)*")|(-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?)|(true|false|null))/y;
  const next = () => {
    token.lastIndex = at;
    const found = token.exec(text);
    if (!found) throw new SyntaxError(`not JSON at ${at}`);
    at = token.lastIndex;
    return found;
  };
  const expect = (wanted) => {
    const [, mark] = next();
    if (!wanted.includes(mark)) throw new SyntaxError(`${wanted} expected before ${at}`);
    return mark;
  };
  const peek = (mark) => {
    const before = at;
    if (next()[1] === mark) return true;
    at = before;
    return false;
  };
  const value = () => {
    const [, mark, string, number, word] = next();
    if (string !== undefined) return JSON.parse(string);
    if (number !== undefined) return new JsonNumber(number);
    if (word !== undefined) return JSON.parse(word);
    if (mark === "[") {
      const elements = [];
      if (peek("]")) return elements;
      do elements.push(value());
      while (expect(",]") === ",");
      return elements;
    }
    if (mark !== "{") throw new SyntaxError(`a value expected before ${at}`);
    const members = new Map();
    if (peek("}")) return members;
    do {
      const name = JSON.parse(next()[2]);
      expect(":");
      members.set(name, value());
    } while (expect(",}") === ",");
    return members;
  };
  const whole = value();
  if (text.slice(at).trim() !== "") throw new SyntaxError(`more at ${at}`);
  return whole;
}

/** The order of names by their characters, which is not that of UTF-16. */
function byCharacters(a, b) {
  return Buffer.compare(Buffer.from(a, "utf8"), Buffer.from(b, "utf8"));
}

/** The canonical form: members by name, no white space, strings at their shortest, numbers as spelled. */
export function canonical(value) {
  if (value instanceof JsonNumber) return value.spelling;
  if (Array.isArray(value)) return `[${value.map(canonical).join(",")}]`;
  if (value instanceof Map) {
    const names = [...value.keys()].sort(byCharacters);
    return `{${names.map((name) => `${JSON.stringify(name)}:${canonical(value.get(name))}`).join(",")}}`;
  }
  return JSON.stringify(value);
}

/** What `hash` says of a value. */
export function hashOf(value) {
  return `sha256:${createHash("sha256").update(canonical(value), "utf8").digest("hex")}`;
}
