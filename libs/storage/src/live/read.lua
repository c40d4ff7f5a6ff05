-- Reads a stream after a place. KEYS: where the log began, the stream. ARGV: the place, how many.
-- Answers with nothing when something may be missing between: the log began later, or what followed the place was trimmed.

-- Places are larger than what a number of Lua keeps exactly.
local function less(a, b)
  if #a ~= #b then
    return #a < #b
  end
  return a < b
end

local began = redis.call('GET', KEYS[1])
if not began or less(ARGV[1], began) then
  return false
end
if redis.call('EXISTS', KEYS[2]) == 0 then
  return {}
end
local about = redis.call('XINFO', 'STREAM', KEYS[2])
local known = {}
for i = 1, #about, 2 do
  known[about[i]] = about[i + 1]
end
local first = known['first-entry']
-- Of what is older than the first entry, something may have gone once anything has.
if first and known['entries-added'] > known['length'] and less(ARGV[1], string.match(first[1], '^%d+')) then
  return false
end
local found = {}
for _, entry in ipairs(redis.call('XRANGE', KEYS[2], '(' .. ARGV[1] .. '-0', '+', 'COUNT', ARGV[2])) do
  found[#found + 1] = string.match(entry[1], '^%d+')
  found[#found + 1] = entry[2][2]
end
return found
