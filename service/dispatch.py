"""Which task goes to the cluster next, and when to give one up: pure decisions, no Ray, no clock.

Ray keeps a task that no node can hold waiting for ever, retries one that runs out of memory without end,
and slows down with many thousand tasks queued. So what is in Ray at any time is bounded, requests are
checked against the nodes, and retries are counted here.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Node:
    """What one node of the cluster offers in all, whether free or taken."""

    cpus: float
    """CPU cores."""
    gpus: float
    """GPUs."""
    memory_bytes: int
    """Memory for tasks."""


@dataclass(frozen=True, slots=True)
class Need:
    """What one task asks for."""

    memory_bytes: int
    """Peak memory."""
    cpus: float
    """CPU cores."""
    gpus: float
    """GPUs."""
    label: str
    """What people call the task."""

    def fits(self, node: Node) -> bool:
        """Whether the node, when idle, could hold it."""
        return self.memory_bytes <= node.memory_bytes and self.cpus <= node.cpus and self.gpus <= node.gpus


@dataclass(slots=True)
class _Task:
    need: Need
    tries: int = 0
    stranded_since: float | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """The bounds."""

    max_tries: int = 4
    """How often a task is started before it is given up because its workers die."""
    per_cpu: float = 2.0
    """Tasks in the cluster at once for each of its CPUs: one runs, one is ready to."""
    patience_s: float = 60.0
    """How long a task waits for a node to come back, when the only ones that could hold it went away."""
    backoff_s: float = 1.0
    """Wait before the first retry of a task that was killed for memory; doubles each time."""


@dataclass
class Dispatcher:
    """The queue of one cluster. Task ids rise in the order of submission, and go out in that order.

    Times are seconds of any steady clock.
    """

    policy: Policy = field(default_factory=Policy)
    nodes: tuple[Node, ...] = ()
    """The nodes that are alive."""
    running: set[int] = field(default_factory=set)
    """Tasks that the cluster has."""
    _tasks: dict[int, _Task] = field(default_factory=dict)
    _ready: list[int] = field(default_factory=list)
    _later: list[tuple[float, int]] = field(default_factory=list)
    _seen: set[Node] = field(default_factory=set)

    @property
    def limit(self) -> int:
        """How many tasks may be in the cluster at once."""
        return max(1, int(self.policy.per_cpu * sum(node.cpus for node in self.nodes)))

    def set_nodes(self, nodes: Sequence[Node]) -> None:
        """The cluster has changed."""
        self.nodes = tuple(nodes)
        self._seen.update(nodes)

    def add(self, task: int, need: Need) -> str | None:
        """Queue a task; returns why not, when no node that was ever there could hold it."""
        # A cluster without any CPU is still being put together: only its head has arrived.
        if any(node.cpus for node in self._seen) and not any(need.fits(node) for node in self._seen):
            return self._refusal(need)
        self._tasks[task] = _Task(need)
        heapq.heappush(self._ready, task)
        return None

    def remove(self, task: int) -> bool:
        """Forget a task that is finished or not wanted any more; whether the cluster had it."""
        had = task in self.running
        self.running.discard(task)
        self._tasks.pop(task, None)
        return had

    def start(self, now: float) -> list[int]:
        """The tasks to hand to the cluster now, in order; they count as running from here on."""
        while self._later and self._later[0][0] <= now:
            heapq.heappush(self._ready, heapq.heappop(self._later)[1])
        started: list[int] = []
        while self._ready and len(self.running) < self.limit:
            number = heapq.heappop(self._ready)
            task = self._tasks.get(number)
            if task is None:  # removed while it was queued
                continue
            if not any(task.need.fits(node) for node in self.nodes):
                if task.stranded_since is None:
                    task.stranded_since = now
                heapq.heappush(self._later, (now + 1.0, number))
                continue
            task.stranded_since = None
            task.tries += 1
            self.running.add(number)
            started.append(number)
        return started

    def crashed(self, task: int, cause: str, now: float, *, out_of_memory: bool = False) -> str | None:
        """A task's worker died under it: it is queued again, or given up; returns why."""
        state = self._tasks[task]
        self.running.discard(task)
        if state.tries >= self.policy.max_tries:
            self.remove(task)
            return f"{state.need.label}: given up after {state.tries} tries; the last: {cause}"
        if out_of_memory:
            heapq.heappush(self._later, (now + self.policy.backoff_s * 2 ** (state.tries - 1), task))
        else:
            heapq.heappush(self._ready, task)
        return None

    def hopeless(self, now: float) -> list[tuple[int, str]]:
        """Tasks that no living node could hold for too long, and why. Their caller removes them."""
        waiting = [number for _, number in self._later]
        lost: list[tuple[int, str]] = []
        for number in (*self.running, *waiting):
            task = self._tasks.get(number)
            if task is None:
                continue
            if any(task.need.fits(node) for node in self.nodes):
                task.stranded_since = None
            elif task.stranded_since is None:
                task.stranded_since = now
            elif now - task.stranded_since > self.policy.patience_s:
                lost.append((number, self._refusal(task.need)))
        return lost

    def tries(self, task: int) -> int:
        """How often the task has been started."""
        return self._tasks[task].tries

    def _refusal(self, need: Need) -> str:
        largest = _largest(self.nodes)
        return (
            f"{need.label}: no node of the cluster can hold it: it needs {need.memory_bytes:,} bytes of "
            f"memory, {need.cpus:g} CPUs and {need.gpus:g} GPUs; the largest of {len(self.nodes)} nodes has "
            f"{largest.memory_bytes:,} bytes, {largest.cpus:g} CPUs and {largest.gpus:g} GPUs"
        )


def _largest(nodes: Iterable[Node]) -> Node:
    return max(nodes, key=lambda node: (node.memory_bytes, node.cpus, node.gpus), default=Node(0, 0, 0))
