"""Mistakes of a user, told in one message. Without Lightning, so that they are told at once."""


class UsageError(Exception):
    """A command or a file that cannot be as it was given; the message says what to do."""
