"""Several Ray nodes on one machine, as a process: ``python -m tests.servers.ray_nodes NODES CPUS MEMORY``.

Answers are the lines that begin with ``>``: the address, the raylets' process ids, and ``removed`` for each
raylet's process id that comes on stdin. Runs under a warden, so that nothing of it is left.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

OBJECT_STORE_BYTES = 80 << 20


def raylet(node: object) -> int:
    (info,) = node.all_processes["raylet"]  # type: ignore[attr-defined]
    return int(info.process.pid)


def answer(text: str) -> None:
    sys.stdout.write(f"> {text}\n")
    sys.stdout.flush()


def main() -> None:
    count, cpus, memory = (int(argument) for argument in sys.argv[1:])
    cluster = Cluster()
    nodes = {}
    for _ in range(count):
        node = cluster.add_node(
            wait=False,
            num_cpus=cpus,
            memory=memory,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
        )
        nodes[raylet(node)] = node
    cluster.wait_for_nodes()
    answer(cluster.address)
    answer(" ".join(map(str, nodes)))
    for line in sys.stdin:
        cluster.remove_node(nodes.pop(int(line)), allow_graceful=False)
        answer("removed")


if __name__ == "__main__":
    main()
