"""The job store for jobs that Redis has lost: a record comes back with its parts and its output, or not at all."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Final

from service.jobs.events import telling
from service.jobs.eventscripts import TELL
from service.jobs.jobstore import JobStore
from service.jobs.queuescripts import ENLIST
from service.jobs.record import JobRecord
from service.redis_connection import guarded
from workers.errors import OutputConflictError
from workers.task import PART_RESULT, PartResult

# As a job is made (see `CREATE` of service.jobs.jobscripts), but with what is known of it already: a scheduler that
# takes it sees all of that. Its output is claimed in the same step, or a job that was submitted since could take it in
# between, and the recovered one would fail, and delete what it had made.
RESTORE: Final = (
    TELL
    + ENLIST
    + """
local job, root, id, state = KEYS[1], string.sub(KEYS[2], 1, -5), ARGV[1], ARGV[5]
if redis.call('EXISTS', job) == 1 then
  return redis.call('LPOS', job .. ':writes', ARGV[2]) and 'restored' or 'exists'
end
local holder = redis.call('GET', KEYS[4])
if holder and holder ~= id and redis.call('ZSCORE', KEYS[3], holder) then return 'held ' .. holder end
redis.call('DEL', job .. ':parts', job .. ':surveys', job .. ':progress')
for at = 11, #ARGV, 4 do
  redis.call('HSET', job .. ':parts', ARGV[at], ARGV[at + 1])
  redis.call('HINCRBY', job .. ':progress', 'bytes_done', ARGV[at + 2])
  redis.call('HINCRBY', job .. ':progress', 'bytes_read', ARGV[at + 3])
end
redis.call('HSET', job, 'record', ARGV[3], 'version', ARGV[4], 'state', state, 'totals', ARGV[10])
enlist(root, job, id, ARGV[6], ARGV[7], state, false)
redis.call('LPUSH', job .. ':writes', ARGV[2])
redis.call('ZADD', KEYS[2], 0, id)
redis.call('ZADD', KEYS[2] .. ':' .. state, 0, id)
redis.call('ZADD', KEYS[3], 0, id)
redis.call('SET', KEYS[4], id)
tell(job, ARGV[8], state, ARGV[4], ARGV[9])
return 'restored'
"""
)


class RecoveryStore(JobStore):
    """A :class:`JobStore` that takes records as they are."""

    @guarded
    def restore(self, record: JobRecord, parts: Iterable[PartResult]) -> bool:
        """Store an unfinished job with its finished parts, and its claim on its output; whether it was not there.

        :raises OutputConflictError: another unfinished job has claimed the output.
        """
        event, entry, totals = telling(None, record)
        fields: list[str | int] = [
            *(record.id, secrets.token_hex(8), record.model_dump_json(), record.version, record.state),
            *(record.key or "", -record.priority, event, entry, totals),
        ]
        for part in parts:
            fields += [part.part, PART_RESULT.dump_json(part).decode(), part.size, part.bytes_read]
        keys = (
            self._job(record.id),
            self._key("jobs"),
            self._key("active"),
            self._key("output", record.output),
        )
        answer = str(self._run(RESTORE, keys, *fields))
        if answer.startswith("held "):
            raise OutputConflictError(
                f"{record.output} is the output of the unfinished job {answer[5:]}: cancel it, and recover then"
            )
        return answer == "restored"
