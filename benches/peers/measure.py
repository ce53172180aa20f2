#!/usr/bin/env python3
"""Measures restcast and its peers alternately, in one run, on this machine, and writes the tables.

    python3 benches/peers/measure.py                      everything, in at most 18 minutes once it is built
    python3 benches/peers/measure.py --quick              the same with few connections, in under 4
    python3 benches/peers/measure.py --only m2,m3 --servers restcast,bare,uws
    python3 benches/peers/measure.py --write              puts the tables into benches/RESULTS.md as well

  m1  user-space memory of an idle connection: WebSocket, SSE, TLS
  m2  deliveries per CPU-second of the server at a fixed rate, and per second when driven past what it can do
  m3  latency at that fixed rate, which is half of what the bare loop can do
  m4  handshakes that verify a JWT, subscribe and get the value, with their teardown
  m5  restcast beside itself: two cores, bursts, deflate, readers that do not read

The server has one core, the load tester and what feeds the server the other. Each round visits every server once; medians
and the whole spread are told. Only the memory of many connections is looked at in one round alone: it takes long. README.md
beside this file says how each peer is set up. Needs Python 3.11 and nothing else; loopback only; every process it starts
ends with it.
"""

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import itertools
import json
import math
import os
import pathlib
import platform
import re
import resource
import secrets
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TARGET = HERE / "target"
RESULTS = ROOT / "benches" / "RESULTS.md"
MARKS = ("<!-- peers: begin, written by benches/peers/measure.py --write -->", "<!-- peers: end -->")
MEASUREMENTS = ("m1", "m2", "m3", "m4", "m5")
SIZES = (128, 1024)
STREAMS = 8  # of the burst, on each connection
FRAME_HEAD_BYTES = 4  # of a server's WebSocket frame with 126 to 65,535 bytes
READY_S = 20
# What a reader that does not read is due meanwhile: more than its two ends hold, so that the server has to deal with it.
# restcast's socket sends from 64 KiB, which the kernel doubles for its own use; a client's takes 128 KiB unless it reads.
UNREAD_BYTES = 320 << 10
UNREAD_MESSAGE_BYTES = 8 << 10
# Variants of m5. While the sockets of those who do not read still fill, the kernel takes memory for what they hold; on a
# virtual machine that is memory which its host has yet to find. Once they are full it takes none.
ALL_READ, FILLING, SOME_READ = "8 KiB, all read", "8 KiB, one in ten stops reading", "8 KiB, one in ten has stopped"
BUSY_SHARE_MAX = 0.05  # of the machine, by others, without a remark
END_S = 10
NCHAN = ("/usr/lib/nginx/modules/ngx_nchan_module.so", "/usr/lib64/nginx/modules/ngx_nchan_module.so")


class Unavailable(Exception):
    """A server that cannot be measured here; its text says why."""


# --- Processes -------------------------------------------------------------------------------------------------------


def die_with_parent():
    """Between fork and exec: the child gets SIGTERM when this program ends, however it ends."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


class Processes:
    """What this program has started; leaving it ends them all, by their ids."""

    def __init__(self):
        self.running = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in reversed(self.running):
            self.end(process)

    def start(self, command, cpus, cwd):
        """Starts a server pinned to `cpus`; a log in `cwd` takes what it says on standard error."""
        path = pathlib.Path(cwd) / f"{pathlib.Path(command[0]).name}.log"
        with open(path, "ab") as log:
            process = subprocess.Popen(
                ["taskset", "-c", cpus, *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=cwd,
                preexec_fn=die_with_parent,
            )
        process.log = path
        self.running.append(process)
        return process

    def end(self, process):
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(END_S)
        process.stdout.close()


def ready_line(process, name):
    """The line of JSON that a server prints when it listens."""
    ready, _, _ = select.select([process.stdout], [], [], READY_S)
    line = process.stdout.readline() if ready else b""
    try:
        return json.loads(line)
    except ValueError:
        # Where standard output is closed the process is about to end.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
        code = process.poll()
        why = f"no ready line within {READY_S} s" if code is None else f"it ended with {code}: {last_words(process)}"
        raise Unavailable(f"{name} did not start: {why}") from None


def last_words(process):
    """The last line that a process has said on standard error."""
    lines = process.log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "nothing on standard error"


def output(*command, cwd=None):
    """What a short command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout or done.stderr).strip() if done.returncode == 0 else None


# --- Servers ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Load:
    """What a server is to do."""

    interval_ms: int = 0  # between broadcasts; 0: none, connections are only held
    message_bytes: int = 128
    verify: bool = False  # tokens, where the peer can choose: restcast always verifies them
    tls: bool = False
    cores: int = 1
    streams: int = 1
    burst: bool = False


@dataclasses.dataclass
class Running:
    """A server that listens."""

    pids: list
    urls: dict  # by transport: ws, sse, handshake
    arguments: list  # what the load tester has to know of its messages
    verifies: bool


PEER_MESSAGES = ["--ts-key", "ts", "--ts-unit", "us", "--seq-key", "seq", "--stream-key", "none", "--epoch-key", "none"]
NO_WELCOME = ["--no-welcome"]


@dataclasses.dataclass
class Peer:
    """A peer that broadcasts by itself."""

    name: str
    title: str
    command: list
    transports: tuple
    can_verify: bool  # that needs `interval_ms=0`: with --secret a peer greets, and does not broadcast
    package: tuple

    def check(self):
        program = shutil.which(str(self.command[0]))
        if program is None:
            raise Unavailable(f"{self.command[0]} is not there: build it, or install {self.package[0]}")

    def start(self, bench, load, processes, folder):
        flags = ["--port", 0, "--bytes", load.message_bytes, "--interval", load.interval_ms]
        if load.verify:
            flags += ["--secret", bench.secret_file]
        process = processes.start([*self.command, *flags], bench.server_cpus(load), folder)
        listen = ready_line(process, self.name)["listen"]
        urls = {"ws": f"ws://{listen}/ws", "handshake": f"ws://{listen}/ws", "sse": f"http://{listen}/sse"}
        return Running([process.pid], urls, PEER_MESSAGES + NO_WELCOME * (not load.verify), load.verify)

    def version(self):
        return " ".join(filter(None, self.package[1:]))


class Nchan:
    """nginx relays what a publisher posts."""

    name = "nchan"
    title = "nginx with Nchan"
    transports = ("ws", "sse")
    can_verify = False

    def check(self):
        if shutil.which("nginx") is None or self.module() is None:
            raise Unavailable("nginx with Nchan is not there: apt-get install nginx-light libnginx-mod-nchan")

    def module(self):
        return next(filter(os.path.exists, NCHAN), None)

    def start(self, bench, load, processes, folder):
        port = bench.free_port()
        settings = {"@MODULE@": self.module(), "@DIR@": str(folder), "@PORT@": str(port)}
        text = re.sub("@[A-Z]+@", lambda found: settings[found[0]], (HERE / "nchan" / "nginx.conf").read_text())
        config = pathlib.Path(folder) / "nginx.conf"
        config.write_text(text)
        command = ["nginx", "-p", folder, "-e", f"{folder}/error.log", "-c", config]
        master = processes.start(command, bench.server_cpus(load), folder)
        workers = wait_for(lambda: listens(port) and children(master.pid), f"{self.name} does not listen")
        if load.interval_ms:
            flags = ["--port", port, "--bytes", load.message_bytes, "--interval", load.interval_ms]
            ready_line(processes.start([bench.bin("publish"), *flags], bench.args.client_cpu, folder), "publish")
        urls = {"ws": f"ws://127.0.0.1:{port}/ws", "sse": f"http://127.0.0.1:{port}/sse"}
        return Running([master.pid, *workers], urls, PEER_MESSAGES + NO_WELCOME, False)

    def version(self):
        nginx = re.search(r"nginx/(\S+)", output("nginx", "-v") or "")
        nchan = output("dpkg-query", "-W", "-f", "${Version}", "libnginx-mod-nchan")
        return f"{nginx[1] if nginx else 'of unknown version'}, Nchan {nchan or 'of unknown version'}"


class Restcast:
    """The real binary, with the sample upstream of the load tester; every connection brings a token of its own."""

    name = "restcast"
    title = "restcast"
    transports = ("ws", "sse", "tls")
    can_verify = True
    envelope_bytes = None  # of a snapshot frame around its value, measured once

    def check(self):
        if not os.access(self.binary, os.X_OK):
            raise Unavailable(f"{self.binary} is not there: leave --no-build out")

    def __init__(self, binary):
        self.binary = binary

    def start(self, bench, load, processes, folder):
        if Restcast.envelope_bytes is None:
            Restcast.envelope_bytes = bench.measure_envelope(self)
        return self.serve(bench, load, processes, folder, load.message_bytes - Restcast.envelope_bytes)

    def serve(self, bench, load, processes, folder, body_bytes):
        if load.streams > 1:
            feed = [sys.executable, HERE / "held_upstream.py", "--streams", load.streams, "--interval", load.interval_ms]
            feed += ["--bytes", body_bytes] + ["--burst"] * load.burst
            poll_ms = 10
        else:
            # The value changes faster than it is polled, so that every poll brings a message.
            changes_ms = load.interval_ms and max(1, load.interval_ms // 4)
            feed = [bench.loadtest, "upstream", "--listen", "127.0.0.1:0", "--bytes", body_bytes]
            feed += ["--interval", f"{changes_ms}ms"]
            poll_ms = load.interval_ms or 3_600_000
        upstream = ready_line(processes.start(feed, bench.args.client_cpu, folder), "the upstream")["listen"]
        config = [
            "[server]",
            'listen = "127.0.0.1:0"',
            f"cores = {load.cores}",
            *(["[[server.tls]]", f'cert = "{bench.certificate[0]}"', f'key = "{bench.certificate[1]}"'] if load.tls else []),
            "[admin]",
            'listen = "127.0.0.1:0"',
            "[[auth.jwt.key]]",
            'alg = "HS256"',
            f'secret = "file:{bench.secret_file}"',
        ]
        for number in range(load.streams):
            url = f"http://{upstream}/{number}"
            config += ["[[stream]]", f'id = "s{number}"', f'url = "{url}"', f'interval = "{poll_ms}ms"']
        path = pathlib.Path(folder) / "restcast.toml"
        path.write_text("\n".join(config) + "\n")
        process = processes.start([self.binary, "serve", "--config", path], bench.server_cpus(load), folder)
        listen = ready_line(process, self.name)["listen"]
        ws, http = ("wss", "https") if load.tls else ("ws", "http")
        stream = "/v1/streams/s0?format=full"
        urls = {"ws": f"{ws}://{listen}{stream}", "sse": f"{http}://{listen}{stream}", "handshake": f"{ws}://{listen}{stream}"}
        subscribe = []
        if load.streams > 1:
            urls["ws"] = f"{ws}://{listen}/v1/ws"
            for number in range(load.streams):
                subscribe += ["--subscribe", json.dumps({"type": "subscribe", "stream": f"s{number}", "format": "full"})]
        return Running([process.pid], urls, subscribe + (["--insecure"] if load.tls else []), True)

    def version(self):
        return (output(self.binary, "--version") or "restcast").removeprefix("restcast ")


def children(pid):
    try:
        return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def listens(port):
    """Whether a socket on 127.0.0.1 listens at `port`."""
    wanted = f"0100007F:{port:04X}"
    with open("/proc/net/tcp") as table:
        return any(row.split()[1] == wanted and row.split()[3] == "0A" for row in list(table)[1:])


def wait_for(condition, complaint):
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise Unavailable(complaint)


# --- The bench -------------------------------------------------------------------------------------------------------


class Bench:
    """One run of this program: its settings, its secret, and the samples it has taken."""

    def __init__(self, args, folder):
        self.args = args
        self.folder = folder
        self.loadtest = pathlib.Path(args.loadtest)
        self.secret_file = pathlib.Path(folder) / "secret"
        self.secret_file.write_text(secrets.token_hex(32))
        self.secret_file.chmod(0o600)
        self.started = time.monotonic()
        self.samples = {}  # (measurement, server, variant) -> list of reports
        self.notes = []
        self.unavailable = {}
        self.certificate = None
        self.servers = self.choose()
        self.pace = args.pace

    def bin(self, name):
        return TARGET / "release" / name

    def choose(self):
        lock = versions_in_lock()
        both = ("ws", "sse")
        known = [
            Restcast(pathlib.Path(self.args.restcast)),
            Peer("bare", "bare `send()` loop", [self.bin("bare")], ("ws",), False, ("", "epoll")),
            Peer("uws", "uWebSockets, C++", [TARGET / "uws" / "uws"], ("ws",), True,
                 ("g++ and libssl-dev", "as in libuwebsockets-sys", lock.get("libuwebsockets-sys"))),
            Nchan(),
            Peer("axum", "axum", [self.bin("axum")], both, True, ("", lock.get("axum"), "tokio", lock.get("tokio"))),
            Peer("fastwebsockets", "fastwebsockets", [self.bin("fastwebsockets")], ("ws",), True,
                 ("", lock.get("fastwebsockets"), "tokio", lock.get("tokio"))),
            Peer("ws", "Node `ws`", ["node", HERE / "node" / "server.js"], ("ws",), True,
                 ("nodejs and npm", npm_version("ws"), "Node", (output("node", "--version") or "").removeprefix("v"))),
        ]
        names = [server.name for server in known]
        wanted = self.args.servers or names
        if unknown := [name for name in wanted if name not in names]:
            sys.exit(f"measure.py: no server is called {unknown[0]}; there are {', '.join(names)}")
        chosen = []
        for server in known:
            if server.name not in wanted:
                continue
            try:
                server.check()
                chosen.append(server)
            except Unavailable as why:
                self.leave_out(server.name, why)
        return chosen

    def leave_out(self, name, why):
        self.unavailable[name] = str(why)
        say(f"left out: {name}: {why}")

    def server(self, name):
        return next((server for server in self.servers if server.name == name), None)

    def server_cpus(self, load):
        return self.args.server_cpu if load.cores == 1 else f"{self.args.server_cpu},{self.args.client_cpu}"

    def free_port(self):
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    def out_of_time(self):
        return time.monotonic() - self.started > self.args.budget

    @contextlib.contextmanager
    def serving(self, server, load):
        """`server` at work, until the block is left."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder, Processes() as processes:
            os.chmod(folder, 0o755)  # nginx's worker is another user
            yield server.start(self, load, processes, folder), processes, folder

    def load(self, running, transport, connections, duration_s, *flags, processes, folder):
        """One run of the load tester: its report."""
        command = [self.loadtest, "run", running.urls[transport], "--connections", connections]
        command += ["--duration", f"{duration_s}s", "--json", "-", "--quiet"]
        if "--churn" not in flags:
            command += ["--rate", self.args.rate]
            if "--idle" not in flags:
                # On loopback a server's CPU depends on how its client happens to run: a connection's first messages are
                # acknowledged at once, a client that sleeps must be woken, one that keeps up acknowledges within the send.
                command += ["--read-every", "2ms"]
                if "--warm-up" not in flags:
                    command += ["--warm-up", f"{self.args.warm_up}s"]
        for pid in running.pids:
            command += ["--pid", pid]
        if running.verifies:
            command += ["--secret-file", self.secret_file, "--expires-in", "1h"]
        process = processes.start([*command, *running.arguments, *flags], self.args.client_cpu, folder)
        patience = duration_s + self.args.warm_up + connections / self.args.rate * 4 + 60
        try:
            said, _ = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"the load tester took over {patience:.0f} s") from None
        try:
            return json.loads(said)
        except ValueError:
            raise Unavailable(f"the load tester ended with {process.returncode}: {last_words(process)}") from None

    def sample(self, measurement, server, variant, load, transport, connections, duration_s, *flags):
        """Starts a server, loads it, keeps the report."""
        if self.out_of_time():
            if "out of time" not in self.notes:
                self.notes.append("out of time")
                say("the time that was given is over: what is left is not measured")
            return None
        say(f"{measurement} {variant}: {server.name}", end=" … ")
        try:
            with self.serving(server, load) as (running, processes, folder):
                report = self.load(running, transport, connections, duration_s, *flags, processes=processes, folder=folder)
                if load.interval_ms and not value(report, "deliveries.count"):
                    said = "; ".join(dict.fromkeys(map(last_words, processes.running)))
                    raise Unavailable(f"nothing was delivered ({said})")
        except Unavailable as why:
            say(f"failed: {why}")
            self.notes.append(f"{measurement}, {variant}, {server.title}: {why}")
            return None
        self.samples.setdefault((measurement, server.name, variant), []).append(report)
        say(in_short(report))
        if trouble := troubles(report):
            self.notes.append(f"{measurement}, {variant}, {server.title}: {trouble}")
        return report

    def measure_envelope(self, restcast):
        """Bytes of a snapshot frame beyond its value, by the size of the first message of a connection."""
        body_bytes = 256
        with self.serving_raw(restcast, body_bytes) as (running, processes, folder):
            report = self.load(running, "ws", 1, 2, processes=processes, folder=folder)
        deliveries, received = value(report, "deliveries.count"), value(report, "deliveries.bytes")
        if not deliveries or not received:
            raise Unavailable("restcast delivered nothing")
        return round(received / deliveries) - FRAME_HEAD_BYTES - body_bytes

    @contextlib.contextmanager
    def serving_raw(self, restcast, body_bytes):
        with tempfile.TemporaryDirectory(dir=self.folder) as folder, Processes() as processes:
            yield restcast.serve(self, Load(interval_ms=20), processes, folder, body_bytes), processes, folder

    # --- The measurements ---

    def interval_ms(self, per_s, connections, messages=1):
        return max(1, round(connections * messages * 1000 / per_s))

    def calibrate(self):
        """The fixed rate of m2, m3 and m5: half of what the bare loop does when driven."""
        if self.pace:
            return
        bare = self.server("bare")
        report = bare and self.driven(bare, "calibration", SIZES[0])
        rate = value(report, "deliveries.per_s") if report else None
        self.pace = round(rate / 2) if rate else 60_000
        if not rate:
            self.notes.append("the bare loop was not measured: the fixed rate is a guess")
        say(f"fixed rate: {self.pace:,} deliveries/s")

    def driven(self, server, variant, size):
        load = Load(interval_ms=self.interval_ms(self.args.drive, self.args.connections), message_bytes=size)
        return self.sample("m2", server, variant, load, "ws", self.args.connections, self.args.duration)

    def memory_counts(self):
        """How many connections m1 opens: few in each round, many in the first alone."""
        return min(1000, self.args.connections, self.args.memory_connections), self.args.memory_connections

    def m1(self):
        few, many = self.memory_counts()
        for round_no in range(self.args.rounds):
            counts = sorted({few, many} if round_no == 0 else {few})
            for transport, connections, server in itertools.product(("ws", "sse", "tls"), counts, self.servers):
                tls = transport == "tls"
                if transport not in server.transports or tls and not self.make_certificate():
                    continue
                # What restcast does for each connection it can only do with a token. Memory is looked at when all are open
                # and at rest, before the second that is asked for here.
                self.sample("m1", server, f"{transport} {connections}", Load(tls=tls), "ws" if tls else transport,
                            connections, 1, "--idle")

    def make_certificate(self):
        if self.certificate is None:
            files = tuple(pathlib.Path(self.folder) / name for name in ("cert.pem", "key.pem"))
            made = output("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                          "-keyout", str(files[1]), "-out", str(files[0]), "-days", "2", "-subj", "/CN=localhost",
                          "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
            self.certificate = files if made is not None else ()
            if not self.certificate:
                self.notes.append("TLS is not measured: no openssl command to make a certificate")
        return self.certificate

    def m2_m3(self, only):
        self.calibrate()
        for _ in range(self.args.rounds):
            for size in SIZES:
                for server in self.servers:
                    load = Load(interval_ms=self.interval_ms(self.pace, self.args.connections), message_bytes=size)
                    self.sample("m2", server, f"paced {size}", load, "ws", self.args.connections, self.args.duration)
                if "m2" in only:
                    for server in self.servers:
                        self.driven(server, f"driven {size}", size)

    def m4(self):
        for _ in range(self.args.rounds):
            for server in self.servers:
                if server.can_verify:
                    self.sample("m4", server, "churn", Load(verify=True), "handshake", 64, self.args.duration,
                                "--churn")

    def m5(self):
        server = self.server("restcast")
        if server is None:
            return
        self.calibrate()
        count, duration = self.args.connections, self.args.duration
        paced = self.interval_ms(self.pace, count)
        drive = self.interval_ms(self.args.drive, count)
        few = max(100, count // 4)
        slow = self.interval_ms(self.pace, few, STREAMS)
        stalled = max(1, count // 10)
        plain = Load(interval_ms=paced, message_bytes=1024)
        # Half the rate with long messages, until a reader that does not read has been sent what it cannot hold.
        unread = Load(interval_ms=2 * paced, message_bytes=UNREAD_MESSAGE_BYTES)
        unread_s = max(duration, math.ceil(UNREAD_BYTES / UNREAD_MESSAGE_BYTES * unread.interval_ms / 1000))
        for _ in range(self.args.rounds):
            for cores in (1, 2):
                name = f"{cores} core{'s' * (cores > 1)}"
                self.sample("m5", server, f"{name} paced", Load(paced, cores=cores), "ws", count, duration)
                self.sample("m5", server, f"{name} driven", Load(drive, cores=cores), "ws", count, duration)
            for burst in (False, True):
                load = Load(slow, streams=STREAMS, burst=burst)
                self.sample("m5", server, "burst" if burst else "spread", load, "ws", few, duration)
            self.sample("m5", server, "plain", plain, "ws", count, duration)
            self.sample("m5", server, "deflate", plain, "ws", count, duration, "--compress")
            for other in filter(None, (server, self.server("bare"))):
                self.sample("m5", other, ALL_READ, unread, "ws", count, unread_s)
                self.sample("m5", other, FILLING, unread, "ws", count, unread_s, "--stalled", stalled)
            self.sample("m5", server, SOME_READ, unread, "ws", count, duration, "--stalled", stalled,
                        "--warm-up", f"{unread_s + self.args.warm_up:.0f}s")

    def run(self):
        only = self.args.only or MEASUREMENTS
        if "m1" in only:
            self.m1()
        if "m2" in only or "m3" in only:
            self.m2_m3(only)
        if "m4" in only:
            self.m4()
        if "m5" in only:
            self.m5()


# --- Figures ---------------------------------------------------------------------------------------------------------


def value(report, path):
    """A member of a report by its dotted path; None where it is not there or null."""
    for name in path.split("."):
        if not isinstance(report, dict) or name not in report:
            return None
        report = report[name]
    return report


def in_short(report):
    parts = [
        ("{:,.0f} B/connection", "server.pss_bytes_per_connection"),
        ("{:,.0f} deliveries/s", "deliveries.per_s"),
        ("{:,.0f} per CPU-second", "deliveries.per_server_cpu_s"),
        ("p99 {:,.0f} us", "latency_us.p99"),
        ("{:.1f} us/handshake", "handshakes.server_cpu_us_each"),
    ]
    return ", ".join(form.format(value(report, path)) for form, path in parts if value(report, path))


def troubles(report):
    """What makes a report doubtful, in words."""
    found = []
    for words, path in (
        ("connections failed", "connections.failed"),
        ("connections dropped", "connections.dropped"),
        ("readers without an event", "events.silent"),
        ("readers left in an old epoch", "events.stuck"),
        ("events lost", "events.lost"),
        # Of readers that read: what a snapshot skipped was not delivered, as little as what a peer lost.
        ("events conflated", "events.conflated"),
        ("duplicated", "events.duplicated"),
        ("out of order", "events.reordered"),
    ):
        if count := value(report, path):
            found.append(f"{count:,} {words}")
    # Tokens live an hour and no server is told to go: a close with a code is none that was asked for, but of a reader that
    # does not read. Ends without a code are connections dropped.
    closes, slow = (collections.Counter(value(report, path)) for path in ("closes", "slow.closes"))
    for cause, count in (closes - slow).items():
        if re.match(r"\d{4}\b", cause):
            found.append(f"{count:,} closed by the server with {cause}")
    if value(report, "client.saturated"):
        found.append("the load tester was the bottleneck")
    found += value(report, "problems") or []
    return ", ".join(found)


def missed(report):
    """Events that readers did not get, whether the server gave them up for lost or for a newer one."""
    counts = [value(report, f"events.{name}") for name in ("lost", "conflated")]
    return None if None in counts else sum(counts)


class Figures:
    """The samples of one measurement, by server."""

    def __init__(self, bench, measurement):
        self.bench, self.measurement = bench, measurement

    def all(self, server, variant, path):
        """By its path, or by a function of the report."""
        reports = self.bench.samples.get((self.measurement, server, variant), [])
        figures = (path(report) if callable(path) else value(report, path) for report in reports)
        return [found for found in figures if found is not None]

    def median(self, server, variant, path):
        found = self.all(server, variant, path)
        return statistics.median(found) if found else None

    def cell(self, server, variant, path, form="{:,.0f}", scale=1):
        found = sorted(sample * scale for sample in self.all(server, variant, path))
        if not found:
            return "-"
        middle = form.format(statistics.median(found))
        return middle if len(found) == 1 else f"{middle} ({form.format(found[0])}-{form.format(found[-1])})"

    def best_peer(self, variant, path, best=max):
        peers = [server.name for server in self.bench.servers if server.name not in ("restcast", "bare")]
        medians = [median for name in peers if (median := self.median(name, variant, path)) is not None]
        return best(medians) if medians else None


def ratio(figure, reference):
    return f"{figure / reference:.2f}" if figure is not None and reference else "-"


def table(heads, rows):
    lines = ["| " + " | ".join(heads) + " |", "|" + "|".join(["---"] * len(heads)) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows] + [""]


def memory_table(bench):
    figures, path = Figures(bench, "m1"), "server.pss_bytes_per_connection"
    few, many = bench.memory_counts()
    rows = []
    for transport, title in (("ws", "WebSocket"), ("sse", "SSE"), ("tls", "WebSocket, TLS")):
        for server in bench.servers:
            small, large = (figures.median(server.name, f"{transport} {count}", path) for count in (few, many))
            if small is None and large is None:
                continue
            cells = [figures.cell(server.name, f"{transport} {count}", path) for count in (few, many)]
            rows.append([title, server.title, *cells, ratio(large, small)])
    if not rows:
        return []
    heads = ["transport", "server", f"{few:,} connections, B each", f"{many:,} connections, B each", "growth"]
    note = "Growth of PSS from one open connection. restcast: a token with its own `sub`, `exp` and `jti` each; peers: no authentication."
    if few < many and bench.args.rounds > 1:
        note += f" {many:,} connections: one round."
    return ["### Memory of an idle connection", "", note, "", *table(heads, rows)]


def delivery_tables(bench):
    figures, lines = Figures(bench, "m2"), []
    for size in SIZES:
        paced, driven, path = f"paced {size}", f"driven {size}", "deliveries.per_server_cpu_s"
        bare, best = figures.median("bare", paced, path), figures.best_peer(paced, path)
        rows = []
        for server in bench.servers:
            median = figures.median(server.name, paced, path)
            if median is None:
                continue
            rows.append([
                server.title,
                figures.cell(server.name, paced, path),
                ratio(median, bare),
                ratio(median, best),
                figures.cell(server.name, driven, "deliveries.per_s"),
                figures.cell(server.name, paced, "latency_us.p50", "{:.1f}", 1e-3),
                figures.cell(server.name, paced, "latency_us.p99", "{:.1f}", 1e-3),
            ])
        if not rows:
            continue
        heads = ["server", f"deliveries per server CPU-second at {bench.pace:,}/s", "to bare", "to the best peer",
                 "deliveries/s when driven", "p50, ms", "p99, ms"]
        lines += [f"### {size} B to {bench.args.connections:,} subscribers, one core", "", *table(heads, rows)]
        lines += other_sizes(bench, size)
    return lines


def other_sizes(bench, size):
    """Whose messages are not as long as they were to be: restcast's envelope and its upstream's members have a least length."""
    figures, paced, found = Figures(bench, "m2"), f"paced {size}", []
    for server in bench.servers:
        count, received = (figures.median(server.name, paced, f"deliveries.{path}") for path in ("count", "bytes"))
        sent = round(received / count) - FRAME_HEAD_BYTES if count and received else size
        if abs(sent - size) > FRAME_HEAD_BYTES:
            found.append(f"{server.title}: messages of {sent} B, the least that it can have here.")
    return [*found, ""] if found else []


def handshake_table(bench):
    figures, path = Figures(bench, "m4"), "handshakes.server_cpu_us_each"
    uws = figures.median("uws", "churn", path)
    rows = []
    for server in bench.servers:
        median = figures.median(server.name, "churn", path)
        if median is not None:
            faster = ratio(uws, median)
            rows.append([server.title, figures.cell(server.name, "churn", path, "{:.1f}"),
                         figures.cell(server.name, "churn", "handshakes.per_s"), faster])
    if not rows:
        return []
    heads = ["server", "server CPU each, us", "handshakes/s", "times uWebSockets"]
    note = ("Each is the upgrade with its token, one subscription, two messages (a welcome and the value as it stands), and the "
            "close.")
    return ["### Handshakes that verify an HS256 JWT, with their teardown, one core", "", note, "", *table(heads, rows)]


def own_table(bench):
    figures = Figures(bench, "m5")
    variants = [variant for measurement, name, variant in bench.samples if (measurement, name) == ("m5", "restcast")]
    rows = []
    for variant in variants:
        cells = [("deliveries.per_server_cpu_s", "{:,.0f}", 1), ("deliveries.per_s", "{:,.0f}", 1),
                 ("latency_us.p50", "{:.1f}", 1e-3), ("latency_us.p99", "{:.1f}", 1e-3), (missed, "{:,.0f}", 1),
                 ("server.pss_bytes_end", "{:.1f}", 2**-20)]
        rows.append([variant, *(figures.cell("restcast", variant, *cell) for cell in cells)])
    if not rows:
        return []
    each, driven, p99 = "deliveries.per_server_cpu_s", "deliveries.per_s", "latency_us.p99"

    def against(variant, other, path):
        return ratio(figures.median("restcast", variant, path), figures.median("restcast", other, path))

    claims = [
        f"- Two cores deliver {against('2 cores driven', '1 core driven', driven)} times what one does when driven, and "
        f"{against('2 cores paced', '1 core paced', each)} times as much per CPU-second. The load tester needs one of the "
        "two cores itself: the first figure is a lower bound, the second says what sharing costs.",
        f"- {STREAMS} streams that change together: {against('burst', 'spread', each)} times the frames per CPU-second of "
        "the same streams spread out.",
        f"- Deflated: {against('deflate', 'plain', each)} of the deliveries per CPU-second of plain.",
        f"- One reader in ten has not read for {UNREAD_BYTES >> 10} KiB, more than its socket's two ends hold: the p99 of the "
        f"others is {against(SOME_READ, ALL_READ, p99)} times what it is when all read, the server's PSS at the end "
        f"{against(SOME_READ, ALL_READ, 'server.pss_bytes_end')} times. While those sockets fill, it is "
        f"{against(FILLING, ALL_READ, p99)} times, and with the bare `send()` loop, which does the same without a server, "
        f"{ratio(figures.median('bare', FILLING, p99), figures.median('bare', ALL_READ, p99))} times: the kernel then copies "
        "into memory that nobody has used yet.",
    ]
    heads = ["restcast", "per server CPU-second", "per second", "p50, ms", "p99, ms", "lost or conflated", "PSS at the end, MiB"]
    return ["### restcast beside itself", "", *table(heads, rows), *claims, ""]


def machine():
    with open("/proc/cpuinfo") as info:
        model = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), platform.machine())
    with open("/proc/meminfo") as info:
        memory = int(next(info).split()[1])
    return {"cpu": model, "cores": os.cpu_count(), "memory_gib": round(memory / 2**20, 1), "kernel": platform.release()}


def busy_share():
    """How much of the machine others use, looked at for a second in which this program does nothing."""

    def ticks():
        with open("/proc/stat") as stat:
            counts = [int(count) for count in next(stat).split()[1:9]]
        return sum(counts), sum(counts) - counts[3] - counts[4]

    all_before, busy_before = ticks()
    time.sleep(1)
    all_after, busy_after = ticks()
    return (busy_after - busy_before) / max(1, all_after - all_before)


def report_markdown(bench, context):
    box, lines = context["machine"], []
    versions = "; ".join(f"{title} {version}" for title, version in context["versions"].items())
    command = "python3 benches/peers/measure.py " + " ".join(context["arguments"])
    lines += [
        f"`{command.strip()}`, {context['date']}, commit {context['commit']}: {box['cores']} cores of {box['cpu']}, "
        f"{box['memory_gib']} GiB, kernel {box['kernel']}, {context['rustc']}. Median of {bench.args.rounds} "
        f"round{'s' * (bench.args.rounds > 1)} (least-most), servers in turn, the server on core {bench.args.server_cpu}, the "
        f"load tester on core {bench.args.client_cpu}. Versions: {versions}.",
        "",
    ]
    for part in (memory_table, delivery_tables, handshake_table, own_table):
        lines += part(bench)
    remarks = [f"- {name} was left out: {why}" for name, why in bench.unavailable.items()]
    remarks += [f"- {note}" for note in dict.fromkeys(bench.notes)]
    if remarks:
        lines += ["Remarks:", "", *remarks, ""]
    return "\n".join(lines)


def write_results(text):
    """Puts the tables between the marks of RESULTS.md, or at its end with the marks around them."""
    page = RESULTS.read_text()
    block = f"{MARKS[0]}\n\n{text.strip()}\n\n{MARKS[1]}"
    if MARKS[0] in page and MARKS[1] in page:
        before, rest = page.split(MARKS[0], 1)
        page = before + block + rest.split(MARKS[1], 1)[1]
    else:
        page = f"{page.rstrip()}\n\n## Beside its peers\n\n{block}\n"
    RESULTS.write_text(page)


# --- Building --------------------------------------------------------------------------------------------------------


def versions_in_lock():
    lock = tomllib.loads((HERE / "Cargo.lock").read_text())
    return {package["name"]: package["version"] for package in lock["package"]}


def npm_version(package):
    lock = json.loads((HERE / "node" / "package-lock.json").read_text())
    return lock["packages"][f"node_modules/{package}"]["version"]


def build():
    """Everything in release; what is missing outside cargo is told, not installed."""

    def nice(*command, cwd):
        say("$ " + " ".join(map(str, command)))
        subprocess.run(["nice", "-n", "10", *map(str, command)], cwd=cwd, check=True, stdout=sys.stderr)

    nice("cargo", "build", "--release", "--locked", cwd=ROOT)
    nice("cargo", "build", "--release", "--locked", "-p", "restcast-loadtest", cwd=ROOT)
    nice("cargo", "build", "--release", "--locked", cwd=HERE)
    if shutil.which("npm") and not (HERE / "node" / "node_modules" / "ws").exists():
        nice("npm", "ci", "--no-audit", "--no-fund", cwd=HERE / "node")
    if shutil.which("g++"):
        build_uws(nice)


def build_uws(nice):
    """Compiles uws.cpp against the sources that the crate ships; again only when something is newer."""
    source, made = HERE / "uws" / "uws.cpp", TARGET / "uws" / "uws"
    newest = max(path.stat().st_mtime for path in (source, HERE / "Cargo.lock"))
    if made.exists() and made.stat().st_mtime > newest:
        return
    flags = ["--format-version", "1", "--locked", "--features", "uws-source"]
    described = subprocess.run(["cargo", "metadata", *flags], cwd=HERE, check=True, capture_output=True, text=True)
    packages = json.loads(described.stdout)["packages"]
    manifest = next(package["manifest_path"] for package in packages if package["name"] == "libuwebsockets-sys")
    library = pathlib.Path(manifest).parent / "uWebSockets"
    sockets = library / "uSockets" / "src"
    made.parent.mkdir(parents=True, exist_ok=True)
    optimised = ["-O3", "-flto=auto", "-DLIBUS_NO_SSL"]
    nice("gcc", *optimised, "-std=gnu11", "-I", sockets, "-c", *sockets.glob("*.c"), *(sockets / "eventing").glob("*.c"),
         cwd=made.parent)
    try:
        nice("g++", *optimised, "-std=c++20", "-DUWS_NO_ZLIB", "-Wall", "-Wextra", "-Werror", "-isystem", library / "src",
             "-isystem", sockets, source, *made.parent.glob("*.o"), "-lcrypto", "-o", made, cwd=made.parent)
    except subprocess.CalledProcessError:
        say("uws.cpp did not compile (it wants libssl-dev): uWebSockets is left out")


# --- The command line ------------------------------------------------------------------------------------------------


def say(text, end="\n"):
    print(text, end=end, file=sys.stderr, flush=True)


def parse_arguments():
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)

    def names(text):
        return [name for name in text.split(",") if name]

    def count(text):
        number = int(text)
        if number < 1:
            raise argparse.ArgumentTypeError("must be at least 1")
        return number

    parser.add_argument("--only", type=names, metavar="m1,m2,…", help="these measurements [all]")
    parser.add_argument("--servers", type=names, metavar="A,B,…",
                        help="these servers: restcast, bare, uws, nchan, axum, fastwebsockets, ws [all]")
    parser.add_argument("--rounds", type=count, help="visits to each server [3; quick: 1]")
    parser.add_argument("--connections", type=count, help="subscribers [10000; quick: 2000]")
    parser.add_argument("--memory-connections", type=count, help="of m1, beside 1,000; up to 19000 [as --connections]")
    parser.add_argument("--duration", type=count, help="seconds of one load [3; quick: 1]")
    parser.add_argument("--warm-up", type=count, default=3, help="seconds before it, all connections open [%(default)s]")
    parser.add_argument("--rate", type=count, default=5000, help="connects per second [%(default)s]")
    parser.add_argument("--pace", type=count, help="deliveries/s of the fixed rate [half of what the bare loop does]")
    parser.add_argument("--drive", type=count, default=400_000, help="deliveries/s asked of a driven server [%(default)s]")
    parser.add_argument("--budget", type=count, help="seconds after which nothing new is begun [1080; quick: 220]")
    parser.add_argument("--server-cpu", default="0", metavar="CPU", help="the server's core [%(default)s]")
    parser.add_argument("--client-cpu", default="1", metavar="CPU", help="the load tester's core [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="fewer connections, rounds and seconds")
    parser.add_argument("--no-build", action="store_true", help="measure what is built already")
    parser.add_argument("--restcast", default=ROOT / "target" / "release" / "restcast", metavar="FILE", help="another binary")
    parser.add_argument("--loadtest", default=ROOT / "target" / "release" / "loadtest", metavar="FILE", help="another binary")
    parser.add_argument("--json", default=TARGET / "measured.json", metavar="FILE", help="where all reports go [%(default)s]")
    parser.add_argument("--write", action="store_true", help="write the tables into benches/RESULTS.md as well")
    args = parser.parse_args()
    if unknown := [name for name in args.only or [] if name not in MEASUREMENTS]:
        parser.error(f"no measurement is called {unknown[0]}; there are {', '.join(MEASUREMENTS)}")
    for name, usual, quick in (
        ("rounds", 3, 1),
        ("connections", 10_000, 2_000),
        ("duration", 3, 1),
        ("budget", 1080, 220),
    ):
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else usual)
    args.memory_connections = args.memory_connections or args.connections
    if max(args.connections, args.memory_connections) > 19_000:
        parser.error("a server process has 20,000 descriptors: at most 19000 connections")
    return args


def main():
    args = parse_arguments()
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("measure.py: two cores are needed, one for the server and one for the load tester")
    # A SIGTERM leaves by way of the exits that end what was started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if not args.no_build:
        build()
    with tempfile.TemporaryDirectory(prefix="restcast-peers-") as folder:
        os.chmod(folder, 0o755)
        bench = Bench(args, folder)
        if (busy := busy_share()) > BUSY_SHARE_MAX:
            bench.notes.append(f"other programs used {busy:.0%} of the machine when this run began: the figures say little")
            say(bench.notes[-1])
        stopped = False
        try:
            bench.run()
        except KeyboardInterrupt:
            stopped = True
            bench.notes.append("stopped before its end")
    context = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": output("git", "describe", "--always", "--dirty", cwd=ROOT) or "unknown",
        "machine": machine(),
        "rustc": output("rustc", "--version") or "rustc of unknown version",
        "versions": {server.title: server.version() for server in bench.servers},
        "arguments": [argument for argument in sys.argv[1:] if argument not in ("--write", "--no-build")],
        "fixed_rate": bench.pace,
    }
    text = report_markdown(bench, context)
    samples = [
        {"measurement": measurement, "server": name, "variant": variant, "reports": reports}
        for (measurement, name, variant), reports in bench.samples.items()
    ]
    path = pathlib.Path(args.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    everything = {**context, "left_out": bench.unavailable, "notes": bench.notes, "samples": samples}
    path.write_text(json.dumps(everything, indent=1, default=str) + "\n")
    print(text)
    if args.write and not stopped:
        write_results(text)
    took = time.monotonic() - bench.started
    say(f"{took:.0f} s; all reports in {path}")
    return 1 if stopped or not samples else 0


if __name__ == "__main__":
    sys.exit(main())
