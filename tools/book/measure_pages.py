"""How long the chapters are, and what fills them.

    tools/book/measure_pages.py                 words, cells and folds
    tools/book/measure_pages.py --pages         and the built pages, in a browser
    tools/book/measure_pages.py --json FILE     keep the numbers, too

Words are those of the prose. A fold is a cell that the page shows only at a click.
With --pages (after `make book`), as a laptop 1440 pixels wide shows them: the height of
a page in pixels, the share of it that is open code, and the longest way from one figure
to the next in screens of 900 pixels. The aim: at most 30,000 pixels, 40 per cent of
code, three screens.
"""

import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDED = {"hide-input", "hide-cell"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SCREEN = {"width": 1440, "height": 900}
# Formulas are drawn after the page is loaded.
LOOK = """async () => {
  await document.fonts.ready;
  await (window.MathJax?.startup?.promise ?? null);
  await new Promise(done => setTimeout(done, 500));
  const box = (e) => e.getBoundingClientRect();
  const article = document.querySelector('article.bd-article');
  const shown = (css) => [...article.querySelectorAll(css)]
    .filter(e => !e.closest('details:not([open])')).map(box);
  const code = shown('div.cell_input div.highlight')
    .reduce((sum, b) => sum + b.height, 0);
  const figures = shown('figure, img, svg, canvas, video')
    .filter(b => b.height > 60 && b.width > 60).sort((a, b) => a.top - b.top);
  let end = box(article).top, gap = 0;
  for (const b of figures) {
    gap = Math.max(gap, b.top - end);
    end = Math.max(end, b.bottom);
  }
  gap = Math.max(gap, box(article).bottom - end);
  const height = document.documentElement.scrollHeight;
  return {height, code: code / height, gap: gap / innerHeight}}"""


def count(path: Path) -> dict:
    """What a notebook holds."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = {"markdown": [], "code": []}
    for cell in cells:
        sources.get(cell["cell_type"], []).append("".join(cell["source"]))
    exports = [code for code in sources["code"] if code.startswith("#| export")]
    return {
        "words": len(re.findall(r"\w+", "\n".join(sources["markdown"]))),
        "cells": len(sources["code"]),
        "exports": len(exports),
        "lines": sum(code.count("\n") for code in exports),
        "folds": sum(
            bool(FOLDED & set(cell["metadata"].get("tags", []))) for cell in cells
        ),
    }


def look(pages: list[Path]) -> list[dict]:
    """What a browser shows of built pages."""
    from playwright.sync_api import sync_playwright

    wanted = [os.environ.get("CHROMIUM", ""), *BROWSERS]
    found = next(filter(None, (shutil.which(name) for name in wanted if name)), None)
    seen = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-gpu"]
        )
        for path in pages:
            page = browser.new_page(viewport=SCREEN)
            page.set_default_timeout(180_000)
            page.goto(path.resolve().as_uri(), wait_until="load")
            seen.append(page.evaluate(LOOK))
            page.close()
        browser.close()
    return seen


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="How long the chapters are.")
    parser.add_argument("--pages", action="store_true", help="look at built pages, too")
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout")
    parser.add_argument("--json", type=Path, help="where to keep the numbers")
    options = parser.parse_args(arguments)
    paths = sorted((options.root / "chapters").glob("*.ipynb"))
    if not paths:
        parser.error(f"no chapters in {options.root}")
    rows = {path.stem: count(path) for path in paths}
    if options.pages:
        folder = options.root / "_build" / "html" / "chapters"
        pages = [folder / f"{name}.html" for name in rows]
        missing = [page.name for page in pages if not page.exists()]
        if missing:
            parser.error(f"not in {folder}: {', '.join(missing)}; run `make book`")
        for row, seen in zip(rows.values(), look(pages), strict=True):
            row |= seen
    columns = "  words cells exports  lines folds"
    columns += "  height  code  gap" if options.pages else ""
    print(f"{'chapter':<26}{columns}")
    for name, row in rows.items():
        line = "{words:7}{cells:6}{exports:8}{lines:7}{folds:6}".format(**row)
        if options.pages:
            line += "{height:8}{code:6.0%}{gap:5.1f}".format(**row)
        print(f"{name:<26}{line}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
