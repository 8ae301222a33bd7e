"""Write the package sdbook/ from the chapters.

    python tools/book/export.py                             all chapters
    python tools/book/export.py chapters/01_attention.ipynb   what this chapter writes
    python tools/book/export.py --check                     change nothing, fail if
                                                       anything would change

Three directives, nbdev's, each the first line of its cell:

    #| default_exp attention    this chapter writes sdbook/attention.py
    #| export                   this cell goes into that module
    #| export weights           this cell goes into sdbook/weights.py instead

The imports of all cells move to the top of the module. `from sdbook.x import y`
becomes `from .x import y`. The chapter's title becomes the module's docstring,
and `__all__` lists the public names in the order in which they are defined.
"""

import argparse
import ast
import difflib
import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "sdbook"
WRITTEN_BY_HAND = {"__init__.py", "__main__.py"}
LINE_LENGTH = 88

DIRECTIVE = re.compile(r"#\| (default_exp|export)(?: (\S+))?\s*$")
LOOKS_LIKE_DIRECTIVE = re.compile(r"\s*#\s*\|")
MAGIC = re.compile(r"\s*(%|!|\?)|[^#'\"]*=\s*(%|!)\s*\w|[^#'\"]*\w\?+\s*$")
IMPORT_SDBOOK = re.compile(rf"from\s+{PACKAGE}(?:\.(\w+))?\s+import\b")
# jaxtyping writes shapes as strings inside annotations: Float[Tensor, "b c h w"].
# They are no names, although to a linter they look like forward references.
SHAPED = {"Float", "Float16", "Float32", "Float64", "Int", "Int32", "Int64", "UInt8"}
SHAPED |= {"Bool", "Integer", "Num", "Real", "Inexact", "Complex", "Shaped", "Key"}


@dataclass
class Cell:
    """A code cell that goes into a module."""

    chapter: str
    id: str
    lines: list[str]
    first_line: int  # of `lines` in the cell, counted from 1

    def where(self, line: int | None = None) -> str:
        """`chapters/01_attention.ipynb, cell heads, line 3`"""
        place = f"{self.chapter}, cell {self.id}"
        return place if line is None else f"{place}, line {line + self.first_line}"


@dataclass
class Chapter:
    """What one notebook gives to the package."""

    path: str
    title: str | None = None
    default: str | None = None
    exports: list[tuple[str, Cell]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def modules(self) -> list[str]:
        """The modules this chapter writes to, in order of appearance."""
        return list(dict.fromkeys(name for name, _ in self.exports))


@dataclass
class Module:
    """A module of the package, put together from cells."""

    name: str
    text: str = ""
    problems: list[str] = field(default_factory=list)


# Reading a chapter ------------------------------------------------------------


def read_chapter(path: Path, root: Path = ROOT) -> Chapter:
    """Read a notebook and refuse what would not survive the way into a module."""
    try:
        name = path.resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        name = path.as_posix()
    chapter = Chapter(name)
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except FileNotFoundError:
        chapter.problems.append(f"{name}: there is no such file")
        return chapter
    except (ValueError, KeyError, TypeError) as error:
        chapter.problems.append(
            f"{name}: not a notebook ({type(error).__name__}: {error}); "
            "restore it from git or save it again in Jupyter"
        )
        return chapter
    for number, cell in enumerate(cells):
        source = cell.get("source", "")
        lines = (source if isinstance(source, str) else "".join(source)).split("\n")
        id_ = cell.get("id", f"number {number}")
        if cell.get("cell_type") == "markdown" and chapter.title is None:
            chapter.title = heading(lines)
        elif cell.get("cell_type") == "code":
            read_cell(chapter, id_, lines)
    if chapter.default and not any(m == chapter.default for m in chapter.modules):
        if not chapter.problems:
            chapter.problems.append(
                f"{name}: `#| default_exp {chapter.default}` but no cell is exported "
                "to it; start the finished cells with `#| export`"
            )
    if chapter.exports and not chapter.title:
        chapter.problems.append(
            f"{name}: no title; the first markdown cell needs a line `# Title`, "
            "which becomes the docstring of the module"
        )
    return chapter


def heading(lines: list[str]) -> str | None:
    """The first `# heading` outside a code fence."""
    fenced = False
    for line in lines:
        fenced ^= line.startswith("```")
        if line.startswith("# ") and not fenced:
            return line[2:].strip()
    return None


def read_cell(chapter: Chapter, id_: str, lines: list[str]) -> None:
    """Act on the directive of one code cell, if it has one."""
    cell = Cell(chapter.path, id_, lines[1:], first_line=2)

    def refuse(line: int, what: str) -> None:
        chapter.problems.append(f"{chapter.path}, cell {id_}, line {line + 1}: {what}")

    for number, line in enumerate(lines):
        if not LOOKS_LIKE_DIRECTIVE.match(line):
            continue
        if number > 0 and re.match(r"\s*#\s*\|\s*(default_exp|export)", line):
            refuse(number, f"`{line.strip()}` must be the first line of its cell")
        elif number == 0 and not DIRECTIVE.match(line):
            refuse(
                number,
                f"unknown directive `{line.strip()}`; write `#| export`, "
                "`#| export name` or `#| default_exp name`",
            )
    directive = DIRECTIVE.match(lines[0])
    if not directive:
        return
    kind, name = directive.groups()
    if name is not None and not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        refuse(0, f"`{name}` is no name for a module; use a word like `attention`")
    elif kind == "default_exp":
        if name is None:
            refuse(0, "`#| default_exp` needs the name of a module")
        elif chapter.default is not None:
            refuse(
                0,
                f"a second `#| default_exp` after `{chapter.default}`; keep one, and "
                f"start the cells for the other module with `#| export {name}`",
            )
        elif "".join(lines[1:]).strip():
            refuse(
                1,
                "code in the cell of `#| default_exp`, which readers do not see; "
                "move it to a cell of its own",
            )
        else:
            chapter.default = name
    elif chapter.default is None:
        refuse(0, f"`{lines[0].strip()}` comes before `#| default_exp`; put that first")
    else:
        for number, line, what in faults(lines):
            refuse(number, f"`{line.strip()}`: {what}")
        chapter.exports.append((name or chapter.default, cell))


def faults(lines: list[str]):
    """What a module cannot hold: (line number, line, what to do)."""
    try:
        tree = ast.parse("\n".join(lines))
    except SyntaxError as error:
        magics = [(n, line) for n, line in enumerate(lines) if MAGIC.match(line)]
        for number, line in magics:
            yield number, line, "a magic; leave it out of cells with `#| export`"
        if not magics:
            number = min(error.lineno or 1, len(lines)) - 1
            yield number, lines[number], f"{error.msg}; correct the cell"
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if any(alias.name == "*" for alias in node.names):
                yield node.lineno - 1, lines[node.lineno - 1], (
                    "a star import; name what you need"
                )
            elif node.level:
                yield node.lineno - 1, lines[node.lineno - 1], (
                    "a relative import does not work in a notebook; "
                    f"write `from {PACKAGE}.x import y`"
                )
        elif isinstance(node, ast.Import):
            if any(a.name.split(".")[0] == PACKAGE for a in node.names):
                yield node.lineno - 1, lines[node.lineno - 1], (
                    f"write `from {PACKAGE}.x import y`, which can be made relative"
                )
        elif isinstance(node, ast.Name) and node.id == "get_ipython":
            yield node.lineno - 1, lines[node.lineno - 1], (
                "`get_ipython` exists only in a notebook; leave it out of the package"
            )
        elif isinstance(node, ast.Name) and node.id == "__all__":
            yield node.lineno - 1, lines[node.lineno - 1], (
                "`__all__` is written by the export; start private names with `_`"
            )


# Writing a module -------------------------------------------------------------


def build_module(name: str, chapters: list[Chapter]) -> Module:
    """Put the cells of all chapters that write to `name` together, and check them."""
    module = Module(name)
    writers = [chapter for chapter in chapters if name in chapter.modules]
    owner = next((c for c in writers if c.default == name), writers[0])
    title, sources = owner.title or name, ", ".join(c.path for c in writers)
    imports: list[tuple[str, Cell]] = []
    body: list[tuple[str, Cell | None, int]] = []
    names: dict[str, Cell] = {}
    for cell in (cell for c in writers for n, cell in c.exports if n == name):
        tree = ast.parse("\n".join(cell.lines))
        lines = relative_imports(tree, cell, module)
        first = tree.body[0] if tree.body else None
        if is_docstring(first) and not body and not imports:
            # The module introduces itself: chapter 05 writes two.
            title = ast.get_docstring(tree)
            tree.body.pop(0)
            take(lines, first)
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                imports.append((take(lines, node), cell))
        for defined in top_level_names(tree):
            if defined in names:
                module.problems.append(
                    f"{cell.where()}: `{defined}` is already exported to "
                    f"{PACKAGE}/{name}.py by {names[defined].where()}; export only "
                    "the finished form"
                )
            names.setdefault(defined, cell)
        numbered = enumerate(lines)
        kept = [(line, cell, number) for number, line in numbered if line is not None]
        while kept and not kept[0][0].strip():
            kept.pop(0)
        while kept and not kept[-1][0].strip():
            kept.pop()
        if kept:
            body += [("", None, 0), ("", None, 0), *kept]
    header = docstring(title, sources)
    if imports:
        header += sort_imports("\n".join(text for text, _ in imports)) + "\n\n"
    header += dunder_all([n for n in names if not n.startswith("_")])
    module.text = header + "".join(f"{line.rstrip()}\n" for line, _, _ in body)
    offset = header.count("\n")
    for row, code, message in lint(module.text):
        if code == "F811" and module.problems:
            continue  # said above, with more to go by
        if row > offset and body[row - offset - 1][1] is not None:
            _, cell, number = body[row - offset - 1]
            place = cell.where(number)
        else:
            place = blame(message, imports) or f"{PACKAGE}/{name}.py, line {row}"
        module.problems.append(f"{place}: {explain(code, message, name)}")
    return module


def is_docstring(node: ast.stmt | None) -> bool:
    """Whether a statement is nothing but a string."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def relative_imports(
    tree: ast.Module, cell: Cell, module: Module
) -> list[str | None]:
    """The cell's lines, with `from sdbook.x import y` made relative."""
    lines = list(cell.lines)
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level:
            continue
        parts = (node.module or "").split(".")
        if parts[0] != PACKAGE:
            continue
        if parts[1:] == [module.name]:
            module.problems.append(
                f"{cell.where(node.lineno - 1)}: imports from {PACKAGE}.{module.name}, "
                "the module that it is exported to; move the import to a cell "
                "without `#| export`"
            )
        row = node.lineno - 1
        start = len(lines[row].encode()[: node.col_offset].decode())
        lines[row] = lines[row][:start] + IMPORT_SDBOOK.sub(
            lambda match: f"from .{match[1] or ''} import", lines[row][start:], count=1
        )
    return lines


def take(lines: list[str | None], node: ast.stmt) -> str:
    """Take a statement and the comment right above it out of a cell."""
    first = node.lineno - 1
    while first > 0 and (lines[first - 1] or "").startswith("#"):
        first -= 1
    taken = lines[first : node.end_lineno]
    lines[first : node.end_lineno] = [None] * len(taken)
    return "\n".join(line for line in taken if line is not None)


def top_level_names(tree: ast.Module) -> list[str]:
    """The names that a module defines (not those it imports), in order."""
    names: dict[str, None] = {}

    def visit(statements: list[ast.stmt]) -> None:
        for node in statements:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names[node.name] = None
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = getattr(node, "targets", None) or [node.target]
                for leaf in (leaf for target in targets for leaf in ast.walk(target)):
                    if isinstance(leaf, ast.Name) and isinstance(leaf.ctx, ast.Store):
                        names[leaf.id] = None
            elif isinstance(node, ast.If | ast.Try | ast.With):
                for part in ("body", "orelse", "finalbody"):
                    visit(getattr(node, part, []))
                for handler in getattr(node, "handlers", []):
                    visit(handler.body)

    visit(tree.body)
    return list(names)


def docstring(title: str, sources: str) -> str:
    """The docstring that opens a module."""
    text = f"{title}\n\nGenerated from {sources}; do not edit."
    text = text.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    lines = [
        part
        for line in text.split("\n")
        for part in textwrap.wrap(line, LINE_LENGTH - 3, break_long_words=False) or [""]
    ]
    return '"""' + "\n".join(lines) + '\n"""\n\n'


def dunder_all(names: list[str]) -> str:
    """`__all__`, on one line where it fits."""
    one_line = "__all__ = [" + ", ".join(f'"{name}"' for name in names) + "]"
    if len(one_line) <= LINE_LENGTH:
        return one_line + "\n"
    return "__all__ = [\n" + "".join(f'    "{name}",\n' for name in names) + "]\n"


# Ruff -------------------------------------------------------------------------


def ruff(arguments: list[str], text: str) -> str:
    """Run ruff on a text with no settings but ours."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache"]
    command += ["--quiet", "--target-version", "py310", "--stdin-filename"]
    command += [f"{PACKAGE}/module.py", *arguments, "-"]
    result = subprocess.run(command, input=text, capture_output=True, text=True)
    if result.returncode not in (0, 1):
        raise SystemExit(
            f"ruff did not run: {result.stderr.strip()}\n"
            "install the tools with `make .venv` and use .venv/bin/python"
        )
    return result.stdout


def sort_imports(text: str) -> str:
    """Imports without repetition, in three groups: Python, others, our own."""
    rules = ["--select", "I", "--fix", "--line-length", str(LINE_LENGTH)]
    return ruff(rules, text + "\n").strip()


def lint(text: str) -> list[tuple[int, str, str]]:
    """What ruff finds in a module: (line, code, message)."""
    rules = ["--select", "E,F,W", "--ignore", "F722", "--output-format", "json"]
    output = ruff([*rules, "--line-length", str(LINE_LENGTH)], text)
    shapes = shape_strings(text)
    return [
        (row, found["code"] or "", found["message"])
        for found in json.loads(output or "[]")
        for row, column in [(found["location"]["row"], found["location"]["column"])]
        if not (
            found["code"] == "F821"
            and any(r == row and start <= column <= end for r, start, end in shapes)
        )
    ]


def shape_strings(text: str) -> list[tuple[int, int, int]]:
    """Where jaxtyping's shapes are: (line, first column, last column)."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple):
            name = getattr(node.value, "attr", getattr(node.value, "id", ""))
            shape = node.slice.elts[-1]
            if name in SHAPED and isinstance(shape, ast.Constant):
                found.append((shape.lineno, shape.col_offset, shape.end_col_offset + 1))
    return found


def blame(message: str, imports: list[tuple[str, Cell]]) -> str | None:
    """The cell whose import a message speaks of."""
    name = re.search(r"`([^`]+)`", message)
    word = name[1].replace(" as ", ".").split(".")[-1] if name else None
    for text, cell in imports:
        if word and re.search(rf"\b{re.escape(word)}\b", text):
            return cell.where()
    return None


def explain(code: str, message: str, name: str) -> str:
    """Ruff's message with the remedy."""
    remedies = {
        "F821": f"; {PACKAGE}/{name}.py neither defines nor imports it: export the "
        "cell that does, or pass it as an argument",
        "F401": "; import it in a cell without `#| export`, or not at all",
        "E501": "; break the line",
    }
    return f"{message}{remedies.get(code, f' (ruff {code})')}"


# The package as a whole -------------------------------------------------------


def check_imports(modules: dict[str, Module], package: Path) -> None:
    """Every `from .x import y` must find its y."""
    texts = {path.stem: path.read_text("utf-8") for path in package.glob("*.py")}
    texts |= {name: module.text for name, module in modules.items()}
    trees = {}
    for name, text in texts.items():
        try:
            trees[name] = ast.parse(text)
        except SyntaxError:  # somebody's draft
            continue
    for name, module in modules.items():
        for node in ast.walk(trees[name]) if name in trees else ():
            if not isinstance(node, ast.ImportFrom) or node.level != 1:
                continue
            source = node.module or "__init__"
            if node.module and source not in texts:
                module.problems.append(
                    f"{PACKAGE}/{name}.py imports from {PACKAGE}.{source}, "
                    "which no chapter writes; correct the name or export that module"
                )
                continue
            known = set(top_level_names(trees[source])) if source in trees else None
            for alias in node.names:
                if known is None or alias.name in known:
                    continue
                if source == "__init__" and alias.name in {*texts, "StableDiffusion"}:
                    continue
                module.problems.append(
                    f"{PACKAGE}/{name}.py imports `{alias.name}` from "
                    f"{PACKAGE}.{source}, which does not define it; "
                    "correct the name or export the cell that defines it"
                )


def strays(modules: set[str], package: Path) -> list[str]:
    """Python files of the package that no chapter writes."""
    return [
        f"{PACKAGE}/{path.relative_to(package).as_posix()}: no chapter writes it; "
        "delete it, or write it in a chapter (`#| default_exp`)"
        for path in sorted(package.rglob("*.py"))
        if path.parent != package or path.stem not in modules
        if path.relative_to(package).as_posix() not in WRITTEN_BY_HAND
    ]


def write(path: Path, text: str) -> bool:
    """Write a file in one step; say whether it changed."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return True


def difference(path: Path, text: str, limit: int = 20) -> str:
    """The first lines of a diff from the file to what the chapters say."""
    old = path.read_text(encoding="utf-8").splitlines()
    new = text.splitlines()
    lines = list(difflib.unified_diff(old, new, "file", "chapters", lineterm="", n=1))
    more = [f"… {len(lines) - limit} lines more"] if len(lines) > limit else []
    return textwrap.indent("\n".join(lines[:limit] + more), "    ")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write sdbook/*.py from the chapters.",
        epilog="Cells that start with `#| export` go into the module that the "
        "chapter names with `#| default_exp`.",
    )
    parser.add_argument(
        "chapters", nargs="*", type=Path, help="only what these chapters write"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing, fail on any difference"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    package = options.root / PACKAGE

    paths = sorted((options.root / "chapters").glob("*.ipynb"))
    if not paths and not options.chapters:
        print(f"{options.root / 'chapters'}: no chapters (*.ipynb)", file=sys.stderr)
        return 1
    known = {path.resolve() for path in paths}
    paths += [path for path in options.chapters if path.resolve() not in known]
    chapters = [read_chapter(path, options.root) for path in paths]
    if options.chapters:
        asked = {path.resolve() for path in options.chapters}
        together = zip(chapters, paths, strict=True)
        chosen = [chapter for chapter, path in together if path.resolve() in asked]
        wanted = {name for chapter in chosen for name in chapter.modules}
        concerned = [c for c in chapters if c in chosen or wanted & set(c.modules)]
    else:
        concerned = chapters
        wanted = {name for chapter in chapters for name in chapter.modules}

    problems = [problem for chapter in concerned for problem in chapter.problems]
    broken = {n for c in concerned if c.problems for n in (c.default, *c.modules)}
    modules = {
        name: build_module(name, chapters)
        for name in sorted(wanted)
        if name not in broken
    }
    check_imports(modules, package)
    written = 0
    for name, module in modules.items():
        path = package / f"{name}.py"
        if module.problems:
            problems += module.problems
        elif not options.check:
            if write(path, module.text):
                print(f"wrote {PACKAGE}/{name}.py")
                written += 1
        elif not path.exists():
            problems.append(f"{PACKAGE}/{name}.py is missing; run `make export`")
        elif path.read_text(encoding="utf-8") != module.text:
            problems.append(
                f"{PACKAGE}/{name}.py is not what the chapters say; change the "
                "chapter, not the module, and run `make export`\n"
                + difference(path, module.text)
            )
    if not options.chapters:
        lost = strays(wanted | broken, package)
        if options.check:
            problems += lost
        else:
            for stray in lost:
                print(f"note: {stray}", file=sys.stderr)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        print(f"{len(problems)} to correct", file=sys.stderr)
        return 1
    checked = "agree with the chapters" if options.check else f"{written} changed"
    print(f"{len(modules)} modules: {checked}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
