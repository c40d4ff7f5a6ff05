-- Forgets where a log began and stands, and leaves its streams: from now on it has others. KEYS: where it stands, where it began,
-- how often it began anew. Answers with which streams it has left.
redis.call('DEL', KEYS[1], KEYS[2])
return redis.call('INCR', KEYS[3]) - 1
