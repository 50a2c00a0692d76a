"""What a curious server can read of a run: attacks on what leaves a client, with controls.

The server is honest but curious: it follows the protocol and knows the client weights.
"""
