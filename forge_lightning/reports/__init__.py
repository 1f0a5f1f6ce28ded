"""Reads what a run left on disk. Knows no Trainer."""
