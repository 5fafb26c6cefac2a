-- Renew the lease of a background response, or let go of it with a lease of 0.
-- KEYS[1] {ns}:response:{id}   hash {owner, ...}
-- KEYS[2] {ns}:response_runs   sorted set of ids by end of lease (ms)
-- ARGV    owner, id, lease (ms)
-- Returns 1 when renewed, 0 when the run is not this owner's: taken over, cancelled, deleted.
if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[1] then
  return 0
end
local now = redis.call('TIME')
redis.call('ZADD', KEYS[2], now[1] * 1000 + math.floor(now[2] / 1000) + ARGV[3], ARGV[2])
if ARGV[3] == '0' then
  redis.call('HINCRBY', KEYS[1], 'lives', -1) -- leaving in order is no sign of a response that brings gateways down
end
return 1
