"""Verifies what restcast proves of its events. Python 3.8 or newer, no dependency.

verify_frame(text, keys)                  the text of a frame, as it came (over SSE: its `data`)
verify_response(header, stream, etag, body, keys)    a JSON answer and its X-Restcast-Signature
parse(text) / canonical(value)            JSON with numbers that keep their spelling / its canonical form
hash_of(value)                            what `hash` of an event must be of the value that you hold

`keys` maps a `kid` to its secret, as bytes.
"""

import hashlib
import hmac
import json
import re


def verify_frame(text, keys):
    """Whether `text` was signed with one of `keys`. What is signed is all of it before `,"sig":`, its last member."""
    end = re.search(r',"sig":"([0-9a-f]{64})"\}\Z', text)
    if end is None:
        return False
    signed = text[: end.start()]
    named = re.search(r',"kid":"([A-Za-z0-9._:~-]{1,64})"\Z', signed)
    if named is None or named[1] not in keys:
        return False
    expected = hmac.new(keys[named[1]], signed.encode(), hashlib.sha256).hexdigest()
    return hmac.compare_digest(expected, end[1])


def verify_response(header, stream, etag, body, keys):
    """The same of a JSON answer: `header` is its X-Restcast-Signature, `etag` its ETag, `body` its bytes."""
    parts = re.fullmatch(r"ts=(\d+),kid=([A-Za-z0-9._:~-]{1,64}),v1=([0-9a-f]{64})", header or "")
    if parts is None or parts[2] not in keys:
        return False
    before = f"{parts[1]}.{stream}.{etag.replace(chr(34), '')}."
    expected = hmac.new(keys[parts[2]], before.encode() + body, hashlib.sha256).hexdigest()
    return hmac.compare_digest(expected, parts[3])


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
