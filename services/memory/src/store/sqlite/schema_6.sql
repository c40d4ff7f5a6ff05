-- Removing a memory for good also removes the answers that tell of it.
CREATE INDEX requests_by_memory ON requests (tenant, json_extract(answer, '$.memory.id'));

-- Places of the items that an import has refused, as JSON: the same stream tries them again.
ALTER TABLE imports ADD COLUMN refused TEXT NOT NULL DEFAULT '[]';
