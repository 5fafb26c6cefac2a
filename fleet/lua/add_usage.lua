-- Add counts to an hour's usage, unless this batch was added already (its answer may have been lost).
-- KEYS[1] {ns}:usage:{hour}   hash, TTL ARGV[1] s
-- ARGV    ttl, writer, number of the batch (rises per writer), then field, amount pairs
-- Returns 1 when added, 0 when it was there already.
local mark = '#' .. ARGV[2]
if tonumber(redis.call('HGET', KEYS[1], mark) or '0') >= tonumber(ARGV[3]) then
  return 0
end
for i = 4, #ARGV, 2 do
  redis.call('HINCRBY', KEYS[1], ARGV[i], ARGV[i + 1])
end
redis.call('HSET', KEYS[1], mark, ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[1])
return 1
