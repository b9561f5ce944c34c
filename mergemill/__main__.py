"""``python -m mergemill`` is ``mergemill``."""

from __future__ import annotations

from mergemill.cli import app

if __name__ == "__main__":
    app(prog_name="mergemill")
