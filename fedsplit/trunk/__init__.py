"""The trunk's side: engine, parameter versions, aggregation, stash and the service over them."""
