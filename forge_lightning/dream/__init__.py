"""Dream replay: training again on stored and varied examples."""
