"""A TCP proxy before a Redis or Valkey that loses answers."""

from __future__ import annotations

from tests.chaos.tcp_proxy import TcpProxy


class AnswerLosingProxy(TcpProxy):
    """A TCP proxy that, when told to, drops a connection in place of the server's next answer to a script."""

    def __init__(self, host: str, port: int) -> None:
        self.lose = 0
        """How many of the next answers to lose."""
        self.lost = 0
        """How many were lost."""
        super().__init__(host, port, self._loses_answer)

    def _loses_answer(self, request: bytes, answer: bytes) -> bool:
        # A script that the server does not know has not run: that answer is worth nothing
        return b"EVALSHA" in request and not answer.startswith(b"-NOSCRIPT") and self._may_lose()

    def _may_lose(self) -> bool:
        if not self.lose:
            return False
        self.lose, self.lost = self.lose - 1, self.lost + 1
        return True
