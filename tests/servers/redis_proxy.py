"""A TCP proxy before a Redis or Valkey that loses answers."""

from __future__ import annotations

import socket
import threading


class AnswerLosingProxy:
    """A TCP proxy that, when told to, drops a connection in place of the server's next answer to a script."""

    def __init__(self, host: str, port: int) -> None:
        self._server = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        """Where it listens on loopback."""
        self.lose = 0
        """How many of the next answers to lose."""
        self.lost = 0
        """How many were lost."""
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            thread = threading.Thread(target=self._serve, args=(client,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        # Requests are small here and clients wait for answers: one chunk is a request, the next its answer
        with client, socket.create_connection(self._server) as server:
            while request := client.recv(1 << 20):
                server.sendall(request)
                answer = server.recv(1 << 20)
                # A script that the server does not know has not run: that answer is worth nothing
                if b"EVALSHA" in request and not answer.startswith(b"-NOSCRIPT") and self._may_lose():
                    return
                client.sendall(answer)

    def _may_lose(self) -> bool:
        with self._lock:
            if not self.lose:
                return False
            self.lose, self.lost = self.lose - 1, self.lost + 1
            return True

    def close(self) -> None:
        """Listen no more, and wait for the connections to end."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)
