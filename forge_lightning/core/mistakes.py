"""Mistakes of a user, each explained by one message. Without Lightning, so that it comes at once."""


class UsageError(Exception):
    """A command or a file that cannot be as it was given; the message says what to do."""
