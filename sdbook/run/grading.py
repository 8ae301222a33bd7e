"""`sdbook check`: a reader's own part against the book's, in the reader's words."""

import json
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from .settings import check_settings, setting

# What can be checked, by chapter. A part's number is its place here: UNet is 3.2.
PARTS = {
    "1": ("attention", "attention Attention GEGLU FeedForward TransformerBlock "
          "SpatialTransformer"),
    "2": ("resblocks", "timestep_embedding TimestepMLP ResBlock Downsample Upsample"),
    "3": ("unet", "pushed_channels UNet DownBlock MiddleBlock UpBlock"),
    "4": ("scenes", "describe read_caption stands"),
    "5": ("vae", "DiagonalGaussian ImageAttention Encoder Decoder AutoencoderKL"),
    "6": ("clip", "causal_mask quick_gelu CLIPAttention CLIPMLP CLIPTextModel "
          "ImageTower contrastive_loss"),
    "7": ("schedulers", "make_betas rescale_zero_terminal_snr posterior_mean "
          "posterior_variance split_output spaced_timesteps ddim_step DDPMScheduler "
          "DDIMScheduler"),
    "8": ("training.loss", "min_snr_weights lean_to_noise"),
    "9": ("pipeline", "guide"),
    "10": ("schedulers", "karras_sigmas euler_step heun_step lagrange_weights transfer "
           "plms_noise runge_kutta_noise dpmpp_2m_step unic_step euler_ancestral_step "
           "PNDMScheduler LMSDiscreteScheduler EulerDiscreteScheduler "
           "EulerAncestralDiscreteScheduler HeunDiscreteScheduler "
           "DPMSolverMultistepScheduler UniPCMultistepScheduler"),
    "11": ("evaluation", "wilson sign_test"),
    "12": ("finetuning", "LowRank"),
    "D": ("evaluation", "frechet_distance cubic_kernel kernel_distance"),
}  # fmt: skip


@dataclass(frozen=True)
class CheckConfig:
    """Compare parts of your own with the book's: `sdbook check 3.2 my_unet.py`.

    Attributes:
        answer: what to check (a part's number or name, or a chapter; none given: all
            that the file has), and the Python file that defines it; nothing: a list.
        seconds: how long the file may run.
    """

    answer: tuple[str, ...] = ()
    seconds: float = setting(120.0, more_than=0)

    def __post_init__(self):
        check_settings(self)


class Wrong(Exception):
    """Something is wrong with the reader's part, said in full."""


def say_error(error: Exception, file: str) -> str:
    """An exception of the reader's code, with the line where it arose."""
    if isinstance(error, Wrong):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == file]
    where = f"line {own[-1].lineno}: " if own else ""
    text = str(error).strip().split("\n")[0]
    return f"{where}{type(error).__name__}: {text}"


def numbered() -> dict[str, tuple[str, str]]:
    """{number: (module, name)} of every part that can be checked."""
    return {
        f"{chapter}.{place}": (module, name)
        for chapter, (module, names) in PARTS.items()
        for place, name in enumerate(names.split(), start=1)
    }


def find_parts(asked: str) -> list[str]:
    """The numbers of what is asked for: `3.2`, `UNet`, `3`, or `03` as in a file.

    Raises ValueError, with what is near, for anything else.
    """
    parts = numbered()
    names = {name: number for number, (_, name) in parts.items()}
    number = asked.removeprefix("0") or asked
    if number.upper() in PARTS:
        return [one for one in parts if one.split(".")[0] == number.upper()]
    number = number[:1].upper() + number[1:]
    if number in parts or asked in names:
        return [number if number in parts else names[asked]]
    chapter = number.split(".")[0]
    if chapter in PARTS:
        last = len(PARTS[chapter][1].split())
        raise ValueError(f"there is no part {asked}; chapter {chapter} has 1 to {last}")
    folded = {name.lower(): name for name in names}
    near = get_close_matches(asked.lower(), folded, 1)
    mean = f"did you mean {folded[near[0]]}?" if near else "`sdbook check` lists them"
    raise ValueError(f"there is nothing to check called {asked!r}; {mean}")


def check(config: CheckConfig) -> None:
    """Say of each part that is asked for whether the file's is right.

    Exits with 1 if one is not. Raises ValueError, and FileNotFoundError, for what
    cannot be asked.
    """
    asked, file = read_answer(config.answer)
    numbers = find_parts(asked) if asked else list(numbered())
    if file is None:
        print(listed(numbers))
        return
    results = examine(file, numbers, config.seconds)
    print("\n".join(line for result in results for line in result["lines"]))
    right = sum(result["right"] for result in results)
    if len(results) > 1:
        print(f"{right} of {len(results)} right")
    if right < len(results):
        sys.exit(1)


def read_answer(words: tuple[str, ...]) -> tuple[str, Path | None]:
    """What to check and in which file, from the words of the command line."""
    if len(words) > 2:
        raise ValueError(
            f"{len(words)} words are too many; as in: sdbook check 3.2 my_unet.py"
        )
    files = [word for word in words if word.endswith(".py") or Path(word).is_file()]
    files = files or list(words[1:])
    if not files:
        return "".join(words), None
    if len(files) > 1:
        raise ValueError(f"{files[1]} is another file; check one at a time")
    asked = [word for word in words if word != files[0]]
    path = Path(files[0])
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give yours, as my_unet.py")
    if path.suffix != ".py":
        raise ValueError(f"{path} is no Python file; put your part into one, as my.py")
    return "".join(asked), path


def listed(numbers: list[str]) -> str:
    """What can be checked, and how."""
    lines, parts = [], numbered()
    for number in numbers:
        module, name = parts[number]
        lines.append(f"  {number:6} {name:32} (sdbook.{module})")
    return "\n".join(
        ["Parts that `sdbook check` compares with the book's:", "", *lines, "",
         "Write one of them, under its name, into a file of your own. Then:",
         f"  sdbook check {numbers[0]} my.py", "",
         "By name, by chapter, or all that a file has:",
         f"  sdbook check {parts[numbers[0]][1]} my.py",
         f"  sdbook check {numbers[0].split('.')[0]} my.py",
         "  sdbook check my.py"]
    )  # fmt: skip


def examine(file: Path, numbers: list[str], seconds: float) -> list[dict]:
    """Run the file, and try its parts, in a process of its own.

    One result for each part that the file has: its number, whether it is right, and
    lines to say so. ValueError if the file fails by itself, has none of the parts, or
    takes too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, said = Path(folder) / "report", Path(folder) / "said"
        facts = {"file": str(file), "report": str(report), "numbers": numbers}
        with said.open("w") as out:
            try:
                done = subprocess.run(
                    [sys.executable, "-m", "sdbook.run.examining", json.dumps(facts)],
                    stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=seconds,
                )  # fmt: skip
                ended = f"ended by itself (exit status {done.returncode})"
            except subprocess.TimeoutExpired:
                ended = (
                    f"was still running after {seconds:g} seconds; is there a loop "
                    "without an end? What only a script should do belongs under "
                    '`if __name__ == "__main__":`'
                )
        lines = report.read_text().splitlines() if report.exists() else []
        words = said.read_text(errors="replace").strip()
    records = [json.loads(line) for line in lines]
    last = records[-1] if records else {}
    if "failed" in last:
        raise ValueError(f"{file} {last['failed']}")
    if "found" not in last:  # the last words of every examination
        where = f" in {last['begun']}" if last.get("begun") else ""
        tail = f"; it had printed: {words[-300:]}" if words else ""
        raise ValueError(f"{file} {ended}{where}{tail}")
    if not last["found"]:
        raise ValueError(say_missing(file, numbers, last["defined"]))
    return [record for record in records if "lines" in record]


def say_missing(file: Path, numbers: list[str], defined: list[str]) -> str:
    """That a file has none of the parts; and what it has instead."""
    has = f"it defines {', '.join(defined[:8]) or 'nothing'}"
    if len(numbers) > 1:
        return f"{file} has none of the parts that were asked for; {has}"
    (number,) = numbers
    name = numbered()[number][1]
    text = f"{file} defines no {name}, which is part {number}"
    if near := get_close_matches(name, defined, 1, 0.5):
        return f"{text}; is it your {near[0]}? Give it the book's name"
    return f"{text}; {has}. (An exercise has its own check, below it on its page)"
