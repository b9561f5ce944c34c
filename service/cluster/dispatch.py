"""Which tasks go to the cluster next, and when to give one up: pure decisions, no Ray, no clock.

Ray keeps a task that no node can hold waiting for ever, retries one that runs out of memory without end,
and slows down with many thousand tasks queued. So what is in Ray at any time is bounded, requests are
checked against the nodes, and retries are counted here.

Tasks of one stream go out in batches, each to one worker. Their sizes are those of guided self-scheduling
(Polychronopoulos and Kuck, 1987): large while there is much to do, single tasks at the end, so that no worker
is left with a batch when the others have run dry.

A batch dies with its worker, and nobody can know which of its unfinished tasks killed it. So none is blamed:
each of them goes again by itself from then on, and only a worker that dies with a single task counts
against that task. A task that kills its workers is thus given up after ``max_tries`` deaths of its own, and
those that were beside it are never given up for it.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import Counter
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
    stream: str | None = None
    """Tasks of the same stream that ask for the same may go to one worker; ``None`` goes by itself."""
    payload_bytes: int = 0
    """What the worker holds of it from the beginning of its batch to the end."""

    def fits(self, node: Node) -> bool:
        """Whether the node, when idle, could hold it."""
        return self.memory_bytes <= node.memory_bytes and self.cpus <= node.cpus and self.gpus <= node.gpus

    def times(self, node: Node) -> int:
        """How many such tasks the node, when idle, could hold at once."""
        offers = (
            (node.memory_bytes, self.memory_bytes),
            (node.cpus, self.cpus),
            (node.gpus, self.gpus),
        )
        # 0.3 / 0.1 is a little less than 3.
        return min((int(has / wanted + 1e-9) for has, wanted in offers if wanted), default=1)

    @property
    def group(self) -> Group:
        """What the tasks that may share a worker have in common."""
        return self.stream, self.memory_bytes, self.cpus, self.gpus


Group = tuple[str | None, int, float, float]

ALONE: Group = (None, 0, 0, 0)
"""The group of all tasks that go by themselves, whatever they ask for."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Tasks that go to one worker together."""

    number: int
    """Its name; none is used twice."""
    tasks: tuple[int, ...]
    """The tasks, in order."""


@dataclass(slots=True)
class _Task:
    need: Need
    deaths: int = 0
    alone: bool = False
    """It was in a batch that died."""
    batch: int | None = None
    """The batch that it runs in."""
    stranded_since: float | None = None

    @property
    def group(self) -> Group:
        return ALONE if self.alone or self.need.stream is None else self.need.group


@dataclass(frozen=True, slots=True)
class _Running:
    batch: Batch
    group: Group
    left: set[int]
    """Tasks without a result."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The bounds."""

    max_tries: int = 4
    """How often a task is started by itself before it is given up because its workers die."""
    per_cpu: float = 2.0
    """Batches in the cluster at once for each of its CPUs: one runs, one is ready to."""
    max_stream: int = 32
    """Tasks that go to one worker together."""
    max_stream_bytes: int = 1 << 20
    """Their payloads together, when there is more than one."""
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
    _tasks: dict[int, _Task] = field(default_factory=dict)
    _ready: dict[Group, list[int]] = field(default_factory=dict)
    """Sorted, and never empty."""
    _later: list[tuple[float, int]] = field(default_factory=list)
    """A heap; what was removed stays until its time."""
    _batches: dict[int, _Running] = field(default_factory=dict)
    _streams: Counter[Group] = field(default_factory=Counter)
    """Batches in the cluster, by group."""
    _last_batch: int = 0
    _seen: set[Node] = field(default_factory=set)

    @property
    def limit(self) -> int:
        """How many batches may be in the cluster at once."""
        return max(1, int(self.policy.per_cpu * sum(node.cpus for node in self.nodes)))

    @property
    def running(self) -> set[int]:
        """Tasks that the cluster has, and no result of."""
        return {task for running in self._batches.values() for task in running.left}

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
        self._enqueue(task)
        return None

    def remove(self, task: int) -> int | None:
        """Forget a task that is not wanted any more; a batch that has nothing left to do is forgotten with it.

        Returns that batch, which should be ended.
        """
        state = self._tasks.pop(task, None)
        if state is None:
            return None
        if state.batch is None:
            queue = self._ready.get(state.group, [])
            position = bisect_left(queue, task)
            if position < len(queue) and queue[position] == task:
                self._take(state.group, [task])
            return None
        running = self._batches[state.batch]
        running.left.remove(task)
        if running.left:
            return None
        self._close(state.batch)
        return state.batch

    def start(self, now: float) -> list[Batch]:
        """What to hand to the cluster now, in order; it counts as running from here on."""
        while self._later and self._later[0][0] <= now:
            task = heapq.heappop(self._later)[1]
            if task in self._tasks:
                self._enqueue(task)
        started: list[Batch] = []
        while len(self._batches) < self.limit and (group := self._next_group()) is not None:
            first = self._ready[group][0]
            state = self._tasks[first]
            if not any(state.need.fits(node) for node in self.nodes):
                if state.stranded_since is None:
                    state.stranded_since = now
                self._take(group, [first])
                heapq.heappush(self._later, (now + 1.0, first))
                continue
            self._last_batch += 1
            batch = Batch(self._last_batch, self._members(group))
            self._take(group, batch.tasks)
            for task in batch.tasks:
                self._tasks[task].stranded_since = None
                self._tasks[task].batch = batch.number
            self._batches[batch.number] = _Running(batch, group, set(batch.tasks))
            self._streams[group] += 1
            started.append(batch)
        return started

    def finished(self, batch: int, index: int) -> int | None:
        """A task of a batch has its result: which one, or ``None`` when it is not wanted any more."""
        running = self._batches.get(batch)
        if running is None or running.batch.tasks[index] not in running.left:
            return None
        task = running.batch.tasks[index]
        running.left.remove(task)
        del self._tasks[task]
        return task

    def ended(self, batch: int) -> list[int]:
        """A batch's worker is done with it: the tasks that it gave no result for, which are forgotten."""
        if batch not in self._batches:
            return []
        left = self._close(batch)
        for task in left:
            del self._tasks[task]
        return left

    def crashed(
        self, batch: int, cause: str, now: float, *, out_of_memory: bool = False
    ) -> list[tuple[int, str | None]]:
        """A batch's worker died: each task without a result, and why it is given up if it is not queued again.

        One that is given up is forgotten.
        """
        if batch not in self._batches:
            return []
        blamed = len(self._batches[batch].batch.tasks) == 1
        fates: list[tuple[int, str | None]] = []
        for task in self._close(batch):
            state = self._tasks[task]
            state.deaths += blamed
            state.alone, state.batch = True, None
            why = None
            if state.deaths >= self.policy.max_tries:
                why = f"{state.need.label}: given up after {state.deaths} tries; the last: {cause}"
                del self._tasks[task]
            elif out_of_memory:
                wait = self.policy.backoff_s * 2 ** max(0, state.deaths - 1)
                heapq.heappush(self._later, (now + wait, task))
            else:
                self._enqueue(task)
            fates.append((task, why))
        return fates

    def hopeless(self, now: float) -> list[tuple[int, str]]:
        """Tasks that no living node could hold for too long, and why. Their caller removes them."""
        waiting = [number for _, number in self._later]
        lost: list[tuple[int, str]] = []
        for number in (*sorted(self.running), *waiting):
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

    def _enqueue(self, task: int) -> None:
        insort(self._ready.setdefault(self._tasks[task].group, []), task)

    def _take(self, group: Group, tasks: Iterable[int]) -> None:
        queue = self._ready[group]
        for task in tasks:
            del queue[bisect_left(queue, task)]
        if not queue:
            del self._ready[group]

    def _close(self, batch: int) -> list[int]:
        """Forget a batch; returns its tasks without a result."""
        running = self._batches.pop(batch)
        self._streams[running.group] -= 1
        return sorted(running.left)

    def _next_group(self) -> Group | None:
        """The group of the oldest task that may start."""
        may = (group for group in self._ready if group == ALONE or self._wants(group))
        return min(may, key=lambda group: self._ready[group][0], default=None)

    def _wants(self, group: Group) -> bool:
        """Whether another batch of a stream may go out: one for each slot, and one a node that waits for it.

        Those of other groups are not counted, since they may leave room beside them.
        """
        need = self._tasks[self._ready[group][0]].need
        holds = [times for node in self.nodes if (times := need.times(node))]
        return not holds or self._streams[group] < sum(holds) + len(holds)

    def _members(self, group: Group) -> tuple[int, ...]:
        """The tasks of the next batch."""
        queue = self._ready[group]
        if group == ALONE:
            return (queue[0],)
        slots = sum(self._tasks[queue[0]].need.times(node) for node in self.nodes)
        size = min(self.policy.max_stream, -(-len(queue) // (2 * max(1, slots))))
        held = 0
        for count, task in enumerate(queue[:size]):
            held += self._tasks[task].need.payload_bytes
            if count and held > self.policy.max_stream_bytes:
                return tuple(queue[:count])
        return tuple(queue[:size])

    def _refusal(self, need: Need) -> str:
        largest = _largest(self.nodes)
        return (
            f"{need.label}: no node of the cluster can hold it: it needs {need.memory_bytes:,} bytes of "
            f"memory, {need.cpus:g} CPUs and {need.gpus:g} GPUs; the largest of {len(self.nodes)} nodes has "
            f"{largest.memory_bytes:,} bytes, {largest.cpus:g} CPUs and {largest.gpus:g} GPUs"
        )


def _largest(nodes: Iterable[Node]) -> Node:
    return max(nodes, key=lambda node: (node.memory_bytes, node.cpus, node.gpus), default=Node(0, 0, 0))
