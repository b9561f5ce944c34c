"""Lua for whose turn it is: jobs by key and priority, and the leases that are held.

Beside what :mod:`service.jobs.jobstore` lists, these keep, after the namespace:

==========================  ==========  ==========================================================================
``jobs@<key>``              sorted set  ids of an API key's jobs, all with score 0, so in the order of the ids
``jobs@<key>:<state>``      sorted set  those in that state, likewise
``queue:<key>``             sorted set  ids of a key's unfinished jobs, those with the highest priority first
``queues``                  set         keys that have, or had, unfinished jobs; empty for jobs without a key
``leases:held``             set         ids of the jobs whose lease may be in force
==========================  ==========  ==========================================================================

A job's own hash has its ``key`` and its ``rank`` in the queue: its priority, negated.
"""

from __future__ import annotations

from typing import Final

# A job's places in the indexes are one fact with its record.
ENLIST: Final = """
local function enlist(root, job, id, key, rank, state, terminal)
  redis.call('HSET', job, 'key', key, 'rank', rank)
  if key ~= '' then
    redis.call('ZADD', root .. 'jobs@' .. key, 0, id)
    redis.call('ZADD', root .. 'jobs@' .. key .. ':' .. state, 0, id)
  end
  if terminal then return end
  redis.call('ZADD', root .. 'queue:' .. key, rank, id)
  redis.call('SADD', root .. 'queues', key)
end
local function relist(root, job, id, before, after, terminal)
  local key = redis.call('HGET', job, 'key') or ''
  if key ~= '' and before ~= after then
    redis.call('ZREM', root .. 'jobs@' .. key .. ':' .. before, id)
    redis.call('ZADD', root .. 'jobs@' .. key .. ':' .. after, 0, id)
  end
  if terminal then redis.call('ZREM', root .. 'queue:' .. key, id) end
end
"""

# Seeing that a lease is free and taking it must be one step, or two would take it. The token is new because
# of its random epoch even if Redis forgot the counter; the counter tells people which lease came later. A
# lease with our own epoch is what a lost answer gave us.
TAKE_LEASE: Final = """
local function take(job)
  local held = redis.call('HGET', job .. ':lease', 'token')
  if held then return string.sub(held, 1, #ARGV[1] + 1) == ARGV[1] .. ':' and held end
  local token = ARGV[1] .. ':' .. redis.call('INCR', KEYS[1])
  redis.call('HSET', job .. ':lease', 'token', token, 'owner', ARGV[2])
  redis.call('PEXPIRE', job .. ':lease', ARGV[3])
  redis.call('SADD', KEYS[1] .. ':held', string.match(job, '[^:]+$'))
  return token
end
"""

# Whose turn it is and the lease are one step: two schedulers would otherwise both see room for one more. A job
# runs as long as its lease is in force, so one whose scheduler died is counted until then and no longer, and one
# that has ended, whose output is being cleared up (:mod:`service.running.sweeper`), is not. Of each
# key only so many jobs are looked at as it has running: the first one after those is free. Should the queues lack
# jobs (written by a version that knew none), they are made again from `active`.
CLAIM_NEXT: Final = (
    TAKE_LEASE
    + """
local root = string.sub(KEYS[3], 1, -4)
local held, running, total = {}, {}, 0
for _, id in ipairs(redis.call('SMEMBERS', KEYS[1] .. ':held')) do
  local job = KEYS[3] .. ':' .. id
  local token = redis.call('HGET', job .. ':lease', 'token')
  if not token then
    redis.call('SREM', KEYS[1] .. ':held', id)
  elseif string.sub(token, 1, #ARGV[1] + 1) == ARGV[1] .. ':' then
    return {redis.call('HGET', job, 'record'), token}
  else
    held[id] = true
    if redis.call('ZSCORE', KEYS[2], id) then
      local key = redis.call('HGET', job, 'key') or ''
      running[key], total = (running[key] or 0) + 1, total + 1
    end
  end
end
if tonumber(ARGV[4]) > 0 and total >= tonumber(ARGV[4]) then return end
local known = 0
for _, key in ipairs(redis.call('SMEMBERS', root .. 'queues')) do
  known = known + redis.call('ZCARD', root .. 'queue:' .. key)
end
if known < redis.call('ZCARD', KEYS[2]) then
  for _, id in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
    local key, rank = unpack(redis.call('HMGET', KEYS[3] .. ':' .. id, 'key', 'rank'))
    redis.call('ZADD', root .. 'queue:' .. (key or ''), rank or 0, id)
    redis.call('SADD', root .. 'queues', key or '')
  end
end
local best
for _, key in ipairs(redis.call('SMEMBERS', root .. 'queues')) do
  local busy, most = running[key] or 0, 0
  if key ~= '' then
    most = tonumber(redis.call('HGET', root .. 'key:' .. key, 'running_jobs') or ARGV[5])
  end
  if most == 0 or busy < most then
    local found = redis.call('ZRANGE', root .. 'queue:' .. key, 0, busy, 'WITHSCORES')
    if #found == 0 then redis.call('SREM', root .. 'queues', key) end
    for i = 1, #found, 2 do
      local id, rank = found[i], tonumber(found[i + 1])
      if not held[id] then
        if not best or rank < best.rank or rank == best.rank
          and (busy < best.busy or busy == best.busy and id < best.id) then
          best = {id = id, rank = rank, busy = busy}
        end
        break
      end
    end
  end
end
if best then
  local job = KEYS[3] .. ':' .. best.id
  local token = take(job)
  return {redis.call('HGET', job, 'record'), token}
end
"""
)
