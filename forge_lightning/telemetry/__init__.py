"""Telemetry: where time, memory and gradients go."""
