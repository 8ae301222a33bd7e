"""A reader's part of the book, and the book's own, asked the same: where they differ.

Each part is made twice, once by the reader and once by the book, with the same
arguments and weights, and asked the same (trials.py). Where the answers differ, the
book's part is changed by one known mistake after another (mistakes.py): the one that
then answers as the reader's does is told.
"""

import copy
import importlib
import inspect
import math

import numpy as np
import torch
from torch import nn

from .grading import Wrong, say_error
from .trials import TRIALS

BOUND = 1e-5  # the book's own, relative to the largest number


class Maker:
    """Makes a part, the reader's or the book's, as a trial asks for it.

    A module gets the weights of the book's; `change` is done to it afterwards, and
    `changed` says whether there was something to change. `strength` is how large
    weights are: a trial may make them small, where an eps tells, or large.
    """

    strength = 1.0

    def __init__(self, make, reference, names=None, change=None):
        self.make, self.reference, self.change = make, reference, change
        self.names, self.twins, self.changed = names or {}, {}, change is None

    def __call__(self, *args, **options):
        check_signature(self.make, self.reference, args, options)
        # Before the reader's part can change a list that it is given.
        copies = [self.twins.get(id(one), copy.copy(one)) for one in args]
        made = self.make(*args, **options)
        if isinstance(made, nn.Module):
            original = seeded(self.reference, self.strength, *copies, **options)
            fill(made, original)
            if self.change:
                self.changed |= self.change(made)
            made.eval()
        return made

    def config(self, place: str, **values):
        """A config of the book's, or the reader's own of that name."""
        module, _, name = place.rpartition(".")
        book = getattr(importlib.import_module(f"sdbook.{module}"), name)
        own = self.names.get(name, book)(**values)
        self.twins[id(own)] = book(**values)
        return own


def seeded(kind: type, strength: float, *args, **options) -> nn.Module:
    """A module with weights that hide nothing: no zeros and ones."""
    torch.manual_seed(0)
    module = kind(*args, **options)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "norm" in name:
                weight.add_(0.2 * torch.randn_like(weight))
            else:
                weight.add_(0.02 * torch.randn_like(weight)).mul_(strength)
    return module


def fill(module: nn.Module, original: nn.Module) -> None:
    """Load the book's weights; Wrong, with the names that differ, if they do not fit.

    A module that holds none of its own takes them through what it is made of.
    """
    own, wanted = module.state_dict(), original.state_dict()
    lacks = [key for key in wanted if key not in own]
    extra = [key for key in own if key not in wanted]
    if lacks or extra:
        said = [f"lacks {shortened(lacks)}"] if lacks else []
        said += [f"has {shortened(extra)}, which the book's has not"] if extra else []
        raise Wrong(
            f"its weights do not fit: it {' and '.join(said)}. Attributes are named as "
            "on the page, so that published weights load"
        )
    for key, value in wanted.items():
        if own[key].shape != value.shape:
            raise Wrong(
                f"{key} has shape {tuple(own[key].shape)}, not {tuple(value.shape)}"
            )
    module.load_state_dict(wanted)


def shortened(names: list[str], count: int = 4) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def check_signature(make, reference, args, options) -> None:
    """Wrong unless the reader's part can be called as the book's is."""
    try:
        inspect.signature(make).bind(*args, **options)
    except TypeError as error:
        raise Wrong(
            f"it cannot be called as the book's: {error}. Yours takes "
            f"{arguments_of(make)}; the book's takes {arguments_of(reference)}"
        ) from None
    except ValueError:  # something without a signature
        return


def arguments_of(function) -> str:
    """The arguments of a function or class, without their types."""
    bare = [
        one.replace(annotation=inspect.Parameter.empty)
        for one in inspect.signature(function).parameters.values()
    ]
    return str(inspect.Signature(bare))


# ---- comparing -----------------------------------------------------------------


def difference(got, want) -> float:
    """The largest difference, relative to the largest number; Wrong for another kind.

    Texts, whole numbers and True or False have to be equal: 0 or infinity.
    """
    if isinstance(want, tuple | list) and not is_number_list(want):
        if not isinstance(got, tuple | list) or len(got) != len(want):
            raise Wrong(f"gives {kind_of(got)}, not {kind_of(want)}")
        return max((difference(*pair) for pair in zip(got, want)), default=0.0)
    if not isinstance(want, torch.Tensor | np.ndarray | float | int | tuple | list):
        if got != want:
            raise Wrong(f"gives {got!r}, not {want!r}")
        return 0.0
    try:
        mine, theirs = (as_numbers(one) for one in (got, want))
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"gives {kind_of(got)}, not {kind_of(want)}") from None
    if mine.shape != theirs.shape:
        raise Wrong(f"gives shape {tuple(mine.shape)}, not {tuple(theirs.shape)}")
    if torch.isnan(mine).any() and not torch.isnan(theirs).any():
        raise Wrong("gives NaN: something is divided by zero, or a root of less than 0")
    if mine.numel() == 0:
        return 0.0
    size = max(theirs[theirs.isfinite()].abs().tolist(), default=1.0) or 1e-12
    equal = (mine == theirs) | (mine.isnan() & theirs.isnan())
    gap = torch.where(equal, 0.0, (mine - theirs).abs()).max().item()
    return math.inf if math.isnan(gap) else gap / size


def is_number_list(value) -> bool:
    """Is it a list of numbers, and not one of tensors?"""
    return bool(value) and all(isinstance(one, int | float) for one in value)


def as_numbers(value) -> torch.Tensor:
    """Anything made of numbers, in double precision. TypeError for a text."""
    if isinstance(value, str) or value is None:
        raise TypeError
    if isinstance(value, torch.Tensor):
        return value.detach().double()
    return torch.from_numpy(np.array(value, dtype=np.float64))


def kind_of(value) -> str:
    """What something is, in few words."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"numbers of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"{type(value).__name__} {value!r:.40}"


def answers(trial, maker: Maker, labels=()):
    """(what was asked, the answer or the exception) of a trial, one by one.

    It ends at the first exception, of which only `labels` can say what was asked.
    """
    asked, count = trial(maker), 0
    torch.manual_seed(0)
    while True:
        try:
            with torch.no_grad():
                yield next(asked)
        except StopIteration:
            return
        except Exception as error:
            yield (labels[count] if count < len(labels) else ""), error
            return
        count += 1


def try_part(name: str, reader, reference, names: dict, file: str) -> tuple[bool, list]:
    """Is the reader's part right? And lines that say it, without the name."""
    if reader is reference:
        return False, ["it is the book's own, imported; write yours"]
    trial = TRIALS[name]
    wanted = list(answers(trial, Maker(reference, reference)))
    labels = [label for label, _ in wanted]
    got = list(answers(trial, Maker(reader, reference, names), labels))
    lines, right, largest = [], True, 0.0
    for (label, want), (_, mine) in zip(wanted, got):
        try:
            if isinstance(mine, Exception):
                raise Wrong(say_error(mine, file)) from mine
            gap = difference(mine, want)
        except Wrong as error:
            lines.append(f"{label}: {error}")
            right = False
            continue
        largest = max(largest, gap)
        if not gap <= BOUND:
            right = False
            lines.append(f"{label}: {say_gap(gap)}")
    if right:
        return True, [say_gap(largest)]
    fine = len(wanted) - len(lines)
    if fine and len(got) == len(wanted):
        lines.append(f"right in {fine} of {len(wanted)} questions")
    hint = find_hint(name, reference, trial, wanted, got)
    return False, lines + ([f"hint: {hint}"] if hint else [])


def say_gap(gap: float) -> str:
    """A difference beside what is allowed."""
    return f"largest relative difference {gap:.1e} (allowed {BOUND:.0e})"


def find_hint(name, reference, trial, wanted, got) -> str | None:
    """The known mistake that answers just as the reader's part does."""
    from .mistakes import mistakes_of  # imports every chapter: only if it is needed

    mine = [value for _, value in got if not isinstance(value, Exception)]
    if len(mine) < len(wanted):
        return None
    for words, alternative, change in mistakes_of(name, reference):
        maker = Maker(alternative, reference, change=change)
        found = (value for _, value in answers(trial, maker))
        if all(alike(*pair) for pair in zip(mine, found)) and maker.changed:
            return words
    return say_factor(wanted, mine)


def alike(mine, theirs) -> bool:
    """Are two answers the same, up to rounding?"""
    try:
        return not isinstance(theirs, Exception) and difference(mine, theirs) <= BOUND
    except Wrong:
        return False


def say_factor(wanted, numbers) -> str | None:
    """That the answers are the right ones times a number, if they are."""
    factors = []
    for (_, want), mine in zip(wanted, numbers):
        if not isinstance(want, torch.Tensor | float) or isinstance(mine, tuple):
            return None
        try:
            want, mine = as_numbers(want), as_numbers(mine)
        except (TypeError, ValueError, RuntimeError):
            return None
        if mine.shape != want.shape or not want.square().sum() > 0:
            return None
        factor = ((mine * want).sum() / want.square().sum()).item()
        if not (mine - factor * want).abs().max() <= BOUND * want.abs().max():
            return None
        factors.append(factor)
    if factors and max(factors) - min(factors) < 1e-4 * abs(factors[0]):
        return f"yours is {factors[0]:.4g} times the book's, everywhere"
    return None
