"""The trunk's side: service, engine, parameter versions, aggregation, stash and KV caches."""
