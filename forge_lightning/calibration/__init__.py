"""Calibration: how far probabilities can be trusted."""
