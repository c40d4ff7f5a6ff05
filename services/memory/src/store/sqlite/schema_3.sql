-- What watchers are told of a change outlives the memory itself: its id and where it lived.
ALTER TABLE outbox ADD COLUMN id BLOB;
ALTER TABLE outbox ADD COLUMN scope INTEGER;
UPDATE outbox SET
    id = (SELECT m.id FROM memories m WHERE m.key = outbox.memory),
    scope = (SELECT m.scope FROM memories m WHERE m.key = outbox.memory);
