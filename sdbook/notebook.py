"""A class may go on in the next cell of a notebook.

    from sdbook.notebook import add_to

    class Circle:
        def __init__(self, radius):
            self.radius = radius

    @add_to(Circle)             # a later cell, with a paragraph between
    def area(self):
        return 3.14159 * self.radius**2

`Circle(1).area()` works at once. In the package there is no trace of it:
tools/book/export.py writes the method into the one class of the module. (The idea is
`add_to_class` of Dive into Deep Learning.)
"""

import builtins
import functools
import inspect
from types import FunctionType

__all__ = ["add_to", "in_words"]


def add_to(cls):
    """Make the function below a method of a class that an earlier cell began.

    It stands above all other decorators (`@property`, `@classmethod`,
    `@torch.no_grad()`, …). Outside the class the function's name keeps the meaning
    that it had before. Running the cell again replaces the method.

    Raises:
        TypeError: for what is no class, or no function.
    """
    if not isinstance(cls, type):
        raise TypeError(f"add_to needs a class, not {cls!r}")

    def add(member):
        parts = [getattr(member, part, None) for part in ("fget", "fset", "func")]
        layers = [part for part in parts if part] or [member]
        function = inspect.unwrap(layers[0])
        if not isinstance(function, FunctionType):
            raise TypeError(f"add_to({cls.__name__}) needs a function, not {member!r}")
        name = function.__name__
        while layers:  # a wrapper and what it wraps have the same full name
            layer = layers.pop()
            layer.__qualname__ = f"{cls.__qualname__}.{name}"
            layers += [layer.__wrapped__] if hasattr(layer, "__wrapped__") else []
        setattr(cls, name, member)
        if hasattr(member, "__set_name__"):
            member.__set_name__(cls, name)
        return function.__globals__.get(name, getattr(builtins, name, None))

    return add


def in_words(check):
    """An exercise's check that says what it finds in a sentence, never in a traceback.

    `check` returns a few words, such as "right"; what it asserts in vain becomes
    "Not yet: …". Other errors are the answer's own, and are raised.
    """

    @functools.wraps(check)
    def sentence(*answer):
        try:
            found = check(*answer)
        except AssertionError as error:
            found = f"not yet: {str(error) or 'that is not it'}"
        return found[:1].upper() + found[1:] + "."

    return sentence
