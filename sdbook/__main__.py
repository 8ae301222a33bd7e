"""The command line: `sdbook sample`, `train`, `train-lora`, `evaluate`, and others.

A command is a class of settings, whose fields are its flags, and a function of them.
The flags are read before anything heavy is imported.
"""

import difflib
import importlib
import re
import sys
import warnings
from dataclasses import fields
from pathlib import Path

# What a command does, its settings, and the function that takes them.
COMMANDS = {
    "sample": ("draw pictures from prompts",
        "run.sampling.SamplingConfig", "run.sampling.sample"),
    "train": ("train a UNet on a frozen VAE and text model",
        "run.configs.TrainingConfig", "training.train"),
    "train-vae": ("train a VAE",
        "run.configs.VAETrainingConfig", "training.train_vae"),
    "train-clip": ("train a CLIP text model and its tokenizer",
        "run.configs.CLIPTrainingConfig", "training.train_clip"),
    "train-lora": ("fine-tune a UNet on a few pictures",
        "run.configs.LoRATrainingConfig", "finetuning.train_lora"),
    "train-word": ("teach a text model a new word",
        "run.configs.WordTrainingConfig", "finetuning.train_word"),
    "evaluate": ("score a model's pictures, kind by kind of prompt",
        "run.evaluating.EvaluationConfig", "run.evaluating.evaluate"),
    "plot": ("draw the curves of runs",
        "run.curves.PlotConfig", "run.curves.plot"),
    "check": ("compare a part that you wrote with the book's",
        "run.grading.CheckConfig", "run.grading.check"),
}  # fmt: skip
# Lists of texts that are taken as they are typed, and not read as YAML.
AS_TYPED = {
    "prompt": ("--prompt", "TEXT", "what to draw, one text or more"),
    "runs": ("runs", "RUN", "output_dirs of trainings, or their log.jsonl"),
    "answer": ("answer", "PART FILE", "a part's number or name, and your file"),
}
# Flags of the first edition, and what to do without them.
GONE = dict.fromkeys(
    ("unet_channels", "layers_per_block", "attention_levels", "num_heads"),
    "choose a unet_preset, or describe the UNet in a file and give it as unet_config",
)
GONE["norm_num_groups"] = GONE["num_heads"]
GONE["offset_noise"] = "the noise is the schedule's alone; leave it out"
GONE |= dict.fromkeys(
    ("critic_weight", "critic_start", "perceptual_weight", "perceptual_path"),
    "the VAE is trained without it (chapter 5 has it as an exercise); leave it out",
)


def find(name: str):
    """What stands in the package under a dotted name."""
    module, _, name = name.rpartition(".")
    return getattr(importlib.import_module(f"sdbook.{module}"), name)


def find_settings(name: str) -> str:
    """What `--config` names: a file, or one that ships, as `lora` or with its path."""
    folder, path = Path(__file__).with_name("configs"), Path(name)
    own = folder / f"{path.stem}.yaml"
    plain = path.name in (own.stem, own.name)
    if path.is_file():
        check_file(path)
        return name
    if ":" in name:  # YAML itself is allowed, too
        return name
    if plain and path.parent in (Path(), Path("sdbook/configs")) and own.is_file():
        return str(own)
    names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
    raise FileNotFoundError(
        f"there is no file {name}; give --config a YAML file, or one of these, which "
        f"ship with the book: {names}"
    )


def check_file(path: Path) -> None:
    """Raise ValueError for a YAML file that is no UTF-8, or has a key twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        from .folders import text_of

        text_of(path.read_bytes(), path)  # which says what to do
        raise
    keys = re.findall(r"^(\w+) *:", text, re.M)
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"{path} has {twice[0]} twice; keep one")


def make_parser(command: str, config_class: type):
    """The parser of a command: each of its settings is a flag and a key of YAML."""
    from jsonargparse import ActionConfigFile, ArgumentParser

    class ConfigFile(ActionConfigFile):
        def __call__(self, parser, options, value, flag=None):
            super().__call__(parser, options, find_settings(value), flag)

    parser = ArgumentParser(
        prog=f"sdbook {command}",
        description=COMMANDS[command][0],
        exit_on_error=False,
        allow_abbrev=False,
    )
    words = "YAML file with these keys, or the name of one that ships, such as lora"
    parser.add_argument("--config", action=ConfigFile, help=words)
    as_typed = AS_TYPED.keys() & {one.name for one in fields(config_class)}
    for name in as_typed:
        flag, metavar, text = AS_TYPED[name]
        parser.add_argument(flag, nargs="*", default=[], metavar=metavar, help=text)
    parser.add_class_arguments(config_class, as_group=False, skip=as_typed)
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:  # `--dry_run` alone is true
            action.nargs, action.const = "?", True
    return parser


def read_flags(command: str, config_class: type, arguments: list[str]):
    """The settings that the arguments of a command say.

    Raises ValueError for what is no setting, or cannot be meant.
    """
    from jsonargparse import ArgumentError

    parser = make_parser(command, config_class)
    try:
        options = parser.parse_args(arguments)
    except ArgumentError as error:
        raise ValueError(explain(str(error), command, parser, config_class)) from None
    options.pop("config")
    for name in AS_TYPED.keys() & options.keys():
        options[name] = several_texts(name, options[name])
    return config_class(**options)


def several_texts(name: str, given) -> tuple[str, ...]:
    """The texts of the command line, or of a YAML file, where one needs no list."""
    texts = tuple(given) if isinstance(given, list) else (given,)
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(
                f"{name} holds {text!r}, which is no text; in a YAML file, put it "
                "between quotes"
            )
    return texts


def explain(error: str, command: str, parser, config_class: type) -> str:
    """What is wrong with the arguments, and what to do, from jsonargparse's words."""
    from .run.settings import say_demands

    known = [action.dest for action in parser._actions]
    unknown = r"(?i)unrecognized arguments: (.*)|.*\b(?:option|key) '(.*?)' is not"
    if found := re.match(unknown, error, re.S):
        words = found[2] or found[1]
        name = re.match(r"(-*)([\w-]*)", words)[2].replace("-", "_")
        if name in GONE:
            return f"{name} is gone: {GONE[name]}"
        near = difflib.get_close_matches(name, known, 1)
        mean = f"; did you mean {'' if found[2] else '--'}{near[0]}?" if near else ""
        error = f"there is no {words}{mean}"
    elif found := re.match(r'Parser key "(\w+)":.*?value: (.*?)$', error, re.S | re.M):
        name, value = found.groups()
        if name in {one.name for one in fields(config_class)}:
            return f"{name} is {value}; give {say_demands(config_class, name)}"
    elif found := re.match(r"Unexpected config: (.*)", error, re.S):
        blank = re.search(r"^(\w+): *(#.*)?$", found[1], re.M)
        lacks = f"{blank[1]} has no value" if blank else "it says nothing"
        error = f"config: {lacks}; write lines such as `seed: 3`"
    return f"{error} (sdbook {command} --help says what there is)"


def run(command: str, arguments: list[str]) -> None:
    """Read a command's arguments, and only then import and call what it does."""
    _, config_class, function = COMMANDS[command]
    config = read_flags(command, find(config_class), arguments)
    made = find(function)(config)
    if made is None:  # a dry run, or a command that has said what it wrote
        return
    from .run.next_steps import next_command
    from .run.processes import is_main_process

    if is_main_process():
        print(f"wrote {config.output_dir}")
        print(f"next: {next_command(command, config)}")


def main(arguments: list[str] | None = None):
    """Entry point of the `sdbook` command."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in COMMANDS:
        print("usage: sdbook COMMAND [--help] [--config FILE] [flags]\n")
        for name, (meaning, *_) in COMMANDS.items():
            print(f"  {name:12} {meaning}")
        asked = not arguments or arguments[0] in ("-h", "--help")
        if not asked:
            near = difflib.get_close_matches(arguments[0], COMMANDS, 1)
            mean = f"; did you mean {near[0]}?" if near else ""
            print(f"\nsdbook: no command {arguments[0]!r}{mean}", file=sys.stderr)
        sys.exit(0 if asked else 2)
    command = arguments[0]
    with warnings.catch_warnings():
        warnings.showwarning = tell_warning
        try:
            run(command, arguments[1:])
        except (ValueError, OSError) as error:
            sys.exit(fail(command, f"error: {reason_of(error)}"))
        except KeyboardInterrupt as error:
            sys.exit(fail(command, f"stopped {error}", 130))


def reason_of(error: Exception) -> str:
    """An error's message; of one in a data worker, the end of its traceback."""
    text = str(error).strip()
    if text.startswith("Caught "):
        text = text.splitlines()[-1].split(": ", 1)[-1]
    return text


def fail(command: str, message: str, status: int = 2) -> int:
    """Say what went wrong in one line; returns the exit status."""
    text = re.sub(r"\s*\n\s*", " ", message.strip())
    print(f"sdbook {command}: {text}", file=sys.stderr)
    return status


def tell_warning(message, *where, **more):
    """A warning as one line, without the place in the code."""
    print(f"sdbook: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
