"""Counts and sizes as people say them: 1 picture, 2 pictures, 1,000 pictures, 3 GB."""


def counted(count: int, one: str, many: str | None = None) -> str:
    """A count with its noun; `many` where that is not `one` and an s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def readable(size: int) -> str:
    """A number of bytes."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
