"""The process in which `sdbook check` runs a reader's file and tries its parts.

What is wrong with the file itself is said at once, before PyTorch is imported.
"""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

from .grading import Wrong, numbered, say_error


def run_file(file: str) -> dict:
    """Run a file as a module called `reader`; what it defines. Wrong if it fails."""
    sys.path.insert(0, str(Path(file).parent))
    sys.argv = [file]
    spec = importlib.util.spec_from_file_location("reader", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["reader"] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise Wrong(f"is no Python: line {error.lineno}: {error.msg}") from None
    except SystemExit:
        raise Wrong("ends with sys.exit() before it can be checked") from None
    except Exception as error:
        raise Wrong(f"fails when it is run: {say_error(error, file)}") from error
    return vars(module)


def main(file: str, report: str, numbers: list[str]) -> None:
    """Try the parts `numbers` of a file, and write what came of it into a report."""

    def write(**record):
        with open(report, "a", encoding="utf-8") as out:
            out.write(json.dumps(record) + "\n")

    file = str(Path(file).resolve())
    write(begun="")
    try:
        names = run_file(file)
    except Wrong as error:
        write(failed=str(error))
        return
    parts = numbered()
    defined = [
        name for name, one in names.items()
        if callable(one) and getattr(one, "__module__", "") == "reader"
    ]  # fmt: skip
    # Of several parts those that are the file's own; one that is asked for by name may
    # be imported, which is then said.
    known = names if len(numbers) == 1 else defined
    found = [number for number in numbers if parts[number][1] in known]
    if found:
        from .comparing import try_part  # PyTorch, and the book's parts
    for number in found:
        module, name = parts[number]
        write(begun=f"{number} {name}")
        reference = getattr(importlib.import_module(f"sdbook.{module}"), name)
        right, lines = try_part(name, names[name], reference, names, file)
        if right:
            lines = [f"{number} {name}: right, {lines[0]}"]
        else:
            lines = [f"{number} {name}: wrong", *(f"    {line}" for line in lines)]
        write(number=number, right=right, lines=lines)
    write(found=found, defined=defined)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
