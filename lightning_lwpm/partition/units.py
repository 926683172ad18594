"""Numbers for people: ``3.2 M``, ``5.0 MiB``, ``12.5 ms``."""

__all__ = ["counted", "human", "human_bytes", "human_seconds"]


def human(value: float) -> str:
    """A count: ``human(3_200_000)`` gives ``"3.2 M"``."""
    return _scaled(value, 1000, ("", "K", "M", "B"))


def human_bytes(value: float) -> str:
    """Bytes: ``human_bytes(5 << 20)`` gives ``"5.0 MiB"``."""
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def human_seconds(value: float) -> str:
    """Seconds: ``human_seconds(0.0125)`` gives ``"12.5 ms"``."""
    for limit, scale, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if value < limit:
            return f"{value * scale:.3g} {unit}"
    return f"{value:.3g} s"


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    text = f"{value:.0f} {units[0]}"
    for unit in units[1:]:
        if value < base - 0.05:  # what would be rounded up to the base belongs to the next unit
            break
        value /= base
        text = f"{value:.1f} {unit}"
    return text.strip()


def counted(number: int, one: str, many: str) -> str:
    """A number of things, in words."""
    return f"{number} {one if number == 1 else many}"
