"""What the settings share."""

Range = tuple[float, float]


def require(condition: bool, message: str) -> None:
    """Refuse a setting.

    Raises:
        ValueError: the condition does not hold.
    """
    if not condition:
        raise ValueError(message)
