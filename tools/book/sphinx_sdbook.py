"""A small Sphinx extension for the pages of the book.

- A cell that starts with `#| export` gets a quiet label, "saved to
  sdbook/attention.py", and the directive itself is not shown. The label links to
  the reference (sphinx_api.py). Where the cell is folded, its button names what is in
  it, since the label is inside.
- A cell with `#| default_exp` is not shown at all, nor are nbval's markers.
- Exercises and figures are numbered by chapter: Exercise 5.2.

sphinx_api.py writes the reference of the package, sphinx_pages.py what a page has
around its text, sphinx_map.py the map on the front page, and sphinx_chapters.py what
every chapter gets: where it is, how long it is, and what it proved.
"""

import ast
import re

from docutils import nodes
from sphinx_api import defined_in, file_of, label

DIRECTIVE = re.compile(r"^#\|\s*(?P<name>export|default_exp)\b[ \t]*(?P<module>\S*)")
NBVAL_MARKER = re.compile(r"^\s*#\s*(NBVAL_\w+|PYTEST_VALIDATE_\w+)\s*$")
CHAPTER = re.compile(r"^chapters/(?P<number>\d\d|[A-Z])_")


def chapter_number(docname):
    """The number in a chapter's file name, an appendix's letter, None elsewhere."""
    match = CHAPTER.match(docname)
    number = match and match["number"]
    return int(number) if number and number.isdigit() else number


def tidy_cells(app, doctree):
    """Replace export directives by labels and drop markers meant for tools."""
    default_module = ""
    cells = [n for n in doctree.findall(nodes.container) if _is(n, "cell_code")]
    for cell in cells:
        source = next((n for n in cell.children if _is(n, "cell_code_source")), None)
        block = source and next(source.findall(nodes.literal_block), None)
        if not block:
            continue
        code = block.astext()
        directive = DIRECTIVE.match(code)
        if directive and directive["name"] == "default_exp":
            default_module = directive["module"]
            cell.parent.remove(cell)
            continue
        lines = code.split("\n")[1 if directive else 0 :]
        lines = [line for line in lines if not NBVAL_MARKER.match(line)]
        _set_code(block, "\n".join(lines).strip("\n"))
        if directive:
            name = directive["module"] or default_module
            source.insert(0, label(app, name, "\n".join(lines)))
            if "prompt_show" in cell:
                cell["prompt_show"] += contents(name, "\n".join(lines))


def contents(module, code):
    """What a folded cell has inside: `: EMA, Run (in sdbook/training/loop.py)`."""
    things = ", ".join(defined_in(code, module))
    if not things:
        statements = {type(node) for node in ast.parse(code).body}
        things = "helpers" if statements - {ast.Import, ast.ImportFrom} else "imports"
    return f": {things} (in {file_of(module)})"


def _is(node, element):
    return node.get("nb_element") == element


def _set_code(block, code):
    block.rawsource = code
    block.children = []
    block += nodes.Text(code)


def number_by_chapter(app, env):
    """Turn "Exercise 17" into "Exercise 5.2" on chapter pages."""
    changed = []
    for docname, kinds in env.toc_fignumbers.items():
        chapter = chapter_number(docname)
        if chapter is None:
            continue
        for numbers in kinds.values():
            for position, name in enumerate(numbers, start=1):
                numbers[name] = (chapter, position)
        changed.append(docname)
    return changed


def setup(app):
    app.connect("doctree-read", tidy_cells)
    app.connect("env-get-updated", number_by_chapter, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
