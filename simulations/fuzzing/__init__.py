"""A fuzzer: legal messages, replies and configs, changed by a grammar, are given to readers."""
