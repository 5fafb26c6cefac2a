-- End a background response from outside its run: whoever owns it finds its next write refused.
-- KEYS[1] {ns}:response:{id}          hash {owner, status, response, ...}
-- KEYS[2] {ns}:response_events:{id}   stream, entry id 1-{number of the unit's last event}
-- KEYS[3] {ns}:response_runs          sorted set of ids by end of lease (ms)
-- ARGV    id, status, response JSON, ttl of the events (s), the last event up to its sequence number, its rest, no tokens
-- Returns 1 when ended, 0 when it had ended already.
local status = redis.call('HGET', KEYS[1], 'status')
if status ~= 'queued' and status ~= 'in_progress' then
  return 0
end
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
local number = 0
if last[1] then
  number = tonumber(string.match(last[1][1], '-(%d+)$')) + 1
end
local event = ARGV[5] .. string.format('%d', number) .. ARGV[6]
redis.call('XADD', KEYS[2], string.format('1-%d', number), 'n', 1, 'events', event, 'tokens', ARGV[7])
redis.call('EXPIRE', KEYS[2], ARGV[4])
redis.call('HSET', KEYS[1], 'status', ARGV[2], 'response', ARGV[3], 'owner', '')
redis.call('HDEL', KEYS[1], 'request', 'api_key')
redis.call('ZREM', KEYS[3], ARGV[1])
return 1
