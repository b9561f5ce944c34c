"""The job store's Lua scripts: what has to happen in one step, and why.

The keys are those in the table of :mod:`service.jobstore`. Where a script is about one job, ``KEYS[1]`` is
that job's hash, and its other keys are that name and a suffix (for leases, see there). Whoever comes with a
token that is not the lease's is told so (``fenced``, or 0) and has changed nothing.
"""

from __future__ import annotations

from typing import Final

from service.queuescripts import ENLIST, TAKE_LEASE

# A record, its version, its place in the indexes and, when planning starts over, the end of everything that
# belonged to the old uploads are one fact: a reader must never see one without the other, and a crash
# between them would leave parts that name uploads that are gone.
SAVE: Final = (
    ENLIST
    + """
local job, lease, id = KEYS[1], KEYS[1] .. ':lease', ARGV[1]
if redis.call('LPOS', KEYS[1] .. ':writes', ARGV[2]) then return 'saved' end
local version, state = unpack(redis.call('HMGET', job, 'version', 'state'))
if not version then return 'missing' end
if ARGV[3] ~= '' and redis.call('HGET', lease, 'token') ~= ARGV[3] then return 'fenced' end
if version ~= ARGV[4] then return 'conflict' end
redis.call('HSET', job, 'record', ARGV[5], 'version', ARGV[6], 'state', ARGV[7])
redis.call('LPUSH', job .. ':writes', ARGV[2])
redis.call('LTRIM', job .. ':writes', 0, tonumber(ARGV[8]) - 1)
if state ~= ARGV[7] then
  redis.call('ZREM', KEYS[2] .. ':' .. state, id)
  redis.call('ZADD', KEYS[2] .. ':' .. ARGV[7], 0, id)
end
relist(string.sub(KEYS[2], 1, -5), job, id, state, ARGV[7], ARGV[9] == 'terminal')
if ARGV[9] == 'terminal' then redis.call('ZREM', KEYS[3], id) end
if ARGV[9] == 'restarted' then redis.call('DEL', job .. ':parts', job .. ':surveys', job .. ':progress') end
return 'saved'
"""
)

# A record and its place in the indexes are one fact; the check that the id is new belongs to it, or two
# creators would both see it free. So does the number of the key's jobs that wait, or several would be the last.
CREATE: Final = (
    ENLIST
    + """
if redis.call('EXISTS', KEYS[1]) == 1 then
  return redis.call('LPOS', KEYS[1] .. ':writes', ARGV[2]) and 'created' or 'exists'
end
local root, most = string.sub(KEYS[2], 1, -5), tonumber(ARGV[9])
if most > 0 and redis.call('ZCARD', root .. 'jobs@' .. ARGV[7] .. ':queued') >= most then return 'full' end
redis.call('HSET', KEYS[1], 'record', ARGV[3], 'version', ARGV[4], 'state', ARGV[5])
enlist(root, KEYS[1], ARGV[1], ARGV[7], ARGV[8], ARGV[5], ARGV[6] == 'terminal')
redis.call('LPUSH', KEYS[1] .. ':writes', ARGV[2])
redis.call('ZADD', KEYS[2], 0, ARGV[1])
redis.call('ZADD', KEYS[2] .. ':' .. ARGV[5], 0, ARGV[1])
if ARGV[6] ~= 'terminal' then redis.call('ZADD', KEYS[3], 0, ARGV[1]) end
return 'created'
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
RECORD: Final = """
if redis.call('HGET', KEYS[1] .. ':lease', 'token') ~= ARGV[1] then return 'fenced' end
local state = redis.call('HGET', KEYS[1], 'state')
if ARGV[2] ~= '' and state ~= ARGV[2] then return 'the job is ' .. (state or 'gone') end
if redis.call('HSETNX', KEYS[2], ARGV[3], ARGV[4]) == 0 then return 'known' end
redis.call('HINCRBY', KEYS[1] .. ':progress', 'bytes_done', ARGV[5])
redis.call('HINCRBY', KEYS[1] .. ':progress', 'bytes_read', ARGV[6])
return 'new'
"""

# Seeing that an output is free and claiming it must be one step. A claim whose job has ended, or was lost
# with its record, binds nobody: its scheduler died between the job's last change and the release.
CLAIM_OUTPUT: Final = """
if redis.call('HGET', KEYS[1] .. ':lease', 'token') ~= ARGV[1] then return 'fenced' end
local holder = redis.call('GET', KEYS[2])
if holder and holder ~= ARGV[2] and redis.call('ZSCORE', KEYS[3], holder) then return holder end
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
