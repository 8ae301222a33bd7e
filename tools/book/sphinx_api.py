"""The API reference of `sdbook`, and the way from it to the chapters and back.

`{api} unet` on a page lists the public names of sdbook/unet.py: how each is called,
its docstring, and a link to the cell of the chapter that builds it. The label above
that cell, "saved to sdbook/unet.py", links to the entry here. A method that a later
cell adds (`@add_to`) has links of its own. Modules in folders (`{api} training.loop`)
and modules written by hand have entries, too. Modules and chapters are only read,
never imported.
"""

import ast
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
LINE_LENGTH = 76  # what a page shows without scrolling
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)
ITEM = re.compile(r"^(\w+): ")


@cache
def export_tool():
    """tools/book/export.py, which knows how to read a chapter."""
    path = ROOT / "tools" / "book" / "export.py"
    spec = importlib.util.spec_from_file_location("sdbook_export", path)
    tool = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


@cache
def chapters():
    """What each chapter exports, in order."""
    paths = sorted((ROOT / "chapters").glob("*.ipynb"))
    return [export_tool().read_chapter(path) for path in paths]


def file_of(name):
    """`sdbook/training/loop.py` for `training.loop`."""
    return export_tool().file_of(name)


def page_of(name):
    """The page that explains a module: `pages/api/training/loop`."""
    return f"pages/api/{name.replace('.', '/')}"


@cache
def module(name):
    """The syntax tree of a module and the lines of its file."""
    text = (ROOT / file_of(name)).read_text(encoding="utf-8")
    return ast.parse(text), text.split("\n")


@cache
def public_names(name):
    """What a module defines for others: `__all__` or all without an underscore."""
    body = module(name)[0].body
    names = [thing for node in body for thing in defines(node)]
    public = [thing for thing in names if not thing.startswith("_")]
    for node in body:
        if isinstance(node, ast.Assign) and defines(node) == ["__all__"]:
            listed = [leaf.value for leaf in node.value.elts if hasattr(leaf, "value")]
            public = [thing for thing in listed if thing in names]
    return tuple(dict.fromkeys(public))


@cache
def entries(name):
    """What the reference explains: public names, and methods as `Class.method`."""
    found = list(public_names(name))
    for node in module(name)[0].body:
        if isinstance(node, ast.ClassDef) and node.name in found:
            found += [f"{node.name}.{method.name}" for method, _ in methods(node)]
    return tuple(found)


@cache
def modules():
    """The modules that chapters write, in the chapters' order, then those by hand."""
    found = [name for chapter in chapters() for name in chapter.modules]
    package = ROOT / "sdbook"
    paths = sorted(path for path in package.rglob("*.py") if path.stem[0] != "_")
    found += [export_tool().name_of(path, package) for path in paths]
    return tuple(dict.fromkeys(found))


def entry(name, thing):
    """Where a name is explained: the anchor on its page of the reference."""
    return f"sdbook.{name}.{thing}"


def built(name, thing):
    """Where a name is built: the anchor in its chapter."""
    return f"build-{name}-{thing}"


def defines(node):
    """The names that one statement defines."""
    if isinstance(node, DEFINITIONS):
        return [node.name]
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    leaves = [leaf for target in targets if target for leaf in ast.walk(target)]
    return [leaf.id for leaf in leaves if isinstance(leaf, ast.Name)]


def defined_in(code, name):
    """What a cell's code gives to a module: its entries, or the class that goes on."""
    found = []
    for node in ast.parse(code).body:
        goes_on = export_tool().class_of(node)
        if goes_on:
            method = f"{goes_on}.{node.name}"
            found.append(method if method in entries(name) else goes_on)
        else:
            found += defines(node)
    return [thing for thing in dict.fromkeys(found) if thing in entries(name)]


@cache
def birthplaces():
    """{(module, entry): the chapter's page}, where the last definition counts."""
    return {
        (name, thing): chapter.path.removesuffix(".ipynb")
        for chapter in chapters()
        for name, cell in chapter.exports
        for thing in defined_in("\n".join(cell.lines), name)
    }


# Writing an entry -------------------------------------------------------------


def arguments(node):
    """The parameters of a function, each as it is written, without `self`."""
    given = node.args
    plain = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(plain) - len(given.defaults)) + given.defaults
    parts = [one(argument, default) for argument, default in zip(plain, defaults)]
    if given.vararg or given.kwonlyargs:
        parts.append(f"*{one(given.vararg)}" if given.vararg else "*")
    parts += [one(a, d) for a, d in zip(given.kwonlyargs, given.kw_defaults)]
    parts += [f"**{one(given.kwarg)}"] if given.kwarg else []
    return [part for part in parts if not re.fullmatch("self|cls", part)]


def one(argument, default=None):
    """`x: Float[Tensor, "b c"] = 0`"""
    text = argument.arg
    kind = argument.annotation
    if kind:  # one that is defined later in the module stands in quotes there
        quoted = isinstance(kind, ast.Constant) and isinstance(kind.value, str)
        text += f": {kind.value if quoted else written(kind)}"
    if default is not None:
        text += (" = " if argument.annotation else "=") + written(default)
    return text


def written(node):
    """An expression as the book writes it: with double quotes."""
    text = ast.unparse(node)
    return re.sub(r"'([^'\"]*)'", r'"\1"', text)


def call(name, parts, returns=None):
    """`name(a, b) -> c`, over several lines where one is too short."""
    end = f" -> {written(returns)}" if returns else ""
    line = f"{name}({', '.join(parts)}){end}"
    if len(line) <= LINE_LENGTH:
        return line
    inner = "".join(f"    {part},\n" for part in parts)
    return f"{name}(\n{inner}){end}"


def signature(node):
    """How a function or class is called."""
    if isinstance(node, ast.FunctionDef):
        return call(node.name, arguments(node), node.returns)
    bases = ", ".join(map(written, node.bases))
    head = f"class {node.name}({bases})" if bases else f"class {node.name}"
    start = next((n for n in node.body if "__init__" in defines(n)), None)
    fields = [
        one(ast.arg(n.target.id, n.annotation), n.value)
        for n in node.body
        if isinstance(n, ast.AnnAssign) and "ClassVar" not in written(n.annotation)
    ]
    if start:
        return f"{head}\n\n{call(node.name, arguments(start))}"
    return f"{head}\n\n{call(node.name, fields)}" if fields else head


def methods(node):
    """What a reader may call: public methods, and how a module or pipeline is run."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef):
            is_property = any("property" in written(d) for d in child.decorator_list)
            called = child.name in ("__call__", "forward")
            if called or (not child.name.startswith("_") and ast.get_docstring(child)):
                yield child, is_property


def constant(node, lines):
    """The value of a constant, where it is short, and the comment above it."""
    text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
    if text.count("\n") > 12:
        text = text.split("\n")[0] + "\n    ...\n" + text.split("\n")[-1]
    above = node.lineno - 2
    comment = []
    while lines[above].startswith("# "):
        comment.insert(0, lines[above][2:])
        above -= 1
    return text, " ".join(comment)


class Api(SphinxDirective):
    """The reference of one module."""

    required_arguments = 1

    def run(self):
        name = self.arguments[0]
        if name not in modules():
            raise self.error(f"there is no {file_of(name)}")
        self.env.note_dependency(str(ROOT / file_of(name)))
        known = {n: node for node in module(name)[0].body for n in defines(node)}
        written_in = [c for c in chapters() if name in c.modules]
        intro = nodes.paragraph("", "Written in " if written_in else "Written by hand")
        for number, chapter in enumerate(written_in):
            intro += nodes.Text(" and " if number else "")
            intro += self.to_chapter(chapter.path.removesuffix(".ipynb"))
        intro += nodes.Text(". Import from ")
        intro += nodes.literal("", f"sdbook.{name}")
        intro += nodes.Text(".")
        entries = [self.entry(name, n, known[n]) for n in public_names(name)]
        return [intro, *entries]

    def entry(self, name, thing, node):
        """One public name as a section."""
        section = nodes.section(ids=[entry(name, thing)], classes=["api"])
        section += nodes.title("", "", nodes.literal("", thing))
        index = addnodes.index()
        index["entries"] = [
            ("single", f"{thing} (sdbook.{name})", entry(name, thing), "", None)
        ]
        section += index
        if isinstance(node, DEFINITIONS):
            section += self.code(signature(node))
            section += self.prose(ast.get_docstring(node), name)
        else:
            text, comment = constant(node, module(name)[1])
            section += self.code(text)
            section += self.prose(comment, name)
        if isinstance(node, ast.ClassDef):
            for method, is_property in methods(node):
                text = f".{method.name}" if is_property else f".{signature(method)}"
                method_entry = f"{thing}.{method.name}"
                section += self.code(text)
                section[-1]["ids"].append(entry(name, method_entry))
                section += self.prose(ast.get_docstring(method), name)
                section += self.built_in(name, method_entry)
        section += self.built_in(name, thing)
        return section

    def built_in(self, name, thing):
        """The way to the cell that builds something, if a chapter does."""
        home = birthplaces().get((name, thing))
        if not home:
            return []
        line = nodes.paragraph("", "Built in ", classes=["built-in"])
        line += self.to_chapter(home, built(name, thing))
        return [line]

    def code(self, text):
        block = nodes.literal_block(text, text, language="python")
        block["classes"] += ["signature"]
        return block

    def to_chapter(self, docname, anchor=""):
        number = docname.split("/")[1].split("_")[0]
        kind = f"chapter {int(number)}" if number.isdigit() else f"appendix {number}"
        title = next(c.title for c in chapters() if c.path == f"{docname}.ipynb")
        return self.link(docname, anchor, nodes.Text(f"{kind}, {title}"))

    def link(self, docname, anchor, content):
        uri = self.env.app.builder.get_relative_uri(self.env.docname, docname)
        uri += f"#{anchor}" if anchor else ""
        return nodes.reference("", "", content, refuri=uri, internal=True)

    def prose(self, text, name):
        """A docstring as paragraphs; `Args:` and `Attributes:` as lists."""
        made = []
        for paragraph in re.split(r"\n\s*\n", text or ""):
            first, *rest = paragraph.split("\n")
            if first in ("Args:", "Attributes:") and rest:
                items = re.split(r"\n(?=\w)", "\n".join(x[4:] for x in rest))
                made.append(self.items(items, name))
            elif paragraph.strip():
                made.append(nodes.paragraph("", "", *self.inline(paragraph, name)))
        return made

    def items(self, items, name):
        made = nodes.bullet_list(bullet="-")
        for item in items:
            marked = ITEM.sub(r"`\1`: ", item)
            text = nodes.paragraph("", "", *self.inline(marked, name))
            made += nodes.list_item("", text)
        return made

    def inline(self, text, name):
        """Text whose `names` are code, and links where the reference knows them."""
        for number, part in enumerate(text.replace("\n", " ").split("`")):
            if number % 2 == 0:
                yield nodes.Text(part)
                continue
            code = nodes.literal("", part)
            homes = [m for m in (name, *modules()) if part in public_names(m)]
            if homes:
                code = self.link(page_of(homes[0]), entry(homes[0], part), code)
            yield code


def label(app, name, code):
    """The line above an exported cell, with a link into the reference."""
    things = defined_in(code, name)
    text = nodes.literal("", file_of(name))
    page = page_of(name)
    line = nodes.paragraph("", "saved to ", classes=["saved-to"])
    if page in app.env.found_docs:
        uri = app.builder.get_relative_uri(app.env.docname, page)
        uri += f"#{entry(name, things[0])}" if things else ""
        text = nodes.reference("", "", text, refuri=uri, internal=True)
    line += text
    docname = app.env.docname
    line["ids"] += [
        built(name, thing)
        for thing in things
        if birthplaces().get((name, thing)) == docname
    ]
    return line


def setup(app):
    app.add_directive("api", Api)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
