"""A small Sphinx extension for the pages of the book.

- A cell that starts with `#| export` gets a quiet label, "saved to
  sdbook/attention.py", and the directive itself is not shown.
- A cell with `#| default_exp` is not shown at all, nor are nbval's markers.
- Chapters carry their number above the title, and their exercises and figures
  are numbered by chapter: Exercise 5.2.
"""

import re

from docutils import nodes

DIRECTIVE = re.compile(r"^#\|\s*(?P<name>export|default_exp)\b[ \t]*(?P<module>\S*)")
NBVAL_MARKER = re.compile(r"^\s*#\s*(NBVAL_\w+|PYTEST_VALIDATE_\w+)\s*$")
CHAPTER = re.compile(r"^chapters/(?P<number>\d\d)_")


def chapter_number(docname):
    """The number in a chapter's file name, or None for other pages."""
    match = CHAPTER.match(docname)
    return int(match["number"]) if match else None


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
            source.insert(0, _label(directive["module"] or default_module))


def _is(node, element):
    return node.get("nb_element") == element


def _set_code(block, code):
    block.rawsource = code
    block.children = []
    block += nodes.Text(code)


def _label(module):
    path = f"sdbook/{module}.py"
    label = nodes.paragraph(classes=["saved-to"])
    label += nodes.Text("saved to ")
    label += nodes.literal(path, path)
    return label


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


def show_chapter_number(app, pagename, templatename, context, doctree):
    """Write "Chapter 5" above the title."""
    chapter = chapter_number(pagename)
    if chapter is not None and "body" in context:
        label = f'<p class="chapter-number">Chapter {chapter}</p>\n<h1>'
        context["body"] = context["body"].replace("<h1>", label, 1)


def setup(app):
    app.connect("doctree-read", tidy_cells)
    app.connect("env-get-updated", number_by_chapter, priority=900)
    app.connect("html-page-context", show_chapter_number)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
