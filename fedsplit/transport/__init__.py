"""The only place that imports grpc: the wire's schema, its frames, and both of its ends."""
