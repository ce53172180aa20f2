#!/usr/bin/env python3
"""What restcast holds at scale: tokens that end together, a thousand polled streams, one port shared by three processes.

    cargo build --release -p restcast -p restcast-loadtest
    python3 benches/scale.py                # all of it, about four minutes
    python3 benches/scale.py expiry polls   # some of it
    python3 benches/scale.py beside FILE    # `requests` of this build and of another one (FILE), in turn, three rounds

  expiry   5,000 and 19,000 WebSockets whose tokens end in the same second: when each was closed with 4001, and when the
           last stream frame came, counted from `exp` and leeway
  polls    1,000 streams, each polled every second over its own kept TLS connection, 10 WebSockets on each: the server's
           CPU, and how late the upstream was asked
  shared   45,000 WebSockets on one port, which three processes of one core share (`server.share_port`)
  storm    9,700 WebSockets that are served while 9,700 others connect, as fast as the server takes them, again and again:
           the latency of the former beside what it is in peace, and how long the server itself takes to send an event to
           all of them (`restcast_fanout_seconds`): the load testers share a core, and hold up each other. Once those who
           come watch another stream, so that what they cost is their coming; once the same, whose events then have up to
           twice as many readers
  flood    the same 9,700 while 64 connections send `auth_update` as fast as they can, half of them with forged tokens, of
           which five end a connection, that is made again at once; the bounds that would stop them are off
  requests what a poll costs, plain and over TLS, unchanged and changed; 10,000 streams without watchers
  beside   the same of two builds, each with a core to itself and its upstream on the other: the medians and their ratio

Each prints the load tester's figures as one line of JSON. Needs Python 3.11 and nothing else; loopback only; every process
it starts ends with it, within five minutes; `beside` takes twelve.
"""
import base64, hashlib, hmac, json, os, pathlib, signal, socket, statistics, struct, subprocess, sys, tempfile, threading, time, urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESTCAST, LOADTEST = ROOT / "target/release/restcast", ROOT / "target/release/loadtest"
started = []


def start(folder, *command):
    """A process that says it is ready by a line of JSON."""
    log = open(pathlib.Path(folder) / f"{len(started)}.log", "w")
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=log, text=True)
    started.append(process)
    line = process.stdout.readline()
    if not line:
        sys.exit(f"{command[0]} did not start: {pathlib.Path(log.name).read_text()[-500:]}")
    return process, json.loads(line)


def stop(process):
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def serve(folder, streams, listen="127.0.0.1:0", cores=2, server="", binary=RESTCAST):
    path = pathlib.Path(folder) / f"{len(started)}.toml"
    path.write_text(
        f'[server]\nlisten = "{listen}"\ncores = {cores}\ndrain = "1s"\n{server}\n[admin]\nlisten = "127.0.0.1:0"\n'
        f'[[auth.jwt.key]]\nalg = "HS256"\nsecret = "file:{folder}/key"\n{streams}'
    )
    return start(folder, binary, "serve", "--config", path)


def load(folder, url, pids, *flags, patience=120):
    command = [LOADTEST, "run", url, "--secret-file", f"{folder}/key", "--json", "-", "--quiet"]
    for pid in pids:
        command += ["--pid", pid]
    ran = subprocess.run(list(map(str, [*command, *flags])), stdout=subprocess.PIPE, text=True, timeout=patience)
    return json.loads(ran.stdout)


def told(what, report, *names):
    figures = {}
    for name in names:
        value = report
        for part in name.split("."):
            value = (value or {}).get(part)
        figures[name] = value
    print(json.dumps({"what": what, **figures}), flush=True)


ALWAYS = ("connections.opened", "connections.failed", "events.lost", "client.saturated")


def expiry(folder):
    upstream, ready = start(folder, LOADTEST, "upstream", "--interval", "500ms")
    stream = f'[[stream]]\nid = "s"\nurl = "http://{ready["listen"]}/0"\ninterval = "500ms"\n'
    for count in (5_000, 19_000):
        server, ready = serve(folder, stream)
        url = f"ws://{ready['listen']}/v1/streams/s?format=full"
        flags = ["--connections", count, "--rate", 5000, "--expires-in", "12s", "--expire-together", "--duration", "16s"]
        report = load(folder, url, [server.pid], *flags)
        names = ("expiry.count", "expiry.first_ms", "expiry.median_ms", "expiry.p99_ms", "expiry.last_ms")
        told(f"expiry {count}", report, *ALWAYS, *names, "expiry.latest_frame_ms", "closes")
        stop(server)
    stop(upstream)


def polls(folder):
    flags = ["--streams", 1000, "--interval", "1s", "--poll-interval", "1s", "--tls", "--write-ca", f"{folder}/ca.pem"]
    upstream, ready = start(folder, LOADTEST, "upstream", *flags)
    streams = "".join(
        f'[[stream]]\nid = "s{n}"\nurl = "https://localhost:{ready["listen"].rsplit(":", 1)[1]}/{n}"\ninterval = "1s"\n'
        f'ca = "{folder}/ca.pem"\n'
        for n in range(1000)
    )
    server, ready = serve(folder, streams, cores=1)
    url = f"ws://{ready['listen']}/v1/streams/s{{n%1000}}"
    flags = ["--connections", 10_000, "--rate", 3000, "--warm-up", "5s", "--duration", "20s"]
    report = load(folder, url, [server.pid], *flags)
    told("polls", report, *ALWAYS, "deliveries.per_s", "server.cpu_share", "latency_us.p50", "latency_us.p99")
    stop(server)
    upstream.send_signal(signal.SIGTERM)
    print(json.dumps({"what": "polls, as the upstream saw them", **json.loads(upstream.stdout.readlines()[-1])}), flush=True)
    upstream.wait()


def shared(folder):
    upstream, ready = start(folder, LOADTEST, "upstream", "--interval", "2s")
    stream = f'[[stream]]\nid = "s"\nurl = "http://{ready["listen"]}/0"\ninterval = "2s"\n'
    listen, servers = "127.0.0.1:0", []
    for _ in range(3):
        server, ready = serve(folder, stream, listen, 1, 'share_port = true\nheartbeat = "10m"')
        listen = ready["listen"]
        servers.append(server)
    # Each process has a sequence of its own, with its own epoch.
    url = f"ws://{listen}/v1/streams/s?format=full"
    flags = ["--connections", 45_000, "--rate", 4000, "--duration", "20s"]
    report = load(folder, url, [server.pid for server in servers], *flags)
    told("shared 45000", report, *ALWAYS, "deliveries.per_s", "latency_us.p99", "server.pss_bytes_per_connection")
    for server in servers:
        print(json.dumps({"pid": server.pid, "descriptors": len(os.listdir(f"/proc/{server.pid}/fd"))}), flush=True)
    for server in [*servers, upstream]:
        stop(server)


def fanout(admin):
    """How often an event was sent to its readers so far, and how long that took together."""
    with urllib.request.urlopen(f"http://{admin}/metrics", timeout=5) as answer:
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if not line.startswith("#"))
    return [sum(float(v) for k, v in lines.items() if k.startswith(f"restcast_fanout_seconds_{part}")) for part in ("count", "sum")]


def scheduled(pid):
    """Seconds by now, and those that the process's threads have run and have waited for a processor, together (proc(5))."""
    ran, waited = 0, 0
    for thread in os.listdir(f"/proc/{pid}/task"):
        try:
            run_ns, wait_ns, _ = map(int, pathlib.Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split())
        except FileNotFoundError:
            continue  # It has ended meanwhile.
        ran, waited = ran + run_ns, waited + wait_ns
    return [time.monotonic(), ran / 1e9, waited / 1e9]


def served_so_far(server, admin):
    return [*fanout(admin), *scheduled(server.pid)]


def served_since(server, admin, before, what):
    """What the server did since: the mean time to send an event to all its readers, and its share of a processor: what it
    had, and what it wanted and others had."""
    now = served_so_far(server, admin)
    count, seconds, passed, ran, waited = (now - then for now, then in zip(now, before))
    figures = {"fanout.count": count, "fanout.mean_ms": round(1000 * seconds / max(count, 1), 1)}
    figures |= {"server.ran": round(ran / passed, 2), "server.waited": round(waited / passed, 2)}
    print(json.dumps({"what": what, **figures}), flush=True)


def storm(folder):
    upstream, ready = start(folder, LOADTEST, "upstream", "--interval", "250ms", "--streams", 2)
    source = f"http://{ready['listen']}"
    # The second is polled too seldom to matter.
    streams = f'[[stream]]\nid = "s"\nurl = "{source}/0"\ninterval = "250ms"\n'
    streams += f'[[stream]]\nid = "other"\nurl = "{source}/1"\ninterval = "10m"\n'
    server, ready = serve(folder, streams, cores=1)
    # Besides them the server has 576 descriptors left.
    count, url = 9_700, f"ws://{ready['listen']}/v1/streams/s?format=full"
    served = ["--connections", count, "--rate", 3000, "--warm-up", "3s", "--duration", "15s", "--read-every", "2ms"]
    names = (*ALWAYS, "deliveries.per_s", "latency_us.p50", "latency_us.p99", "latency_us.max", "server.cpu_share")
    for what in ("other", "s"):
        told("storm: in peace", load(folder, url, [server.pid], *served), *names)
        command = [LOADTEST, "run", url, "--secret-file", f"{folder}/key", "--json", "-", "--quiet", "--pid", server.pid, *served]
        watching = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
        started.append(watching)
        # They are open, and have warmed up.
        time.sleep(count / 3000 + 3)
        peace = served_so_far(server, ready["admin"])
        time.sleep(2)
        served_since(server, ready["admin"], peace, "storm: before it")
        for _ in range(3):
            before = served_so_far(server, ready["admin"])
            to = f"ws://{ready['listen']}/v1/streams/{what}?format=full"
            storming = load(folder, to, [], "--connections", count, "--rate", 100_000, "--idle", "--duration", "1s")
            served_since(server, ready["admin"], before, f"storm: those who come watch {what}")
            told("storm: those who come", storming, "connections.opened", "connections.failed", "connects_per_s")
        report = json.loads(watching.communicate(timeout=60)[0])
        told(f"storm: those who are served, while others come to {what}", report, *names)
    # As many readers as there are in the storm to the same stream, and nobody comes.
    holding = ["--connections", count, "--rate", 3000, "--duration", "25s", "--read-every", "2ms"]
    command = [LOADTEST, "run", url, "--secret-file", f"{folder}/key", "--json", "-", "--quiet", *holding]
    others = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, text=True)
    started.append(others)
    time.sleep(count / 3000)
    told("storm: in peace, with twice as many readers", load(folder, url, [server.pid], *served), *names)
    others.wait(60)
    for process in (server, upstream):
        stop(process)


def token(sub, key, n):
    part = lambda raw: base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
    claims = {"sub": sub, "exp": int(time.time()) + 600, "jti": f"{sub}-{n}"}
    text = part(b'{"alg":"HS256"}') + "." + part(json.dumps(claims).encode())
    return text + "." + part(hmac.new(key, text.encode(), hashlib.sha256).digest())


def updates(sub, key):
    """Eight masked WebSocket messages, each an `auth_update` with a token of its own."""
    frames = []
    for n in range(8):
        text = json.dumps({"type": "auth_update", "token": token(sub, key, n)}).encode()
        frames.append(b"\x81" + struct.pack(">BH", 0x80 | 126, len(text)) + bytes(4) + text)
    return b"".join(frames)


def flooding(address, key, sub, forged, over, sent):
    head = f"GET /v1/ws HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    head += "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    head += f"Authorization: Bearer {token(sub, key, 99)}\r\n\r\n"
    text, (host, port) = updates(sub, bytes(32) if forged else key), address.split(":")
    while not over.is_set():
        try:
            with socket.create_connection((host, int(port)), 2) as link:
                link.sendall(head.encode())
                while not over.is_set() and link.recv(65536):
                    link.sendall(text)
                    sent.append(8)
        except OSError:
            pass  # It was ended: again.


def flood(folder):
    upstream, ready = start(folder, LOADTEST, "upstream", "--interval", "250ms")
    stream = f'[[stream]]\nid = "s"\nurl = "http://{ready["listen"]}/0"\ninterval = "250ms"\n'
    bounds = "[limits]\nmessages_per_second = 0\nauth_failures_per_minute = 0\n"
    server, ready = serve(folder, stream + bounds, cores=1)
    key, over, sent = pathlib.Path(f"{folder}/key").read_bytes().strip(), threading.Event(), []
    url = f"ws://{ready['listen']}/v1/streams/s?format=full"
    served = ["--connections", 9_700, "--rate", 4000, "--warm-up", "2s", "--duration", "8s", "--read-every", "2ms"]
    names = (*ALWAYS, "deliveries.per_s", "latency_us.p50", "latency_us.p99", "server.cpu_share")
    told("flood: in peace", load(folder, url, [server.pid], *served), *names)
    for n in range(64):
        asked = (ready["listen"], key, f"flood-{n}", n % 2 == 1, over, sent)
        threading.Thread(target=flooding, args=asked, daemon=True).start()
    time.sleep(1)
    before, begun = len(sent), time.monotonic()
    told("flood: in the flood", load(folder, url, [server.pid], *served), *names)
    figure = round(8 * (len(sent) - before) / (time.monotonic() - begun))
    print(json.dumps({"what": "flood: auth_updates sent", "per_s": figure}), flush=True)
    over.set()
    for process in (server, upstream):
        stop(process)


def cpu_s(pid):
    """User and system time of a process so far."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pss(pid):
    lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def polled(admin):
    """Polls so far, by their result."""
    with urllib.request.urlopen(f"http://{admin}/metrics", timeout=5) as answer:
        lines = [line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line.startswith("restcast_polls_total")]
    counts = {}
    for name, value in lines:
        result = name.split('result="')[1].split('"')[0]
        counts[result] = counts.get(result, 0) + int(float(value))
    return counts


def polling(folder, what, count, interval, changes, seconds, *flags, binary=RESTCAST, pinned=False):
    """`count` streams without watchers, polled every `interval` of an upstream whose values change every `changes`."""
    tls = "--tls" in flags
    upstream, ready = start(folder, LOADTEST, "upstream", "--streams", count, "--interval", changes, *flags)
    port = ready["listen"].rsplit(":", 1)[1]
    base = f"https://localhost:{port}" if tls else f"http://127.0.0.1:{port}"
    trust = f'ca = "{folder}/ca.pem"\n' if tls else ""
    streams = "".join(
        f'[[stream]]\nid = "s{n}"\nurl = "{base}/{n}"\ninterval = "{interval}"\nkeep_warm = true\n{trust}' for n in range(count)
    )
    bare, bare_ready = serve(folder, "", cores=1, binary=binary)
    empty = pss(bare.pid)
    stop(bare)
    server, ready = serve(folder, streams, cores=1, binary=binary)
    if pinned:
        pin(server.pid, 0)
        pin(upstream.pid, 1)
    # The first polls of all come at once, and the next ones an interval later.
    time.sleep(5 if interval.endswith("ms") else 5 + int(interval.removesuffix("s")))
    before, spent, begun = polled(ready["admin"]), cpu_s(server.pid), time.monotonic()
    time.sleep(seconds)
    after, spent, took = polled(ready["admin"]), cpu_s(server.pid) - spent, time.monotonic() - begun
    polls = {result: after[result] - before.get(result, 0) for result in after if after[result] > before.get(result, 0)}
    figures = {
        "what": f"polling: {what}", "polls_per_s": round(sum(polls.values()) / took), "by_result": polls,
        "cpu_share": round(spent / took, 3), "us_per_poll": round(1e6 * spent / max(sum(polls.values()), 1), 1),
        "pss_per_stream": round((pss(server.pid) - empty) / count),
    }
    print(json.dumps(figures), flush=True)
    stop(server)
    stop(upstream)
    return figures


def pin(pid, cpu):
    """All threads of a process on one processor."""
    for task in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(task), {cpu})


def of_requests(folder):
    """What `polling` is given for each row of `requests`."""
    ca = ("--tls", "--write-ca", f"{folder}/ca.pem")
    for name, tls in (("plain", ()), ("TLS", ca)):
        yield f"{name}, unchanged (200)", 200, "20ms", "0s", 10, *tls
        yield f"{name}, unchanged (304)", 200, "20ms", "0s", 10, "--etag", *tls
        yield f"{name}, changed", 200, "20ms", "10ms", 10, *tls
    yield "10,000 streams every 10 s, plain, changed", 10_000, "10s", "5s", 20


def requests(folder):
    for row in of_requests(folder):
        polling(folder, *row)


def beside(folder, other, rounds=3):
    for row in of_requests(folder):
        of = {"this": [], "other": []}
        for turn in range(2 * rounds):
            # This, other, other, this: neither is always the first.
            name = ("this", "other", "other", "this")[turn % 4]
            figures = polling(folder, f"{row[0]}, {name}", *row[1:], binary=RESTCAST if name == "this" else other, pinned=True)
            of[name].append(figures["us_per_poll"])
        medians = {name: statistics.median(all_of) for name, all_of in of.items()}
        print(json.dumps({"what": row[0], "us_per_poll": of, **medians, "ratio": round(medians["this"] / medians["other"], 3)}), flush=True)


def main():
    if sys.argv[1:2] == ["beside"]:
        if len(sys.argv) != 3 or not os.access(sys.argv[2], os.X_OK):
            sys.exit("beside: name the other build's restcast")
        run(["beside"], pathlib.Path(sys.argv[2]).resolve())
    else:
        run(sys.argv[1:] or ["expiry", "polls", "shared", "storm", "flood", "requests"])


def run(wanted, other=None):
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "key").write_text(os.urandom(32).hex())
        try:
            todo = {"expiry": expiry, "polls": polls, "shared": shared, "storm": storm, "flood": flood, "requests": requests}
            if other:
                todo["beside"] = lambda folder: beside(folder, other)
            for name in wanted:
                todo[name](folder)
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()


if __name__ == "__main__":
    main()
