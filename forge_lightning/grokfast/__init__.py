"""Grokfast: gradients whose slow part is amplified."""
