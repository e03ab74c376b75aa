"""A reward server that does what a test tells it, well or badly, and counts how often it was asked."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Scripted:
    """`script(handler, request, n)` answers the n-th POST; `health(handler)` answers GET.

    `stop` makes it refuse connections, `again` listens on the same port as before.
    """

    def __init__(self, script=None, health=None):
        self.script, self.health = script or well, health or healthy
        self.asked, self.greeted, self.seen, self.port = 0, 0, [], 0
        self.lock = threading.Lock()
        self.again()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def again(self):
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                scripted.greeted += 1
                scripted.health(self)

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with scripted.lock:
                    scripted.asked += 1
                    number = scripted.asked
                    scripted.seen.append((self.path, json.loads(body), dict(self.headers)))
                scripted.script(self, json.loads(body), number)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.server.handle_error = lambda *args: None
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stop()


def send(handler, content, status=200, **headers):
    """An answer: bytes as they are, anything else as JSON (NaN and all)."""
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def healthy(handler):
    send(handler, {"ok": True, "name": "scripted", "rewards": ["only"]})


def rows(request, value=0.5):
    return [{"id": item["id"], "score": value} for item in request["items"]]


def well(handler, request, number):
    send(handler, {"scores": rows(request)})


def first(bad, count=1):
    """Badly for `count` requests, then well."""
    return lambda handler, request, number: (bad if number <= count else well)(handler, request, number)


def answers(make):
    """A script that sends whatever `make(request)` gives."""
    return lambda handler, request, number: send(handler, make(request))


def status(code, **headers):
    return lambda handler, request, number: send(handler, b"out of order", code, **headers)


def hang(handler, request, number):
    time.sleep(1.5)


def drip(handler, request, number):
    """A byte every 20 ms: no single wait is long."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        time.sleep(0.02)


def drop(handler, request, number):
    """The connection breaks in the middle of an answer."""
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"scores"')
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
