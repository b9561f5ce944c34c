"""The webhook store's Lua scripts. The keys are those in the table of :mod:`service.webhooks.store`."""

from __future__ import annotations

from typing import Final

_NOW: Final = """
local function now()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
"""

# Seeing that a delivery is due and taking it must be one step, or two would send it. Taken, it is due again when
# its claim has run out: whoever took it may be dead. The claim's name is a nonce, so that a courier whose answer got
# lost finds by it what it has taken. What belongs to a job that was swept, or to a receiver that is gone, is dropped.
CLAIM: Final = (
    _NOW
    + """
local member = redis.call('GET', KEYS[2])
local fresh = not member
for _ = 1, 100 do
  if fresh then
    member = redis.call('ZRANGE', KEYS[1], '-inf', now(), 'BYSCORE', 'LIMIT', 0, 1)[1]
    if not member then return end
  end
  local id, event = string.match(member, '^(%S+) (%S+)$')
  local job = KEYS[3] .. ':' .. id
  local fields = redis.call('HGET', job .. ':deliveries', event)
  local url, secret, gone = unpack(redis.call('HMGET', job .. ':webhook', 'url', 'secret', 'gone'))
  if fields and url and not gone then
    if fresh then
      redis.call('ZADD', KEYS[1], now() + ARGV[1], member)
      redis.call('SET', KEYS[2], member, 'PX', ARGV[1])
      redis.call('HINCRBY', job .. ':deliveries', event .. ':tries', 1)
    end
    return {id, event, fields, redis.call('HGET', job .. ':deliveries', event .. ':tries'), url, secret}
  end
  redis.call('ZREM', KEYS[1], member)
  if fields then redis.call('HSET', job .. ':deliveries', event .. ':end', 'gone') end
  fresh = true
end
"""
)

# A try is recorded under its claim's name, so once, though the answer may be lost. What was delivered was, whoever
# holds the claim by now; but only who holds it may say when to try again.
FINISH: Final = (
    _NOW
    + """
local member = ARGV[1] .. ' ' .. ARGV[2]
local ours = redis.call('GET', KEYS[2]) == member
redis.call('DEL', KEYS[2])
if redis.call('EXISTS', KEYS[3] .. ':deliveries') == 0 then
  redis.call('ZREM', KEYS[1], member)
  return
end
redis.call('HSET', KEYS[3] .. ':tries', ARGV[3], ARGV[4])
if ARGV[5] == 'again' then
  if ours then redis.call('ZADD', KEYS[1], 'XX', now() + ARGV[6], member) end
elseif ours or ARGV[5] ~= 'failed' then
  redis.call('ZREM', KEYS[1], member)
  redis.call('HSET', KEYS[3] .. ':deliveries', ARGV[2] .. ':end', ARGV[5])
  if ARGV[5] == 'gone' then redis.call('HSET', KEYS[3] .. ':webhook', 'gone', 1) end
end
"""
)
