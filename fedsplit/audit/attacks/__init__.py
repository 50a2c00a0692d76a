"""The attacks, one in each file: pure functions of what the server receives and knows."""
