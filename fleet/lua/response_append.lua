-- Append events of a background response, if the writer still owns its run. Safe to repeat.
-- KEYS[1] {ns}:response:{id}          hash {owner, status, response, ...}
-- KEYS[2] {ns}:response_events:{id}   stream, entry id 1-{number of the unit's last event}
-- KEYS[3] {ns}:response_runs          sorted set of ids by end of lease (ms)
-- ARGV    owner, id, lease (ms), ttl of the events (s), ttl of the response (s),
--         status and response JSON to set ('' to leave them), 1 if that ends the run,
--         then per unit: number of its last event, number of events, events, tokens (msgpack)
-- Returns 1 when written, 0 when the run is not this owner's: taken over, cancelled, deleted.
local known = redis.call('HMGET', KEYS[1], 'owner', 'status')
if known[1] ~= ARGV[1] then
  return 0
end
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
local number = -1
if last[1] then
  number = tonumber(string.match(last[1][1], '-(%d+)$'))
end
for i = 9, #ARGV, 4 do
  if tonumber(ARGV[i]) > number then
    redis.call('XADD', KEYS[2], '1-' .. ARGV[i], 'n', ARGV[i + 1], 'events', ARGV[i + 2], 'tokens', ARGV[i + 3])
  end
end
redis.call('EXPIRE', KEYS[2], ARGV[4])
if ARGV[6] ~= '' then
  redis.call('HSET', KEYS[1], 'status', ARGV[6], 'response', ARGV[7])
end
redis.call('EXPIRE', KEYS[1], ARGV[5])
if ARGV[8] == '1' then
  redis.call('ZREM', KEYS[3], ARGV[2])
  redis.call('HDEL', KEYS[1], 'request', 'api_key')
else
  local now = redis.call('TIME')
  redis.call('ZADD', KEYS[3], now[1] * 1000 + math.floor(now[2] / 1000) + ARGV[3], ARGV[2])
end
return 1
