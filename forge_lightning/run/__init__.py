"""The run itself: random state, interruption, summary."""
