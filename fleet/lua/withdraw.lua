-- Take a process out of the registry, if this incarnation still holds the name.
-- KEYS and ARGV[1..2] as in announce.lua. Returns 1 when removed.
if redis.call('HGET', KEYS[1], 'incarnation') ~= ARGV[2] then
  return 0
end
redis.call('DEL', KEYS[1])
redis.call('SREM', KEYS[2], ARGV[1])
return 1
