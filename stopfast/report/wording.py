"""Numbers as a caption has them."""

from collections.abc import Mapping


def percent(shares: Mapping[str, float]) -> str:
    """Return shares by name as a list of percentages."""
    return ", ".join(f"{100 * share:.0f}\u00a0% ({name})" for name, share in shares.items())
