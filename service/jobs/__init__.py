"""Jobs: what may happen to one, and where it is kept: records, queue, leases, events and finished parts in Redis."""
