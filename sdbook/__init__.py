"""Stable Diffusion from Scratch in PyTorch: the package that the book's chapters build.

What the book teaches is generated from `chapters/`. What no chapter teaches is written
by hand: `run/`, the command line (`__main__.py`), `notebook.py`, and the files that
hand on names, as this one does. Nothing heavy is imported here.
"""

__version__ = "0.1.0"

__all__ = ["StableDiffusion", "__version__"]


def __getattr__(name):
    """Import `StableDiffusion` only when somebody asks for it."""
    if name == "StableDiffusion":
        from .pipeline import StableDiffusion

        return StableDiffusion
    raise AttributeError(f"module 'sdbook' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), "StableDiffusion"])
