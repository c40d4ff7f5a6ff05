-- Appends a piece of a log, all of it or nothing.
-- KEYS: the lease, where the log stands, then the stream of each entry.
-- ARGV: the holder, where the log stood, where it stands then, how many entries a stream keeps, then the place and the payload
-- of each entry.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return {'not held', ''}
end
local stands = redis.call('GET', KEYS[2]) or ''
if stands ~= ARGV[2] then
  return {'at', stands}
end
for i = 3, #KEYS do
  local at = 5 + 2 * (i - 3)
  local function add()
    return redis.pcall('XADD', KEYS[i], 'MAXLEN', '~', ARGV[4], ARGV[at] .. '-0', 'p', ARGV[at + 1])
  end
  local added = add()
  if type(added) == 'table' and added.err and string.find(added.err, 'equal or smaller', 1, true) then
    -- The stream is of before the log began anew, at lower places.
    redis.call('DEL', KEYS[i])
    added = add()
  end
  if type(added) == 'table' and added.err then
    return added
  end
end
redis.call('SET', KEYS[2], ARGV[3])
return {'done', ''}
