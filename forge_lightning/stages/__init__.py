"""Stages: which phase training is in."""
