"""The job store's Lua scripts: what has to happen in one step, and why.

The keys are those in the table of :mod:`service.jobs.jobstore`. Where a script is about one job, ``KEYS[1]`` is
that job's hash, and its other keys are that name and a suffix (for leases, see there). Whoever comes with a
token that is not the lease's is told so (``fenced``, or 0) and has changed nothing.
"""

from __future__ import annotations

from typing import Final

from service.jobs.eventscripts import TELL, TELL_PROGRESS
from service.jobs.queuescripts import ENLIST, TAKE_LEASE
from service.jobs.sweepscripts import ENDED

# A record, its version, its place in the indexes, the event that tells of it and, when planning starts over, the
# end of everything that belonged to the old uploads are one fact: a reader must never see one without the other,
# and a crash between them would leave parts that name uploads that are gone. So is the end of a job and that of its
# claim on the output: nobody would come back for that.
SAVE: Final = (
    TELL
    + ENLIST
    + ENDED
    + """
local job, lease, id = KEYS[1], KEYS[1] .. ':lease', ARGV[1]
if redis.call('LPOS', KEYS[1] .. ':writes', ARGV[2]) then return 'saved' end
local version, state = unpack(redis.call('HMGET', job, 'version', 'state'))
if not version then return 'missing' end
if ARGV[3] ~= '' and redis.call('HGET', lease, 'token') ~= ARGV[3] then return 'fenced' end
if version ~= ARGV[4] then return 'conflict' end
redis.call('HSET', job, 'record', ARGV[5], 'version', ARGV[6], 'state', ARGV[7], 'totals', ARGV[12])
redis.call('LPUSH', job .. ':writes', ARGV[2])
redis.call('LTRIM', job .. ':writes', 0, tonumber(ARGV[8]) - 1)
if state ~= ARGV[7] then
  redis.call('ZREM', KEYS[2] .. ':' .. state, id)
  redis.call('ZADD', KEYS[2] .. ':' .. ARGV[7], 0, id)
end
relist(string.sub(KEYS[2], 1, -5), job, id, state, ARGV[7], ARGV[9] == 'terminal')
if ARGV[9] == 'terminal' then
  redis.call('ZREM', KEYS[3], id)
  ended(string.sub(KEYS[2], 1, -5), job, id, ARGV[13] ~= '')
  if ARGV[13] == '' and redis.call('GET', KEYS[4]) == id then redis.call('DEL', KEYS[4]) end
end
if ARGV[9] == 'restarted' then redis.call('DEL', job .. ':parts', job .. ':surveys', job .. ':progress') end
if ARGV[10] ~= '' then tell(job, ARGV[10], ARGV[7], ARGV[6], ARGV[11]) end
return 'saved'
"""
)

# A record and its place in the indexes are one fact; the check that the id is new belongs to it, or two
# creators would both see it free. So does the idempotency key: one that is known without its job, or a job
# without its key, would lose or double a request. A key whose job was swept away binds nobody. And so does the
# number of the API key's jobs that wait, or several would be the last; what was made before is not counted again.
CREATE: Final = (
    TELL
    + ENLIST
    + """
if ARGV[7] ~= '' then
  local print, job = unpack(redis.call('HMGET', KEYS[4], 'fingerprint', 'job'))
  if print and redis.call('EXISTS', string.sub(KEYS[1], 1, -#ARGV[1] - 1) .. job) == 1 then
    if print ~= ARGV[7] then return 'another' end
    if job ~= ARGV[1] then return job end
  end
end
if redis.call('EXISTS', KEYS[1]) == 1 then
  return redis.call('LPOS', KEYS[1] .. ':writes', ARGV[2]) and ARGV[1] or 'exists'
end
local root, most = string.sub(KEYS[2], 1, -5), tonumber(ARGV[13])
if most > 0 and redis.call('ZCARD', root .. 'jobs@' .. ARGV[11] .. ':queued') >= most then return 'full' end
redis.call('HSET', KEYS[1], 'record', ARGV[3], 'version', ARGV[4], 'state', ARGV[5])
enlist(root, KEYS[1], ARGV[1], ARGV[11], ARGV[12], ARGV[5], ARGV[6] == 'terminal')
redis.call('LPUSH', KEYS[1] .. ':writes', ARGV[2])
redis.call('ZADD', KEYS[2], 0, ARGV[1])
redis.call('ZADD', KEYS[2] .. ':' .. ARGV[5], 0, ARGV[1])
if ARGV[6] ~= 'terminal' then redis.call('ZADD', KEYS[3], 0, ARGV[1]) end
if ARGV[7] ~= '' then
  redis.call('HSET', KEYS[4], 'fingerprint', ARGV[7], 'job', ARGV[1])
  redis.call('PEXPIRE', KEYS[4], ARGV[8])
end
if ARGV[14] then
  redis.call('HSET', KEYS[1] .. ':webhook', 'url', ARGV[14], 'events', ARGV[15], 'secret', ARGV[16])
end
tell(KEYS[1], ARGV[9], ARGV[5], ARGV[4], ARGV[10])
return ARGV[1]
"""
)

ACQUIRE: Final = (
    TAKE_LEASE
    + """
if redis.call('EXISTS', KEYS[2]) == 0 then return 'missing' end
return take(KEYS[2])
"""
)

# Between a check of the token and the change, the lease could pass to another owner: hence one step.
RENEW: Final = """
if redis.call('HGET', KEYS[1] .. ':lease', 'token') ~= ARGV[1] then return 0 end
redis.call('SADD', KEYS[2] .. ':held', string.match(KEYS[1], '[^:]+$'))
return redis.call('PEXPIRE', KEYS[1] .. ':lease', ARGV[2])
"""
RELEASE: Final = """
if redis.call('HGET', KEYS[1] .. ':lease', 'token') ~= ARGV[1] then return 0 end
redis.call('SREM', KEYS[2] .. ':held', string.match(KEYS[1], '[^:]+$'))
return redis.call('DEL', KEYS[1] .. ':lease')
"""

# A result and the progress that it makes are one fact, or a retry would count it twice; the token and the
# state are checked in the same step, since results of a former owner, or for uploads that are gone, are void.
# Results that came together are one step too: each step waits for the disk.
RECORD: Final = (
    TELL_PROGRESS
    + """
if redis.call('HGET', KEYS[1] .. ':lease', 'token') ~= ARGV[1] then return 'fenced' end
local state = redis.call('HGET', KEYS[1], 'state')
if ARGV[2] ~= '' and state ~= ARGV[2] then return 'the job is ' .. (state or 'gone') end
local new = 0
for at = 3, #ARGV, 4 do
  if redis.call('HSETNX', KEYS[2], ARGV[at], ARGV[at + 1]) == 1 then
    redis.call('HINCRBY', KEYS[1] .. ':progress', 'bytes_done', ARGV[at + 2])
    redis.call('HINCRBY', KEYS[1] .. ':progress', 'bytes_read', ARGV[at + 3])
    new = new + 1
  end
end
if new > 0 then tell_progress(KEYS[1]) end
return new
"""
)

# Seeing that an output is free and claiming it must be one step. A claim whose job has ended, or was lost
# with its record, binds nobody: its scheduler died between the job's last change and the release. Unless somebody
# has that job's lease, and so is about to release the output, or to clear it up (:mod:`service.running.sweeper`).
CLAIM_OUTPUT: Final = """
if redis.call('HGET', KEYS[1] .. ':lease', 'token') ~= ARGV[1] then return 'fenced' end
local holder = redis.call('GET', KEYS[2])
if holder and holder ~= ARGV[2] then
  if redis.call('ZSCORE', KEYS[3], holder) then return holder end
  if redis.call('EXISTS', string.sub(KEYS[1], 1, -#ARGV[2] - 1) .. holder .. ':lease') == 1 then return 'busy' end
end
redis.call('SET', KEYS[2], ARGV[2])
return 'claimed'
"""
RELEASE_OUTPUT: Final = """
if redis.call('HGET', KEYS[1] .. ':lease', 'token') ~= ARGV[1] then return 'fenced' end
if redis.call('GET', KEYS[2]) == ARGV[2] then redis.call('DEL', KEYS[2]) end
return 'released'
"""

# Ids, records and progress in one step: between two, a job could change its state, and a page of failed jobs
# show one that is not, or a count be of other uploads than the record's. A row is what `status` reads of a job.
PAGE: Final = """
local page = {}
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], ARGV[1], '-', 'BYLEX', 'REV', 'LIMIT', 0, ARGV[2])) do
  local job = KEYS[2] .. ':' .. id
  page[#page + 1] = {
    redis.call('HGET', job, 'record'),
    redis.call('HLEN', job .. ':parts'),
    redis.call('HMGET', job .. ':progress', 'bytes_done', 'bytes_read'),
    redis.call('HLEN', job .. ':surveys'),
    redis.call('HGET', job .. ':lease', 'owner'),
  }
end
return page
"""
