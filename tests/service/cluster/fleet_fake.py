"""A fleet without Ray, which misbehaves as its ``address`` says."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path


def main() -> None:
    config = json.loads(sys.stdin.readline())
    with os.fdopen(int(sys.argv[1]), "w") as results:

        def send(**message: object) -> None:
            results.write(json.dumps(message) + "\n")
            results.flush()

        behaviour, _, file = config["address"].partition(":")
        if behaviour == "refuse":
            sys.stderr.write("no route to cluster\n")
            sys.exit(1)
        if behaviour == "refuse-once" and not Path(file).exists():
            Path(file).touch()
            sys.exit(1)
        if behaviour == "mute":
            signal.pause()
        send(op="nodes", nodes=[(2, 1, 100), (4, 0, 300)])
        if behaviour == "silent":
            signal.pause()
        for line in sys.stdin:
            message = json.loads(line)
            if message["op"] == "submit":
                send(op="started", ids=[message["id"]])
                if message["label"] == "killer":
                    with Path(file).open("a") as runs:
                        runs.write("run\n")
                    os._exit(9)
                if behaviour != "hold":
                    send(op="result", id=message["id"], body=json.dumps({"value": message["payload"]}))
            else:
                with Path(file).open("a") as cancelled:
                    cancelled.write(f"{message['id']}\n")


if __name__ == "__main__":
    main()
