"""Lua for what becomes of jobs that have ended: their outputs are looked at once more, and their records forgotten.

Beside what :mod:`service.jobs.jobstore` lists, these keep, after the namespace:

=====================  ==========  ==========================================================================
``ended``              sorted set  ids of the jobs that have ended, by when (Unix ms, of Redis's clock)
``unswept``            sorted set  those whose output is still to be looked at, likewise; 0 is at once
``sweeper``            string      owner of the right to sweep; expires when it does
``forgotten:<nonce>``  string      that a job was forgotten by this call; expires soon
=====================  ==========  ==========================================================================

A job that could not clear its output away has ``left`` in its own hash until somebody else has.
"""

from __future__ import annotations

from typing import Final

# That a job has ended, and that somebody has to look at what it left, are one fact with its record.
ENDED: Final = """
local function ended(root, job, id, left)
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  redis.call('ZADD', root .. 'ended', now, id)
  redis.call('ZADD', root .. 'unswept', left and 0 or now, id)
  if left then redis.call('HSET', job, 'left', 1) end
end
"""

# Whether a job may be forgotten is decided in the step that does so: between two, somebody could have taken its
# lease, to clear its output away. `left` binds who forgets on request; what is old enough goes.
FORGET: Final = """
local id, before, nonce = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local job, root = KEYS[1], string.sub(KEYS[2], 1, -5)
if redis.call('EXISTS', root .. 'forgotten:' .. nonce) == 1 then return 'forgotten' end
local state, key, record, left = unpack(redis.call('HMGET', job, 'state', 'key', 'record', 'left'))
if not state then return 'missing' end
if redis.call('ZSCORE', KEYS[3], id) then return state end
if redis.call('EXISTS', job .. ':lease') == 1 then return 'held' end
if before == 0 then
  if left then return 'held' end
else
  local at = redis.call('ZSCORE', root .. 'ended', id)
  if not at or tonumber(at) > before then return 'young' end
end
for _, event in ipairs(redis.call('HKEYS', job .. ':deliveries')) do
  redis.call('ZREM', root .. 'webhooks', id .. ' ' .. event)
end
local output = root .. 'output:' .. cjson.decode(record).output
if redis.call('GET', output) == id then redis.call('DEL', output) end
for _, index in ipairs({'jobs', 'jobs:' .. state, 'ended', 'unswept'}) do redis.call('ZREM', root .. index, id) end
if key and key ~= '' then
  redis.call('ZREM', root .. 'jobs@' .. key, id)
  redis.call('ZREM', root .. 'jobs@' .. key .. ':' .. state, id)
end
redis.call('SREM', root .. 'leases:held', id)
redis.call('UNLINK', job, job .. ':events', job .. ':writes', job .. ':parts', job .. ':surveys', job .. ':progress',
           job .. ':webhook', job .. ':deliveries', job .. ':tries')
redis.call('SET', root .. 'forgotten:' .. nonce, 1, 'EX', 60)
return 'forgotten'
"""

# One sweeps at a time, so that none undoes what another does; whoever it is goes on as long as it says so.
LEAD: Final = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
RETIRE: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""

# The answer counts only while the job is there: a member without one would be looked for for ever.
SWEPT: Final = """
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HDEL', KEYS[1], 'left')
"""

# Jobs that ended under a version that kept no such list.
ENROL: Final = """
local missing = 0
for _, state in ipairs({'succeeded', 'failed', 'cancelled'}) do
  missing = missing + redis.call('ZCARD', KEYS[1] .. 'jobs:' .. state)
end
if missing <= redis.call('ZCARD', KEYS[1] .. 'ended') then return 0 end
for _, state in ipairs({'succeeded', 'failed', 'cancelled'}) do
  for _, id in ipairs(redis.call('ZRANGE', KEYS[1] .. 'jobs:' .. state, 0, -1)) do
    local record = redis.call('HGET', KEYS[1] .. 'job:' .. id, 'record')
    if record then redis.call('ZADD', KEYS[1] .. 'ended', 'NX', cjson.decode(record).updated_at * 1000, id) end
  end
end
return 1
"""
