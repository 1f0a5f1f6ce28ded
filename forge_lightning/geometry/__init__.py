"""Geometry: the dimension of what layers return."""
