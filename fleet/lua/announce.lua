-- Renew the lease of a process and publish its record, unless another life holds the name.
-- KEYS[1] {ns}:worker:{name} or {ns}:gateway:{name}   hash {incarnation, record}, TTL the lease
-- KEYS[2] {ns}:workers or {ns}:gateways               set of names
-- ARGV    name, incarnation, record (msgpack), lease in ms
-- Returns 1 when announced, 0 when another live incarnation holds the name.
local holder = redis.call('HGET', KEYS[1], 'incarnation')
if holder and holder ~= ARGV[2] then
  return 0
end
redis.call('HSET', KEYS[1], 'incarnation', ARGV[2], 'record', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('SADD', KEYS[2], ARGV[1])
return 1
