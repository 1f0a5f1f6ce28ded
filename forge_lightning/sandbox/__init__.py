"""Runs generated programs. Knows nothing of training."""
