"""What several enhancements share: the callbacks' base, loss terms, taps, labels, logs."""
