"""The events of training and generation, and the sinks that they go to."""
