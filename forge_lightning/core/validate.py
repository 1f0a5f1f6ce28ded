"""Check the arguments of a constructor."""


def require(owner: str, ok: bool, argument: str, value: object, allowed: str) -> None:
    """Raise unless an argument is allowed.

    Args:
        owner: Name of the class or function whose argument it is.
        ok: Whether the value is allowed.
        argument: Name of the argument.
        value: What the user gave.
        allowed: What is allowed, in the words that follow "must be".

    Raises:
        ValueError: If not ``ok``.

    Example:
        >>> require("Mix", 0 <= 2.0 < 1, "fraction", 2.0, "in [0, 1)")
        Traceback (most recent call last):
        ...
        ValueError: `Mix(fraction=2.0)` must be in [0, 1).
    """
    if not ok:
        raise ValueError(f"`{owner}({argument}={value!r})` must be {allowed}.")
