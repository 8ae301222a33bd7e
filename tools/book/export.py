"""Write the package sdbook/ from the chapters.

    tools/book/export.py                              all chapters
    tools/book/export.py chapters/01_attention.ipynb  what this chapter writes
    tools/book/export.py --check                      change nothing, fail if
                                                      anything would change

Three directives, nbdev's, each the first line of its cell:

    #| default_exp attention    this chapter writes sdbook/attention.py
    #| export                   this cell goes into that module
    #| export training.vae      this cell goes into sdbook/training/vae.py instead

The imports of all cells move to the top of the module. `from sdbook.x import y`
becomes `from .x import y`. A method with `@add_to(Class)` above it (sdbook/notebook.py)
moves to the end of its class. The chapter's title becomes the module's docstring,
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
import tokenize
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "sdbook"
WRITTEN_BY_HAND = ["__init__.py", "__main__.py", "notebook.py", "data.py", "run/*.py"]
WRITTEN_BY_HAND += ["adapters.py", "counts.py", "features.py", "files.py", "folders.py"]
WRITTEN_BY_HAND += ["inputs.py", "kinds.py"]
WRITTEN_BY_HAND += ["reports.py", "scheduler_files.py", "scheduler_options.py"]
WRITTEN_BY_HAND += ["tiles.py", "twins.py", "vocabulary.py", "words.py"]
WRITTEN_BY_HAND += ["training/__init__.py", "training/cache.py"]
WRITTEN_BY_HAND += ["training/validation.py"]
GENERATED = "\nGenerated from "
LINE_LENGTH = 88

DIRECTIVE = re.compile(r"#\| (default_exp|export)(?: (\S+))?\s*$")
LOOKS_LIKE_DIRECTIVE = re.compile(r"\s*#\s*\|")
MAGIC = re.compile(r"\s*(%|!|\?)|[^#'\"]*=\s*(%|!)\s*\w|[^#'\"]*\w\?+\s*$")
MODULE = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*")
IMPORT_SDBOOK = re.compile(rf"from\s+{PACKAGE}[\w.]*\s+import\b")
# Python reads these while it makes a class, which is too early for `@add_to`.
NOT_LATER = {"__new__", "__init_subclass__", "__class_getitem__", "__post_init__"}
NOT_LATER |= {"__eq__", "__set_name__"}
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


class Line(NamedTuple):
    """A line of a module, and where it comes from."""

    text: str
    cell: Cell | None = None
    number: int = 0


@dataclass
class Module:
    """A module of the package, put together from cells.

    In `body` each class is followed by the list of what later cells add to it.
    """

    name: str
    title: str
    sources: str
    imports: list[tuple[str, Cell]] = field(default_factory=list)
    names: dict[str, Cell] = field(default_factory=dict)
    members: dict[str, dict[str, Cell]] = field(default_factory=dict)
    added: dict[str, list[Line]] = field(default_factory=dict)
    body: list[Line | list[Line]] = field(default_factory=list)
    text: str = ""
    problems: list[str] = field(default_factory=list)


def file_of(name: str) -> str:
    """`sdbook/training/loop.py` for `training.loop`."""
    return f"{PACKAGE}/{name.replace('.', '/')}.py"


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
    if name is not None and not MODULE.fullmatch(name):
        refuse(
            0,
            f"`{name}` is no name for a module; use a word like `attention`, or "
            "`training.loop` for a module in a folder",
        )
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
    elif name is None and chapter.default is None:
        refuse(
            0,
            "`#| export` comes before `#| default_exp`; put that first, or name the "
            "module here (`#| export attention`)",
        )
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
        what = fault_of(node)
        if what:
            yield node.lineno - 1, lines[node.lineno - 1], what
    methods = [node for node in tree.body if class_of(node)]
    decorators = [id(method.decorator_list[0].func) for method in methods]
    for node in ast.walk(tree):
        if getattr(node, "id", "") == "add_to" and id(node) not in decorators:
            yield node.lineno - 1, lines[node.lineno - 1], (
                "`@add_to(Class)` belongs above a `def` that is not indented, and "
                "above its other decorators"
            )
    for line, what in (fault for m in methods for fault in faults_of_method(m)):
        yield line - 1, lines[line - 1], what


def fault_of(node: ast.AST) -> str | None:
    """What is wrong with a piece of code wherever it stands."""
    match node:
        case ast.ImportFrom(module="sdbook.notebook"):
            return "a help for notebooks; import it in a cell without `#| export`"
        case ast.ImportFrom(names=[ast.alias("*")]):
            return "a star import; name what you need"
        case ast.ImportFrom(level=level) if level:
            return (
                "a relative import does not work in a notebook; "
                f"write `from {PACKAGE}.x import y`"
            )
        case ast.Import(names) if any(a.name.split(".")[0] == PACKAGE for a in names):
            return f"write `from {PACKAGE}.x import y`, which can be made relative"
        case ast.Name("get_ipython"):
            return (
                "`get_ipython` exists only in a notebook; leave it out of the package"
            )
        case ast.Name("__all__"):
            return "`__all__` is written by the export; start private names with `_`"
    return None


def class_of(node: ast.stmt) -> str | None:
    """The class of a function whose first decorator is `@add_to(Class)`."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        match node.decorator_list:
            case [ast.Call(ast.Name("add_to"), [ast.Name(name)], []), *_]:
                return name
    return None


def faults_of_method(method: ast.FunctionDef):
    """What a method would mean otherwise once it stands in its class: (line, what)."""
    name = class_of(method)
    if method.name in NOT_LATER:
        yield method.lineno, "Python needs it from the start; write it in the class"
    for node in ast.walk(method):
        word = getattr(node, "id", getattr(node, "attr", None))
        match node:
            case ast.Call(ast.Name("super"), []) | ast.Name("__class__"):
                yield node.lineno, (
                    f"works only inside a class; write `super({name}, self)`, or the "
                    "method in the cell of the class"
                )
            case ast.Name() | ast.Attribute() if re.match(r"__\w*[^_]_?$", word):
                yield node.lineno, (
                    f"`{word}` means something else inside a class; start it with one _"
                )


# Writing a module -------------------------------------------------------------


def build_module(name: str, chapters: list[Chapter]) -> Module:
    """Put the cells of all chapters that write to `name` together, and check them."""
    writers = [chapter for chapter in chapters if name in chapter.modules]
    owner = next((c for c in writers if c.default == name), writers[0])
    sources = ", ".join(chapter.path for chapter in writers)
    module = Module(name, owner.title or name, sources)
    for cell in (cell for c in writers for n, cell in c.exports if n == name):
        add_cell(module, cell)
    header = docstring(module.title, sources)
    if module.imports:
        header += sort_imports("\n".join(text for text, _ in module.imports)) + "\n\n"
    header += dunder_all([n for n in module.names if not n.startswith("_")])
    parts = (part if isinstance(part, list) else [part] for part in module.body)
    body = [line for part in parts for line in part]
    module.text = header + "".join(f"{line.text.rstrip()}\n" for line in body)
    offset = header.count("\n")
    for row, code, message in lint(module.text):
        if code == "F811" and module.problems:
            continue  # said above, with more to go by
        line = body[row - offset - 1] if row > offset else Line("")
        if line.cell is not None:
            place = line.cell.where(line.number)
        else:
            place = blame(message, module.imports) or f"{file_of(name)}, line {row}"
        module.problems.append(f"{place}: {explain(code, message, module)}")
    return module


def add_cell(module: Module, cell: Cell) -> None:
    """Add a cell: its imports, what it adds to classes, and the rest."""
    tree = ast.parse("\n".join(cell.lines))
    lines = relative_imports(tree, cell, module)
    first = tree.body[0] if tree.body else None
    if is_docstring(first) and not module.body and not module.imports:
        # The module introduces itself: chapter 05 writes two.
        module.title = ast.get_docstring(tree)
        take(lines, tree.body.pop(0))
    ends = {}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module.imports.append((take(lines, node), cell))
        elif class_of(node):
            add_method(module, cell, lines, node)
            continue
        for defined in top_level_names([node]):
            if defined in module.names:
                module.problems.append(
                    f"{cell.where()}: `{defined}` is already exported to "
                    f"{file_of(module.name)} by {module.names[defined].where()}; "
                    "export only the finished form"
                )
            module.names.setdefault(defined, cell)
        if isinstance(node, ast.ClassDef) and node.name not in module.members:
            module.members[node.name] = {n: cell for n in top_level_names(node.body)}
            ends[node.end_lineno - 1] = module.added[node.name] = []
    while lines and not (lines[-1] or "").strip():
        lines.pop()
    kept = []
    for number, line in enumerate(lines):
        if line is not None and (kept or line.strip()):
            kept.append(Line(line, cell, number))
        if number in ends:
            kept.append(ends[number])
    if kept:
        module.body += [Line(""), Line(""), *kept]


def add_method(
    module: Module, cell: Cell, lines: list[str | None], node: ast.FunctionDef
) -> None:
    """Move a method from its cell to the end of its class."""
    owner, decorators = class_of(node), node.decorator_list
    members = module.members.get(owner)
    live = f"{owner}.{node.name}."  # in a notebook, `@Class.name.setter`
    is_setter = any(ast.unparse(d).startswith(live) for d in decorators)
    what = None
    if members is None:
        what = (
            f"{file_of(module.name)} has no class `{owner}` up to here; a class can "
            "go on only in the module that it begins in, and after that"
        )
    elif node.name in members and not is_setter:
        what = (
            f"`{owner}.{node.name}` is already defined by "
            f"{members[node.name].where()}; export only the finished form"
        )
    if what:
        module.problems.append(f"{cell.where(node.lineno - 1)}: {what}")
        return
    members[node.name] = cell
    first, last = first_row(lines, node), node.end_lineno
    while last < len(lines) and (not lines[last].strip() or lines[last][0].isspace()):
        last += 1  # the blank lines below, and comments that belong to the method
    as_it_is = inside_strings(cell, node)
    text = [Line("")]
    for row in range(first, last):
        if not decorators[0].lineno - 1 <= row < decorators[0].end_lineno:
            indent = "" if row in as_it_is else "    "
            line = lines[row].replace(f"@{live}", f"@{node.name}.")
            text.append(Line(indent + line, cell, row))
    while not text[-1].text.strip():
        text.pop()
    module.added[owner] += text
    lines[first:last] = [None] * (last - first)


def inside_strings(cell: Cell, node: ast.FunctionDef) -> set[int]:
    """The rows that begin inside a string, which an indent would change."""
    rows, starts = set(), []
    for token in tokenize.generate_tokens(StringIO("\n".join(cell.lines)).readline):
        kind = tokenize.tok_name[token.type]
        if kind in ("STRING", "FSTRING_START"):  # before Python 3.12, all are STRING
            starts.append(token.start[0])
        if kind in ("STRING", "FSTRING_END"):
            rows |= set(range(starts.pop(), token.end[0]))
    if is_docstring(node.body[0]):
        rows -= set(range(node.body[0].lineno, node.body[0].end_lineno))
    return rows


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
        if ".".join(parts[1:]) == module.name:
            module.problems.append(
                f"{cell.where(node.lineno - 1)}: imports from {PACKAGE}.{module.name}, "
                "the module that it is exported to; move the import to a cell "
                "without `#| export`"
            )
        row = node.lineno - 1
        start = len(lines[row].encode()[: node.col_offset].decode())
        source = relative(parts[1:], module.name.split(".")[:-1])
        lines[row] = lines[row][:start] + IMPORT_SDBOOK.sub(
            f"from {source} import", lines[row][start:], count=1
        )
    return lines


def relative(source: list[str], folder: list[str]) -> str:
    """How a module in a folder of the package calls another: `..run.settings`."""
    shared = len(os.path.commonprefix([source, folder]))
    return "." * (1 + len(folder) - shared) + ".".join(source[shared:])


def first_row(lines: list[str | None], node: ast.stmt) -> int:
    """Where a statement begins, with its decorators and the comment right above it."""
    first = min(n.lineno for n in (node, *getattr(node, "decorator_list", []))) - 1
    while first > 0 and (lines[first - 1] or "").startswith("#"):
        first -= 1
    return first


def take(lines: list[str | None], node: ast.stmt) -> str:
    """Take a statement and the comment right above it out of a cell."""
    first = first_row(lines, node)
    taken = lines[first : node.end_lineno]
    lines[first : node.end_lineno] = [None] * len(taken)
    return "\n".join(line for line in taken if line is not None)


def top_level_names(statements: list[ast.stmt]) -> list[str]:
    """The names that statements define (not those they import), in order."""
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

    visit(statements)
    return list(names)


def docstring(title: str, sources: str) -> str:
    """The docstring that opens a module."""
    text = f"{title}\n{GENERATED}{sources}; do not edit."
    text = text.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    lines = [
        part
        for line in text.split("\n")
        for part in textwrap.wrap(line, LINE_LENGTH - 3, break_long_words=False) or [""]
    ]
    return '"""' + "\n".join(lines) + '\n"""\n\n'


def dunder_all(names: list[str]) -> str:
    """`__all__`, on one line where it fits, else on filled lines."""
    one_line = "__all__ = [" + ", ".join(f'"{name}"' for name in names) + "]"
    if len(one_line) <= LINE_LENGTH:
        return one_line + "\n"
    listed = textwrap.wrap(", ".join(f'"{name}"' for name in names), LINE_LENGTH - 5)
    return "__all__ = [\n    " + "\n    ".join(listed) + ",\n]\n"


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


def explain(code: str, message: str, module: Module) -> str:
    """Ruff's message with the remedy."""
    remedies = {
        "F821": f"; {file_of(module.name)} neither defines nor imports it: export the "
        "cell that does, or pass it as an argument",
        "F401": "; import it in a cell without `#| export`, or not at all",
        "E501": "; break the line",
    }
    if code == "F821" and message.split("`")[1] in module.names:
        remedies[code] = " at this place, although it is defined further below"
    return f"{message}{remedies.get(code, f' (ruff {code})')}"


# The package as a whole -------------------------------------------------------


def check_imports(modules: dict[str, Module], package: Path) -> None:
    """Every `from .x import y` must find its y."""
    texts = {name_of(p, package): p.read_text("utf-8") for p in package.rglob("*.py")}
    texts |= {name: module.text for name, module in modules.items()}
    trees = {}
    for name, text in texts.items():
        try:
            trees[name] = ast.parse(text)
        except SyntaxError:  # somebody's draft
            continue
    for name, module in modules.items():
        for node in ast.walk(trees[name]) if name in trees else ():
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            folder = name.split(".")[: -node.level]
            source = ".".join([*folder, *(node.module or "").split(".")]).strip(".")
            if source not in texts:
                module.problems.append(
                    f"{file_of(name)} imports from {PACKAGE}.{source}, "
                    "which no chapter writes; correct the name or export that module"
                )
                continue
            known = known_in(texts[source], trees.get(source))
            known |= {n.split(".")[-1] for n in texts if n.rpartition(".")[0] == source}
            for alias in node.names:
                if alias.name not in known and "__getattr__" not in known:
                    module.problems.append(
                        f"{file_of(name)} imports `{alias.name}` from "
                        f"{PACKAGE}.{source}, which does not define it; "
                        "correct the name or export the cell that defines it"
                    )


def known_in(text: str, tree: ast.Module | None) -> set[str]:
    """What can be imported from a module; one written by hand may also hand on."""
    if tree is None:
        return {"__getattr__"}
    names = set(top_level_names(tree.body))
    if GENERATED not in text:
        imports = (n for n in tree.body if isinstance(n, ast.ImportFrom))
        names |= {alias.asname or alias.name for n in imports for alias in n.names}
    return names


def strays(modules: set[str], package: Path) -> list[str]:
    """Python files of the package that no chapter writes."""
    return [
        f"{PACKAGE}/{path.relative_to(package).as_posix()}: no chapter writes it; "
        "delete it, or write it in a chapter (`#| default_exp`)"
        for path in sorted(package.rglob("*.py"))
        if name_of(path, package) not in modules or path.stem == "__init__"
        if not any(path.match(f"{PACKAGE}/{by_hand}") for by_hand in WRITTEN_BY_HAND)
    ]


def name_of(path: Path, package: Path) -> str:
    """`training.loop` for sdbook/training/loop.py; the package itself is ``."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


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
        path = options.root / file_of(name)
        if path.exists() and GENERATED not in path.read_text(encoding="utf-8"):
            problems.append(
                f"{file_of(name)} is written by hand; {module.sources} must name "
                "another module"
            )
        elif module.problems:
            problems += module.problems
        elif not options.check:
            if write(path, module.text):
                print(f"wrote {file_of(name)}")
                written += 1
        elif not path.exists():
            problems.append(f"{file_of(name)} is missing; run `make export`")
        elif path.read_text(encoding="utf-8") != module.text:
            problems.append(
                f"{file_of(name)} is not what the chapters say; change the "
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
