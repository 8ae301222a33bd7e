"""For all tests: shapes are checked, numbers repeat, threads do not fight."""

import ast
import os
import random

import pytest
from jaxtyping import _import_hook, install_import_hook


def visit_outside_functions(visitor, node):
    """A function in a function is made anew in every call: to wrap it costs more."""
    if not isinstance(node, ast.FunctionDef):
        ast.NodeVisitor.generic_visit(visitor, node)


# From here on, every annotated function of the package checks its shapes when called.
_import_hook.JaxtypingTransformer.generic_visit = visit_outside_functions
install_import_hook("sdbook", "beartype.beartype")


@pytest.fixture(autouse=True, scope="session")
def threads():
    """As many threads as there are cores, but not more, and fewer if one asks."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(cores, 2))))


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random numbers, alone or among others."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
