#!/usr/bin/env python3
"""What an idle, authenticated, subscribed connection costs the server in user space.

    cargo build --release
    ulimit -n 20000
    python3 benches/idle_memory.py target/release/restcast 8000 ws
    python3 benches/idle_memory.py target/release/restcast 8000 sse
    python3 benches/idle_memory.py target/release/restcast 8000 wss      # over TLS 1.3; https: SSE over it

Starts a REST endpoint and the server (one core), opens one connection, then N more, each with its own `sub`, `exp` and
`jti`, and prints the growth of the server's proportional set size (/proc/PID/smaps_rollup) by connection, and the CPU
ticks the server used in five idle seconds. Needs Python 3.8, and for TLS the openssl command. Loopback only; ends by
itself.
"""
import base64, hashlib, hmac, http.server, json, os, socket, ssl, subprocess, sys, tempfile, threading, time

SECRET = base64.b64encode(os.urandom(32))


def b64(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def mint(number, exp):
    claims = {"sub": f"user-{number:06d}", "exp": exp + number, "jti": f"jti-{number}", "iat": int(time.time())}
    signed = b64(b'{"alg":"HS256","typ":"JWT"}') + "." + b64(json.dumps(claims).encode())
    return signed + "." + b64(hmac.new(SECRET, signed.encode(), hashlib.sha256).digest())


class Endpoint(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = b'{"a":1}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def main():
    program, count, transport = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    endpoint = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=endpoint.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder, open(folder + "/restcast.toml", "w") as config:
        secure = transport in ("wss", "https")
        cert, key = folder + "/cert.pem", folder + "/key.pem"
        if secure:
            new = "openssl req -x509 -nodes -days 2 -subj /CN=localhost -newkey ec -pkeyopt ec_paramgen_curve:P-256"
            files = ["-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", cert]
            subprocess.run(new.split() + files, check=True, stderr=subprocess.DEVNULL)
        config.write(
            f'[server]\nlisten = "127.0.0.1:0"\ncores = 1\nheartbeat = "10m"\n'
            + (f'[[server.tls]]\ncert = "{cert}"\nkey = "{key}"\n' if secure else "")
            + f'[admin]\nlisten = "127.0.0.1:0"\n'
            f'[[auth.jwt.key]]\nalg = "HS256"\nsecret = "{SECRET.decode()}"\n'
            f'[[stream]]\nid = "s"\nurl = "http://127.0.0.1:{endpoint.server_port}/"\ninterval = "1s"\n'
        )
        config.flush()
        server = subprocess.Popen([program, "serve", "--config", config.name], stdout=subprocess.PIPE, text=True)
        try:
            ready = json.loads(server.stdout.readline())
            measure(ready, count, transport)
        finally:
            server.terminate()
            server.wait(30)


def measure(ready, count, transport):
    host, port = ready["listen"].split(":")
    exp = int(time.time()) + 86_400
    secure = {"wss": "ws", "https": "sse"}.get(transport)
    if secure:
        tls = ssl.create_default_context()
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE

    def connect(number):
        wanted = {
            "ws": "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
            "sse": "Accept: text/event-stream\r\n",
        }[secure or transport]
        client = socket.create_connection((host, int(port)))
        if secure:
            client = tls.wrap_socket(client, server_hostname="localhost")
        head = f"GET /v1/streams/s HTTP/1.1\r\nHost: x\r\n{wanted}Authorization: Bearer {mint(number, exp)}\r\n\r\n"
        client.sendall(head.encode())
        assert client.recv(16) == {"ws": b"HTTP/1.1 101 Swi", "sse": b"HTTP/1.1 200 OK\r"}[secure or transport]
        return client

    def pss():
        with open(f"/proc/{ready['pid']}/smaps_rollup") as rollup:
            return next(int(line.split()[1]) for line in rollup if line.startswith("Pss:")) * 1024

    def ticks():
        with open(f"/proc/{ready['pid']}/stat") as stat:
            return sum(map(int, stat.read().rsplit(")", 1)[1].split()[11:13]))

    clients = [connect(0)]
    time.sleep(1.5)
    before = pss()
    for number in range(1, count + 1):
        clients.append(connect(number))
        if number in (1000, count):
            time.sleep(1)
            print(f"{transport}: {number} connections, {(pss() - before) / number:.0f} bytes each")
    used = ticks()
    time.sleep(5)
    print(f"{transport}: {ticks() - used} CPU ticks in 5 s idle")


if __name__ == "__main__":
    main()
