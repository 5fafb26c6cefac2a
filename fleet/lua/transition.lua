-- Compare-and-set of a request's state. Refuses what is older than what is known.
-- KEYS[1] {ns}:request:{request_id}   hash, TTL ARGV[4] s while live, ARGV[5] s once ended
-- ARGV    state, epoch, time (Unix s), ttl live, ttl ended, then field, value pairs to set along
-- Returns 1 when taken, 0 when refused.
local rank = {queued = 0, prefilling = 1, handing_off = 2, decoding = 3, finished = 4, failed = 4}
local known = redis.call('HMGET', KEYS[1], 'state', 'epoch')
if known[1] then
  if rank[known[1]] == 4 then
    return 0
  end
  local known_epoch, epoch = tonumber(known[2]), tonumber(ARGV[2])
  if epoch < known_epoch then
    return 0
  end
  if epoch == known_epoch and rank[ARGV[1]] < rank[known[1]] then
    return 0
  end
end
local fields = {'state', ARGV[1], 'epoch', ARGV[2], 'updated', ARGV[3]}
for i = 6, #ARGV do
  fields[#fields + 1] = ARGV[i]
end
redis.call('HSET', KEYS[1], unpack(fields))
redis.call('HSETNX', KEYS[1], 'created', ARGV[3])
redis.call('EXPIRE', KEYS[1], rank[ARGV[1]] == 4 and ARGV[5] or ARGV[4])
return 1
