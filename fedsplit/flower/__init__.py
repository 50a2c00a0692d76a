"""The Flower door: the only place in fedsplit that imports flwr."""
