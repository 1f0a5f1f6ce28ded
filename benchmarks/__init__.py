"""Figures, each from one command. Results stand beside them as Markdown."""
