"""The Lua by which scripts tell of what they change, :mod:`service.jobs.events`; keys: :mod:`service.jobs.jobstore`."""

from __future__ import annotations

from typing import Final

KEPT_EVENTS: Final = 2000
"""About how many events a job's stream keeps, the latest; hours of progress."""

KEPT_WAKINGS: Final = 10_000
"""About how many entries the feed keeps: what may happen while a reader of it is out of touch for a moment."""

PROGRESS_MS: Final = 1000
"""Shortest time between two progress events of a job, in milliseconds."""

# `events` of the job is what happened; `events` of the deployment is only who has news, so that a process that
# serves the streams of many jobs waits at one place. An event that tells how far the job is reads that in the
# step that made it so. What a webhook wants to be told is queued for it here, so that it is told of exactly
# what happened; it holds the event itself, since the stream forgets.
TELL: Final = f"""
local function tell(job, event, state, version, entry)
  local done = redis.call('HMGET', job .. ':progress', 'bytes_done', 'bytes_read')
  local fields = {{
    'event', event, 'state', state, 'version', version, 'entry', entry,
    'totals', redis.call('HGET', job, 'totals') or '0 0 0',
    'parts', redis.call('HLEN', job .. ':parts'), 'surveys', redis.call('HLEN', job .. ':surveys'),
    'bytes_done', done[1] or 0, 'bytes_read', done[2] or 0,
  }}
  local event_id = redis.call('XADD', job .. ':events', 'MAXLEN', '~', {KEPT_EVENTS}, '*', unpack(fields))
  local namespace, id = string.match(job, '^(.*)job:([^:]+)$')
  local wanted = redis.call('HGET', job .. ':webhook', 'events')
  if wanted and string.find(wanted, ' ' .. event .. ' ', 1, true) then
    local time = redis.call('TIME')
    redis.call('HSET', job .. ':deliveries', event_id, cjson.encode(fields))
    redis.call('ZADD', namespace .. 'webhooks', time[1] * 1000 + math.floor(time[2] / 1000), id .. ' ' .. event_id)
  end
  redis.call('XADD', namespace .. 'events', 'MAXLEN', '~', {KEPT_WAKINGS}, '*', 'job', id)
end
"""

# Written by whoever finishes work, so never more often than every second, whatever the number of parts. What
# comes in that second is told by the next event, whichever it is.
TELL_PROGRESS: Final = (
    TELL
    + f"""
local function tell_progress(job)
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local told = tonumber(redis.call('HGET', job .. ':progress', 'told_at') or 0)
  if now < told + {PROGRESS_MS} and now >= told then return end
  redis.call('HSET', job .. ':progress', 'told_at', now)
  local state, version = unpack(redis.call('HMGET', job, 'state', 'version'))
  if state then tell(job, 'progress', state, version, '') end
end
"""
)

# A warning of somebody who does not own the job any more is nobody's; told once, though the answer may be lost.
WARN: Final = (
    TELL
    + """
if redis.call('HGET', KEYS[1] .. ':lease', 'token') ~= ARGV[1] then return 'fenced' end
if redis.call('LPOS', KEYS[1] .. ':writes', ARGV[2]) then return 'told' end
redis.call('LPUSH', KEYS[1] .. ':writes', ARGV[2])
redis.call('LTRIM', KEYS[1] .. ':writes', 0, tonumber(ARGV[3]) - 1)
local state, version = unpack(redis.call('HMGET', KEYS[1], 'state', 'version'))
if state then tell(KEYS[1], 'warning', state, version, ARGV[4]) end
return 'told'
"""
)
