"""The temperature curriculum: agreement with a running mean of the model."""
