"""Carry out an earlier merge that is staged: make its parts, and complete its shards, before later ones read them."""

from __future__ import annotations

from collections.abc import Callable

from service.jobs.record import JobRecord
from service.jobs.transitions import ShardCompleted
from service.planning.plan import Plan
from service.running.commit import Output
from workers import tracing
from workers.errors import UploadNotFoundError
from workers.store.uris import join


@tracing.traced("stage")
def carry_out(
    stage: Plan,
    digest: str,
    output: Output,
    record: Callable[[], JobRecord],
    apply: Callable[[ShardCompleted], None],
    make: Callable[[], None],
) -> None:
    """Carry a stage out as far as it is not; again, after whatever came between, is no error.

    :param digest: the whole plan's, which all that the job writes carries.
    :param record: the job's record as it is now.
    :param apply: changes it.
    :param make: makes all parts of shards that the record does not call complete.
    :raises UploadNotFoundError: a shard that was complete is gone, or its upload is.
    """
    for shard in stage.shards:
        made = output.made_by(join(output.uri, shard.name), digest)
        is_known = shard.name in record().completed_shards
        if made is not None and made.size == shard.size:
            if not is_known:  # its completion was not recorded
                apply(ShardCompleted(shard.name))
        elif is_known:
            raise UploadNotFoundError(f"{shard.name} of an earlier merge is gone")
    missing = [shard for shard in stage.shards if shard.name not in record().completed_shards]
    if not missing:
        return
    make()
    for shard in missing:
        output.complete(shard, record().uploads, digest)
        apply(ShardCompleted(shard.name))
