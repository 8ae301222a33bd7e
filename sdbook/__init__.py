"""Stable Diffusion from Scratch in PyTorch: the package that the book's chapters build.

The modules are generated from `chapters/`; only this file and `__main__.py` are
written by hand. Nothing heavy is imported here.
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
