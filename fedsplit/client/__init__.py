"""The client's side: the layer that carries activations to the trunk, and the training loop."""
