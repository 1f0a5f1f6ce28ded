"""The command line, `forge-fit`."""
