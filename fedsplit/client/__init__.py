"""The client: the layer that sends activations to the trunk, and the training loop."""
