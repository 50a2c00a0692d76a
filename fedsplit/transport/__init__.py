"""The transport over gRPC: schema, frames, client and server; only this package imports grpc."""
