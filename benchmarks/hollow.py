"""Merges of holes: a scheduler as ever, whose workers describe and record parts of full size and make no byte of them.

``python -m benchmarks.hollow READY_FILE`` is ``mergemill schedule`` with two differences. Parts go to :func:`tasks` in
place of the merge, and the directory it writes to is taken for one that cannot reserve space, so that ten thousand
parts of 64 MiB are a sparse file. Plans, requests, results, records and the commit are those of a real merge of
that size, and so is all that they cost; only the workers have nothing to do.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.inputs import INDEX, Inputs, Size
from workers.safetensors_format import encode, layout, prefix
from workers.store import files
from workers.store.disk import Disk
from workers.store.uris import to_path
from workers.task import (
    BLOCK_BYTES,
    PART,
    PART_RESULT,
    HeaderPiece,
    JSONValue,
    Part,
    PartResult,
    TensorDigest,
    block_count,
    part_id,
)

TASKS_ENTRY = "benchmarks.hollow:tasks"

PACE_FILE = "MERGEMILL_BENCH_PACE_FILE"
"""The variable of the environment that names a file with the seconds that a worker takes for a part."""


def tasks(payloads: Sequence[JSONValue]) -> Iterator[tuple[int, JSONValue]]:
    """What :func:`workers.entry.tasks` answers, for parts that nobody makes."""
    pace_s = float(Path(os.environ[PACE_FILE]).read_text())
    for number, payload in enumerate(payloads):
        time.sleep(pace_s)
        part = PART.validate_json(payload["part"])
        result = result_of(part)
        _record(part, result, payload["upload"])
        yield number, PART_RESULT.dump_json(result).decode()


def result_of(part: Part) -> PartResult:
    """A result as long as the real one: a digest for every block of every tensor, and all stages timed."""
    digests = tuple(
        TensorDigest(piece.name, piece.offset // BLOCK_BYTES, _blocks(piece.name, piece.offset, piece.nbytes))
        for piece in part.pieces
        if not isinstance(piece, HeaderPiece)
    )
    read = sum(ref.nbytes for ref in part.reads)
    seconds = dict.fromkeys(("read", "merge", "digest", "write"), 0.123456)
    return PartResult(
        part_id(part), part.shard, part.number, part.nbytes, _sha(str(part.number))[:16], digests, read, {},
        peak_bytes=1 << 30, seconds=seconds,
    )  # fmt: skip


def _blocks(name: str, offset: int, nbytes: int) -> tuple[str, ...]:
    first = offset // BLOCK_BYTES
    return tuple(_sha(f"{name} {number}") for number in range(first, first + block_count(nbytes)))


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _record(part: Part, result: PartResult, upload: Mapping[str, str]) -> None:
    """Note the part as a directory's upload does, see :mod:`workers.store.local_uploads`."""
    path = Path(to_path(upload["uri"]))
    note = files.hidden_directory(path) / "uploads" / upload["id"] / "parts" / f"{part.number}.json"
    record = {"offset": part.offset, "size": part.nbytes, "etag": result.etag}
    Disk().replace_file(note, json.dumps(record).encode())


def make_hollow_inputs(size: Size, root: Path) -> Inputs:
    """The inputs of a size below ``root``, of any size: headers, and a hole where the tensors would be."""
    inputs = Inputs(size, root / size.name)
    shards = size.shards()
    shapes = size.shapes()
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    weight_map = {tensor: name for name, group in zip(names, shards, strict=True) for tensor in group}
    for model in size.models:
        directory = inputs.directory(model)
        directory.mkdir(parents=True)
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (directory / "config.json").write_text(json.dumps(size.config()))
        for name, group in zip(names, shards, strict=True):
            header = layout((tensor, "BF16", shapes[tensor]) for tensor in group)
            with (directory / name).open("wb") as file:
                file.write(prefix(encode(header, {"format": "pt"})))
                file.truncate(file.tell() + max(entry.end for entry in header))
    return inputs


def main() -> None:
    """Schedule until SIGTERM; see the settings ``MERGEMILL_*``."""
    from service.running import scheduler, work  # noqa: PLC0415
    from service.settings import Settings  # noqa: PLC0415
    from service.watching.logs import configure  # noqa: PLC0415

    def refuse(_: int, __: int, ___: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    os.posix_fallocate = refuse
    vars(work)["TASKS_ENTRY"] = TASKS_ENTRY
    settings = Settings()
    configure(settings.log_format)
    scheduler.main(settings, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
