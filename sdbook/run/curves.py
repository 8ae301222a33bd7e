"""`sdbook plot`: what the logs of runs say, as curves beside each other."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from .settings import check_png, check_settings

LEFT_OUT = ("step", "seconds")  # of the numbers in a log
AT_THE_END = ("lr", "grad_norm", "pictures_per_second", "skipped")


@dataclass(frozen=True)
class PlotConfig:
    """Draw the curves of runs: `sdbook plot`.

    Attributes:
        runs: output_dirs of trainings, or their log.jsonl.
        output_path: a PNG.
    """

    runs: tuple[str, ...] = ()
    output_path: str = "curves.png"

    def __post_init__(self):
        check_settings(self)
        if not self.runs or not all(run.strip() for run in self.runs):
            raise ValueError("name a run, as in: sdbook plot runs/unet")
        check_png("output_path", self.output_path)


def read_log(run: str) -> list[dict]:
    """The lines of a run's log, whole ones with a step.

    Raises FileNotFoundError without a log, ValueError for one without such a line.
    """
    from ..files import list_folder
    from .logs import step_of

    path = Path(run) / "log.jsonl" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        folder = path.parent
        has = f" ({folder} has: {list_folder(folder)})" if folder.is_dir() else ""
        raise FileNotFoundError(
            f"there is no {path}{has}; give the output_dir of a training"
        )
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [json.loads(line) for line in lines if step_of(line) >= 0]
    if not lines:
        raise ValueError(
            f"{path} is no log of a training, or nothing is in it yet; its lines hold "
            'JSON, such as {"step": 50, "loss": 0.1}'
        )
    return lines


def find_curves(lines: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """The points (step, value) of each number in a log."""
    curves = {}
    for line in lines:
        for name, value in line.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and math.isfinite(value) and name not in LEFT_OUT:
                curves.setdefault(name, []).append((line["step"], value))
    return curves


def draw_curves(runs: dict[str, dict]):
    """A figure with a plot for each number: in it a curve for each run that has it."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from ..viz import PALETTE, use_style

    found = dict.fromkeys(name for curves in runs.values() for name in curves)
    names = sorted(found, key=lambda name: name in AT_THE_END)
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    with mpl.rc_context():
        use_style()
        figure = Figure((4.2 * columns, 2.6 * rows + 0.3 * len(runs)))
        for place, name in enumerate(names, start=1):
            axis = figure.add_subplot(rows, columns, place, title=name, xlabel="step")
            found = []
            for number, (run, curves) in enumerate(runs.items()):
                points = curves.get(name, [])
                colour = PALETTE[number % len(PALETTE)]
                dashes = ("-", "--", ":")[number // len(PALETTE) % 3]
                dot = "o" if len(points) == 1 else None
                (line,) = axis.plot(
                    *zip(*points or [(math.nan, math.nan)]),
                    color=colour, linestyle=dashes, marker=dot, label=run,
                )  # fmt: skip
                found += [value for _, value in points]
            if name != "lr" and min(found) > 0 and max(found) > 30 * min(found):
                axis.set_yscale("log")
            axis.xaxis.set_major_locator(MaxNLocator(5))
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=1)
    return figure


def plot(config: PlotConfig) -> None:
    """Draw the curves of the runs into one PNG."""
    from ..files import write_atomically

    runs = {run: find_curves(read_log(run)) for run in config.runs}
    path = Path(config.output_path)
    if not any(runs.values()):
        raise ValueError(
            f"{', '.join(runs)}: the log holds no number to draw; name a run that "
            "has made a step or more"
        )
    figure = draw_curves(runs)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=144))
    print(f"wrote {path}")
