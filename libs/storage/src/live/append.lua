-- Appends a piece of a log, all of it or nothing.
-- KEYS: the lease, where the log stands, which streams it has, then the stream of each entry.
-- ARGV: the holder, where the log stood, where it stands then, how many entries a stream keeps, then the place and the payload
-- of each entry.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return {'not held', ''}
end
local stands = redis.call('GET', KEYS[2]) or ''
if stands ~= ARGV[2] then
  return {'at', stands}
end
for i = 4, #KEYS do
  local at = 5 + 2 * (i - 4)
  redis.call('SADD', KEYS[3], KEYS[i])
  redis.call('XADD', KEYS[i], 'MAXLEN', '~', ARGV[4], ARGV[at] .. '-0', 'p', ARGV[at + 1])
end
redis.call('SET', KEYS[2], ARGV[3])
return {'done', ''}
