-- A watcher who comes back reads on among the changes of its own tenant.
CREATE INDEX outbox_by_tenant ON outbox (tenant, sequence);
