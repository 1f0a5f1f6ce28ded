"""The edge controller: examples at the edge of what the model can do."""
