"""Verifies what restcast proves of its events. Python 3.8 or newer, no dependency.

verify_frame(text, keys, expected)        the text of a frame, as it came (over SSE: its `data`)
verify_response(header, stream, etag, body, keys, expected)    a JSON answer and its X-Restcast-Signature
scope_of(expected, secret)                what `scope` of an event must be
parse(text) / canonical(value)            JSON with numbers that keep their spelling / its canonical form
hash_of(value)                            what `hash` of an event must be of the value that you hold

`keys` maps a `kid` to its secret, as bytes. `expected` says whose value it has to be: a dict of `stream`, `claims`, `view` and
`select`: the stream's name in frames, the claims that fill its templates, the number of the view, what is selected in its
normal spelling; what is left out is none. Without `expected` a frame of another tenant, view or `select` is as good.
"""

import hashlib
import hmac
import json
import re


def scope_of(expected, secret):
    """What `scope` is where the sequence is the one `expected`."""
    whole = {"claims": {}, "select": None, "view": None, **expected}
    return hmac.new(secret, b"scope." + canonical(whole).encode(), hashlib.sha256).hexdigest()


def verify_frame(text, keys, expected=None):
    """Whether `text` was signed with one of `keys`. What is signed is all of it before `,"sig":`, its last member."""
    end = re.search(r',"sig":"([0-9a-f]{64})"\}\Z', text)
    if end is None:
        return False
    signed = text[: end.start()]
    named = re.search(r',"scope":"([0-9a-f]{64})","kid":"([A-Za-z0-9._:~-]{1,64})"\Z', signed)
    if named is None or named[2] not in keys:
        return False
    secret = keys[named[2]]
    if expected is not None and not hmac.compare_digest(scope_of(expected, secret), named[1]):
        return False
    signature = hmac.new(secret, signed.encode(), hashlib.sha256).hexdigest()
    return hmac.compare_digest(signature, end[1])


def verify_response(header, stream, etag, body, keys, expected=None):
    """The same of a JSON answer: `header` is its X-Restcast-Signature, `etag` its ETag, `body` its bytes."""
    form = r"ts=(\d+),scope=([0-9a-f]{64}),kid=([A-Za-z0-9._:~-]{1,64}),v1=([0-9a-f]{64})"
    parts = re.fullmatch(form, header or "")
    if parts is None or parts[3] not in keys:
        return False
    ts, scope, kid, tag = parts.groups()
    if expected is not None and not hmac.compare_digest(scope_of({"stream": stream, **expected}, keys[kid]), scope):
        return False
    before = f"{ts}.{scope}.{stream}.{etag.replace(chr(34), '')}."
    signature = hmac.new(keys[kid], before.encode() + body, hashlib.sha256).hexdigest()
    return hmac.compare_digest(signature, tag)


class Number(str):
    """A number as it was spelled."""


def parse(text):
    """The value of a JSON text."""
    return json.loads(text, parse_int=Number, parse_float=Number)


def canonical(value):
    """The canonical form: members by name, no white space, strings at their shortest, numbers as spelled."""
    if isinstance(value, Number):
        return str(value)
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, dict):
        # Python compares texts by their characters.
        members = (f"{canonical(name)}:{canonical(value[name])}" for name in sorted(value))
        return "{" + ",".join(members) + "}"
    return json.dumps(value, ensure_ascii=False)


def hash_of(value):
    """What `hash` says of a value."""
    return "sha256:" + hashlib.sha256(canonical(value).encode()).hexdigest()
