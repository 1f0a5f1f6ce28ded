"""Code evaluation: programs that are run, and pass@k."""
