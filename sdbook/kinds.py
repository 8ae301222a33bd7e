"""Kinds of values: what a setting or an argument has to be, and Python's own for it.

Written by hand.
"""

import math
import numbers
import os
from typing import Any, get_args, get_origin

# What a kind is called, for one value and for several.
KIND_NAMES = {
    bool: ("true or false", "a list such as [true, false]"),
    int: ("a whole number", "a list of whole numbers, such as [1, 2]"),
    float: ("a number", "a list of numbers, such as [0.5, 1]"),
    str: ("a text", "a list of texts, such as [this, that]"),
}


def cleaned(value, kind) -> Any:
    """A value as Python's own of a kind; TypeError if it is not of this kind.

    Lists become tuples, paths texts, and NumPy's numbers Python's. Truth is no number,
    and neither is NaN.
    """
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(cleaned(one, get_args(kind)[0]) for one in value)
    if kind is str and isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool) or kind is bool:
        if isinstance(value, bool) and kind is bool:
            return value
    elif kind is int and isinstance(value, numbers.Integral):
        return int(value)
    elif kind is float and isinstance(value, numbers.Real) and math.isfinite(value):
        return value if isinstance(value, int) else float(value)
    raise TypeError(f"{value!r} is not of the kind {kind}")
