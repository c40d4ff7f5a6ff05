-- The place after which a stream has everything. KEYS: where the log began, the stream.
-- Answers with nothing when the log was never begun.
local began = redis.call('GET', KEYS[1])
if not began or redis.call('EXISTS', KEYS[2]) == 0 then
  return began
end
local about = redis.call('XINFO', 'STREAM', KEYS[2])
local known = {}
for i = 1, #about, 2 do
  known[about[i]] = about[i + 1]
end
local first = known['first-entry'] and string.match(known['first-entry'][1], '^%d+')
-- Once anything has gone, the first entry is the last place to read after.
if first and known['entries-added'] > known['length'] then
  return first
end
return began
