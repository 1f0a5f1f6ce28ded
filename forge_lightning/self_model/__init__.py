"""The self-model head: a network that predicts its own activations."""
