"""A network that can be cut: a proxy that passes bytes on until it is told not to."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading

VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
"""What sends requests elsewhere than to this machine."""


class Proxy(socketserver.ThreadingTCPServer):
    """Passes bytes on to another port until it is cut; then it closes what it has and refuses.

    Args:
        target: the port, on this machine.

    Attributes:
        cut: whether nothing is passed on now.
        refused: connections that came meanwhile.
        passed: pieces of bytes that were passed on to ``target``.
    """

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, target: int) -> None:
        super().__init__(("127.0.0.1", 0), None)
        self.target, self.cut, self.refused, self.passed = target, False, 0, 0
        self.open: list[socket.socket] = []

    @property
    def port(self) -> int:
        """Return the port to connect to."""
        return int(self.server_address[1])

    def finish_request(self, request, client_address):
        """Serve one connection."""
        if self.cut:
            self.refused += 1
            return
        upstream = socket.create_connection(("127.0.0.1", self.target))
        self.open += [request, upstream]
        back = threading.Thread(target=self.pump, args=(upstream, request), daemon=True)
        back.start()
        self.pump(request, upstream)
        back.join()

    def pump(self, source, sink):
        """Pass bytes on until either end has had enough."""
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.passed += sink.getpeername()[1] == self.target
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def cut_all(self):
        """Cut the network."""
        self.cut = True
        for each in self.open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def serving(server):
    """Let a server of ``socketserver`` serve inside this block."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
