-- Take over background responses whose lease has run out.
-- KEYS[1] {ns}:response_runs   sorted set of ids by end of lease (ms)
-- ARGV    owner (a new name per call), lease (ms), most to take, prefix of the responses' keys
-- The hashes are found by prefix: which ones is known only here.
-- Returns the ids taken.
local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
local taken = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[3])) do
  local key = ARGV[4] .. id
  local status = redis.call('HGET', key, 'status')
  if status == 'queued' or status == 'in_progress' then
    redis.call('HSET', key, 'owner', ARGV[1] .. '/' .. id)
    redis.call('HINCRBY', key, 'lives', 1)
    redis.call('ZADD', KEYS[1], now + ARGV[2], id)
    taken[#taken + 1] = id
  else
    redis.call('ZREM', KEYS[1], id)
  end
end
return taken
