-- Begins a log at a place, unless it has begun. KEYS: where it stands, where it began. ARGV: the place. Answers with where it stands.
if redis.call('SET', KEYS[1], ARGV[1], 'NX') then
  redis.call('SET', KEYS[2], ARGV[1])
end
return redis.call('GET', KEYS[1])
