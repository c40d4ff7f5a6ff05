-- Forgets where a log began and stands, and its streams. KEYS: where it stands, where it began, which streams it has.
for _, stream in ipairs(redis.call('SMEMBERS', KEYS[3])) do
  redis.call('UNLINK', stream)
end
redis.call('UNLINK', KEYS[1], KEYS[2], KEYS[3])
