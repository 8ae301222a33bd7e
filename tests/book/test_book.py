"""The pages of the book: built without a warning, and looked at in a real browser.

The book is built afresh into a temporary folder, served from this machine, and
opened in Chromium, which playwright drives.
"""

import ast
import functools
import html.parser
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from helpers import load_tool
from PIL import Image

pytestmark = pytest.mark.slow  # the whole book is built
ROOT = Path(__file__).parents[2]
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """A fresh build: (the finished process, the folder of pages)."""
    pytest.importorskip("jupyter_book", reason="pip install -r requirements.txt")
    out = tmp_path_factory.mktemp("book")
    start = "from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", start, "build", ".", "-W", "-n"]
    command += ["--keep-going", "--path-output", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done, out / "_build" / "html"


@pytest.fixture(scope="session")
def site(build):
    """The folder of pages, for tests that need a book."""
    done, folder = build
    if not (folder / "index.html").exists():
        pytest.fail(f"the book was not built:\n{done.stdout[-3000:]}{done.stderr}")
    return folder


@pytest.fixture(scope="session")
def address(site):
    """The same pages behind a web server of our own."""

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Silent, directory=site)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("the pages were not tested: pip install playwright")
    wanted = [os.environ.get("CHROMIUM", ""), *BROWSERS]
    found = next(filter(None, (shutil.which(name) for name in wanted if name)), None)
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = found or (own if Path(own).exists() else None)
        if found is None:
            pytest.fail(
                "the pages were not tested, for there is no browser: install chromium "
                "or Google Chrome, run `.venv/bin/playwright install chromium`, or "
                "name one in the variable CHROMIUM"
            )
        chromium = playwright.chromium.launch(executable_path=found, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def open_page(browser, address):
    """Open a page of the book and wait until nothing more is loaded."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(180_000)  # a page takes long on a busy machine

    def open_page(path):
        page = context.new_page()
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("response", lambda r: r.ok or page.asked.append(f"missing: {r.url}"))
        page.goto(urljoin(address, path), wait_until="networkidle")
        return page

    yield open_page
    context.close()


FACTS = """() => {
  const all = (css) => [...document.querySelectorAll(css)];
  return {
    number: all('p.chapter-number').map(e => e.innerText),
    exercises: all('div.exercise > .admonition-title').map(e => e.innerText),
    pictures: [...document.images].map(i => [i.alt.trim(), i.naturalWidth,
      i.src.slice(0, 60)]),
    formulas: all('mjx-container').length,
    broken: all('mjx-merror').map(e => e.textContent),
  }}"""
IN_THE_DARK = """() => [...document.querySelectorAll('figure.sdbook img')].map(i => {
  const own = getComputedStyle(i);
  const card = getComputedStyle(i.closest('.output') || i.parentElement);
  return [own.filter, own.backgroundColor, card.backgroundColor]})"""

INK = """() => [...new Set([...document.querySelectorAll(
  '.bd-article :is(p, li, td, th, dt, dd, figcaption, strong, em)')].map(
  e => getComputedStyle(e).color))]"""

# Formulas have an ink of their own, and code is coloured alike everywhere: both have
# tens of thousands of parts, and are emptied first, but for the code of one chapter.
AXE = """async (options) => {
  document.querySelectorAll(options.empty).forEach(e => e.replaceChildren());
  return (await axe.run('body', {resultTypes: ['violations'], ...options.rules}
    )).violations.filter(v => ['serious', 'critical'].includes(v.impact)).map(
    v => [v.id, v.nodes.length, v.nodes[0].target.join(' ')])}"""
# The dark has the colours of one style sheet, whatever a page says.
ONE_OF_EACH_LOOK = {
    "index.html", "search.html", "chapters/02_resblocks.html", "pages/notation.html",
    "pages/glossary.html", "pages/api/schedulers.html", "pages/proofs.html",
}  # fmt: skip
# What the eye is told must not be cut off: formulas that do not fit can be scrolled to.
CUT_OFF = """() => [...document.querySelectorAll('mjx-container, div.math')].filter(
  e => e.scrollWidth > e.clientWidth && e.tabIndex != 0 &&
       getComputedStyle(e).overflowX == 'auto').length"""


@pytest.fixture(scope="session")
def facts(site, open_page):
    """One visit to every page: {page: what a browser sees there}."""
    axe = (ROOT / "tests" / "book" / "axe" / "axe.min.js").read_text(encoding="utf-8")
    seen = {}
    for path in pages(site):
        page = open_page(path)
        page.add_style_tag(content="* {transition: none !important}")
        if 'class="math' in (site / path).read_text(encoding="utf-8"):
            page.wait_for_selector("mjx-container", state="attached")
        seen[path] = page.evaluate(FACTS)
        page.emulate_media(color_scheme="dark")
        page.wait_for_function("document.documentElement.dataset.theme == 'dark'")
        seen[path]["dark"] = page.evaluate(IN_THE_DARK)
        page.wait_for_timeout(300)  # colours fade over
        seen[path]["ink"] = page.evaluate(INK)
        page.set_viewport_size({"width": 390, "height": 844})
        width = "document.documentElement.scrollWidth"
        seen[path]["width on a phone"] = page.evaluate(width)
        seen[path]["cut off"] = page.evaluate(CUT_OFF)
        page.mouse.wheel(0, 100_000)
        page.wait_for_timeout(200)
        page.set_viewport_size({"width": 1280, "height": 900})
        page.evaluate(axe)
        code = "" if path == "chapters/02_resblocks.html" else ", div.highlight"
        options = {"empty": f"mjx-container{code}", "rules": {}}
        if path in ONE_OF_EACH_LOOK:  # the ink of the others is looked at below
            options["rules"] = {"runOnly": ["color-contrast"]}
            seen[path]["faults"] = page.evaluate(AXE, options)
            options["rules"] = {}
        page.emulate_media(color_scheme="light")
        page.wait_for_function("document.documentElement.dataset.theme == 'light'")
        page.wait_for_timeout(300)
        seen[path].setdefault("faults", []).extend(page.evaluate(AXE, options))
        seen[path]["asked"] = page.asked
        page.close()
    return seen


def pages(site):
    """All pages, as addresses relative to the front page."""
    hidden = {"_static", "_sources", "_sphinx_design_static"}
    found = (path.relative_to(site) for path in site.rglob("*.html"))
    return sorted(p.as_posix() for p in found if p.parts[0] not in hidden)


def chapter_page(path):
    return f"chapters/{path.stem}.html"


def code_cells(path):
    """The code of each cell, and whether the page leaves the cell out."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            tags = cell["metadata"].get("tags", [])
            yield "".join(cell["source"]), "remove-cell" in tags


# Without a browser ------------------------------------------------------------


def test_the_book_builds_without_a_warning(build):
    done, _ = build
    said = done.stdout + done.stderr
    warnings = [line for line in said.splitlines() if "WARNING" in line]
    assert not warnings, "\n".join(warnings)
    assert done.returncode == 0, said[-3000:]


def test_every_chapter_and_every_page_is_in_the_table_of_contents(site):
    toc = (ROOT / "_toc.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"file: (\S+)", toc))
    found = (ROOT / "pages").rglob("*.md")
    pages_ = {path.relative_to(ROOT).with_suffix("").as_posix() for path in found}
    assert listed == {f"chapters/{path.stem}" for path in CHAPTERS} | pages_
    assert all((site / f"{name}.html").exists() for name in listed)


class Links(html.parser.HTMLParser):
    """The links of a page, the places that one can link to, what it loads."""

    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.loads, self.meta = [], set(), [], {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids |= {attributes.get("id"), attributes.get("name")}
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        elif tag == "link" and attributes.get("rel") not in ("canonical",):
            self.loads.append(attributes.get("href", ""))
        elif tag == "meta" and "content" in attributes:
            name = attributes.get("name") or attributes.get("property")
            self.meta[name] = attributes["content"]
        elif attributes.get("src"):
            self.loads.append(attributes["src"])


def test_links_and_anchors_lead_somewhere(site):
    parsed = {
        page: Links((site / page).read_text(encoding="utf-8")) for page in pages(site)
    }
    dead = []
    for page, found in parsed.items():
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = urlsplit(urljoin(f"http://book/{page}", link)).path.lstrip("/")
            target = unquote(target) or "index.html"
            if not (site / target).exists():
                dead.append(f"{page}: {link} (no such file)")
            elif parts.fragment and target in parsed:
                if unquote(parts.fragment) not in parsed[target].ids:
                    dead.append(f"{page}: {link} (no such anchor)")
    assert not dead, "\n".join(dead)


def test_nothing_on_a_page_comes_from_another_host(site):
    for page in pages(site):
        for source in Links((site / page).read_text(encoding="utf-8")).loads:
            assert not re.match(r"(https?:)?//", source), f"{page} loads {source}"


def test_pages_say_what_they_are_about(site):
    titles, descriptions = {}, {}
    for page in pages(site):
        text = (site / page).read_text(encoding="utf-8")
        meta = Links(text).meta
        titles[page] = re.search(r"<title>(.*?)</title>", text, re.DOTALL)[1].strip()
        descriptions[page] = meta["description"]
        assert 20 < len(meta["description"]) <= 200, page
        assert meta["og:title"] and meta["og:title"] in titles[page].replace(
            "&#39;", "'"
        )
        url = urlsplit(meta["og:image"])
        assert url.scheme == "https" and url.netloc, page
        picture = site / url.path.split("/", 2)[2]
        assert Image.open(picture).size == (1200, 630), page
        assert meta["og:url"].endswith(page) and meta["og:image:alt"], page
    assert len(set(titles.values())) == len(titles)
    chapters = [descriptions[chapter_page(path)] for path in CHAPTERS]
    assert len(set(chapters)) == len(chapters)
    assert titles["index.html"].count("Stable Diffusion") == 1


def test_pages_are_light(site):
    """What one page brings with it, beside what all pages share."""
    for page in pages(site):
        text = (site / page).read_text(encoding="utf-8")
        own = {urljoin(page, load) for load in Links(text).loads if "_images" in load}
        size = len(text.encode()) + sum((site / load).stat().st_size for load in own)
        limit = 5e6 if 'type="range"' in text else 1.5e6
        assert size <= limit, f"{page}: {size / 1e6:.1f} MB"


def test_the_map_leads_to_every_chapter(site):
    text = (site / "index.html").read_text(encoding="utf-8")
    for map_ in re.findall(r'<svg class="parts-map.*?</svg>', text, re.DOTALL):
        links = Links(map_).links
        numbered = [path for path in CHAPTERS if path.stem[0].isdigit()]
        assert sorted(links) == [chapter_page(path) for path in numbered]
    assert text.count('<svg class="parts-map') == 2


def test_a_chapter_says_where_it_is_how_long_it_is_and_what_it_proved(site):
    """And the pages that sum it up have them all."""
    reading = (site / "pages" / "reading.html").read_text(encoding="utf-8")
    proofs = (site / "pages" / "proofs.html").read_text(encoding="utf-8")
    rows = load_tool("proofs").all_proofs()
    for path in CHAPTERS:
        text = (site / chapter_page(path)).read_text(encoding="utf-8")
        strips = re.findall(r'<svg class="here".*?</svg>', text, re.DOTALL)
        assert len(strips) == (path.stem[0] not in "AB"), path.stem  # no part of it
        assert re.search(r"<strong>Reads in</strong> about \d+ minutes", text)
        assert f'href="../{chapter_page(path)}"' in reading
        own = [row for row in rows if row.docname == f"chapters/{path.stem}"]
        assert text.count(">largest difference<") == bool(own), path.stem
    assert proofs.count("<tr") == len(rows) + 1
    front = (site / "index.html").read_text(encoding="utf-8")
    assert re.search(rf"<strong>\d+ parts of .*? in {len(rows)}\s+comparisons", front)


def test_chapters_open_in_colab_with_one_click(site):
    config = (ROOT / "_config.yml").read_text(encoding="utf-8")
    name = re.search(r"url: https://github\.com/(\S+)", config)[1]
    for path in CHAPTERS:
        text = (site / chapter_page(path)).read_text(encoding="utf-8")
        found = {x for x in Links(text).links if "colab.research" in x}
        assert found == {
            f"https://colab.research.google.com/github/{name}/blob/main/chapters/{path.name}"
        }
        assert "the-book" not in text, "Colab's cell is not for the page"


def test_the_reference_explains_every_name_and_leads_to_its_cell_and_back(site):
    api = load_tool("sphinx_api")
    for module in filter(api.public_names, api.modules()):
        page = f"{api.page_of(module)}.html"
        text = (site / page).read_text(encoding="utf-8")
        for thing in api.entries(module):
            assert f'id="sdbook.{module}.{thing}"' in text, thing
        for name in api.public_names(module):
            entry = re.search(
                rf'<section class="api" id="sdbook\.{module}\.{name}">.*?</section>',
                text,
                re.DOTALL,
            )
            links = re.findall(r'"built-in">.*?href="([^"#]+)#([^"]+)"', entry[0])
            assert links or not any(module in c.modules for c in api.chapters()), name
            for there, anchor in links:
                cell = (site / urljoin(page, there)).read_text(encoding="utf-8")
                assert f'id="{anchor}"' in cell, name
        for chapter in set(re.findall(r'href="[./]+/(chapters/[^"#]+)#', text)):
            back = (site / chapter).read_text(encoding="utf-8")
            assert f'href="../{page}#sdbook.{module}.' in back


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_export_directives_become_labels(path, site):
    page = (site / chapter_page(path)).read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", "", page)
    default = None
    for source, left_out in code_cells(path):
        match = re.match(r"#\| (default_exp|export) ?(\S*)", source)
        if match and match[1] == "default_exp":
            default = match[2]
        elif match and left_out:  # only what a module is called, and what it hands on
            for node in ast.parse(source).body:
                if isinstance(node, ast.FunctionDef):
                    assert node.name == "__getattr__", source
                else:
                    assert isinstance(node, ast.Expr | ast.ImportFrom | ast.Assign)
        elif match:
            module = match[2] or default
            label = f"saved to sdbook/{module.replace('.', '/')}.py"
            assert label in text
            text = text.replace(label, "", 1)
    assert "saved to sdbook/" not in text
    for code in re.findall(r"<pre>.*?</pre>", page, flags=re.DOTALL):
        code = re.sub(r"<[^>]+>", "", code)
        assert not re.search(r"^#\| |^# NBVAL_", code, re.MULTILINE), code


def test_references_are_complete_and_unique():
    text = (ROOT / "references.bib").read_text(encoding="utf-8")
    entries = re.findall(r"@(\w+)\{([^,]+),(.*?)\n\}", text, flags=re.DOTALL)
    keys = [key for _, key, _ in entries]
    assert len(keys) == len(set(keys)) == text.count("@")
    for kind, key, fields in entries:
        where = "journal" if kind == "article" else "booktitle"
        for name in ("title", "author", "year", where, "(url|doi)"):
            if kind in ("misc", "software", "online") and name == where:
                continue
            assert re.search(rf"^\s*{name}\s*=", fields, re.M), f"{key} has no {name}"


# In a browser -----------------------------------------------------------------


def test_pages_ask_no_other_host_and_miss_nothing(facts, address):
    for path, seen in facts.items():
        asked = {url for url in seen["asked"] if not url.startswith("data:")}
        elsewhere = {url for url in asked if not url.startswith(address)}
        assert not elsewhere, f"{path}: {elsewhere}"


def test_every_picture_is_there_and_described(facts):
    for path, seen in facts.items():
        for alt, width, source in seen["pictures"]:
            assert alt and width, f"{path}: alt={alt!r}, {width} pixels: {source}"


def test_formulas_are_drawn(facts):
    assert facts["pages/notation.html"]["formulas"] > 10
    for path, seen in facts.items():
        assert not seen["broken"], f"{path}: {seen['broken']}"


def test_a_dark_page_leaves_pictures_as_they_are(facts):
    clear = "rgba(0, 0, 0, 0)"
    for path, seen in facts.items():
        for look in seen["dark"]:
            assert look == ["none", clear, clear], path


def test_text_on_a_dark_page_is_light(facts):
    assert all(facts[chapter_page(path)]["ink"] for path in CHAPTERS)
    for path, seen in facts.items():
        for ink in seen["ink"]:
            red, green, blue = map(float, re.findall(r"[\d.]+", ink)[:3])
            assert 0.3 * red + 0.59 * green + 0.11 * blue > 110, f"{path}: {ink}"


def test_axe_finds_no_serious_fault(facts):
    """Light and dark; see tests/book/axe/README.md."""
    faults = {path: seen["faults"] for path, seen in facts.items() if seen["faults"]}
    assert not faults, json.dumps(faults, indent=1)[:3000]


def test_wide_formulas_can_be_scrolled_with_the_keyboard(facts):
    assert not {path: n for path, s in facts.items() if (n := s["cut off"])}


def test_the_words_of_the_map_stay_in_their_boxes(open_page):
    page = open_page("index.html")
    outside = """() => [...document.querySelectorAll('svg.parts-map a')].flatMap(a => {
      const box = a.querySelector('rect').getBoundingClientRect();
      return [...a.querySelectorAll('text')].filter(t => {
        const r = t.getBoundingClientRect();
        return r.width && (r.right > box.right - 1 || r.bottom > box.bottom ||
                           r.left < box.left || r.top < box.top)
      }).map(t => t.textContent)})"""
    shown = "svg.parts-map:visible"
    for width, kind in ((1280, "wide"), (390, "narrow")):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.locator(shown).count() == 1
        assert kind in page.locator(shown).get_attribute("class")
        assert page.evaluate(outside) == []


def test_the_keyboard_is_enough(open_page):
    page = open_page("chapters/00_the_whole_picture.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to main content"
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#main-content"
    page.keyboard.press("Control+k")
    field = page.locator("#pst-search-dialog input")
    field.wait_for(state="visible")
    field.fill("attention")
    field.press("Enter")
    page.wait_for_selector("ul.search li a")
    assert "Attention" in page.locator("ul.search").inner_text()


def test_a_printed_page_has_the_text_and_no_menus(open_page):
    page = open_page("chapters/02_resblocks.html")
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 700, "height": 990})  # A4, less its margins
    for menu in (".bd-sidebar-primary", ".bd-header-article", "p.open-in"):
        assert not page.locator(menu).first.is_visible(), menu
    titles = page.locator("h1:visible").all_inner_texts()
    assert [title for title in titles if "Residual blocks" in title]
    cut = """() => [...document.querySelectorAll('article pre')].filter(
      e => e.offsetParent && e.scrollWidth > e.clientWidth + 1).length"""
    assert page.evaluate(cut) == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 700


def test_pages_work_as_files(browser, site):
    page = browser.new_page()
    page.set_default_timeout(180_000)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("requestfailed", lambda request: asked.append(f"failed: {request.url}"))
    page.goto((site / "pages" / "notation.html").as_uri())
    page.wait_for_selector("mjx-container")
    assert not [url for url in asked if url.startswith("failed:")]
    # The search cannot look into files for an excerpt, but it finds the titles.
    page.goto((site / "search.html").as_uri() + "?q=palette")
    page.wait_for_selector("ul.search li:has-text('Pictures on the page')")
    page.close()
    allowed = ("file:", "data:", "failed: file:")
    assert not [url for url in asked if not url.startswith(allowed)]


def test_pages_fit_a_phone(facts):
    widths = {path: seen["width on a phone"] for path, seen in facts.items()}
    assert {path: width for path, width in widths.items() if width > 390} == {}


def test_chapters_and_exercises_carry_their_numbers(facts):
    for path in CHAPTERS:
        number, seen = path.stem.split("_")[0], facts[chapter_page(path)]
        kind = "Chapter" if number.isdigit() else "Appendix"
        number = number.lstrip("0") or "0"
        assert seen["number"] == [f"{kind} {number}"], path.stem
        for position, title in enumerate(seen["exercises"], start=1):
            assert title.startswith(f"Exercise {number}.{position}"), path.stem


def test_sliders_move_by_themselves_with_the_keyboard(open_page):
    page = open_page("chapters/00_the_whole_picture.html")
    for details in page.locator("details").all():
        details.evaluate("d => d.open = true")
    figures = page.locator("figure.sdbook:has(input[type=range])")
    assert figures.count() >= 2
    states = """() => [...document.querySelectorAll('figure.sdbook:has(input)')]
        .map(f => [f.querySelector('output').value,
                   f.querySelector('input').getAttribute('aria-valuetext'),
                   [...f.querySelectorAll('img')].filter(
                     i => getComputedStyle(i).display != 'none').map(i => i.alt)])"""
    before = page.evaluate(states)
    assert all(len(shown) == 1 for _, _, shown in before)
    handle = figures.first.locator("input")
    handle.focus()
    handle.press("ArrowLeft")
    after = page.evaluate(states)
    label, spoken, shown = after[0]
    assert label == spoken != before[0][0]
    assert len(shown) == 1 and shown[0].endswith(f"{label})")
    assert after[1:] == before[1:], "one slider moved another"
    handle.press("Home")
    assert page.evaluate(states)[0][0] != label


def test_search_finds_a_chapter_and_there_is_one_search_bar(open_page):
    page = open_page("search.html?q=palette")
    page.wait_for_selector("ul.search li:has-text('Pictures on the page')")
    page = open_page("chapters/00_the_whole_picture.html")
    bars = page.locator("button.search-button-field:visible, form.bd-search:visible")
    assert bars.count() == 1


# The model in the page ----------------------------------------------------------

DRAWN = """() => {
  const picture = document.querySelector('form.draw canvas.picture');
  const {width, height} = picture;
  return [...picture.getContext('2d').getImageData(0, 0, width, height).data]}"""


@pytest.fixture
def drawing(site):
    """Fill in a page's prompt line, draw, and say what the page then says."""
    if not (site / "_static" / "play" / "pack").exists():
        pytest.skip("pages stay still without onnx: pip install -r requirements.txt")

    def drawing(page, prompt, seed):
        page.fill("form.draw input[type=text]", prompt)
        page.fill("form.draw input[type=number]", str(seed))
        page.press("form.draw input[type=text]", "Enter")
        status = page.locator("form.draw .status")
        end = "s => /Drawn on|could not/.test(document.querySelector(s).textContent)"
        page.wait_for_function(end, arg="form.draw .status", timeout=120_000)
        return status.inner_text()

    return drawing


def test_the_page_draws_what_the_package_draws(open_page, drawing):
    from sdbook import StableDiffusion

    page = open_page("index.html")
    loaded = len(page.asked)
    assert not [url for url in page.asked if "/pack/" in url and "film" not in url]
    assert "MB" in page.locator("form.draw .status").inner_text(), "said beforehand"
    assert page.locator("figure img[src*=first_pictures]").count() == 1
    assert drawing(page, "a purple boat", 3).startswith("Drawn on your machine")
    drawn = page.evaluate(DRAWN)
    assert len(page.asked) > loaded, "the model was loaded at the click"
    pipe = StableDiffusion.from_pretrained("scenes")
    expected = pipe("a purple boat", seed=3, progress=False).images[0].convert("RGBA")
    theirs = list(expected.tobytes())
    assert max(abs(a - b) for a, b in zip(drawn, theirs, strict=True)) <= 1
    page.fill("form.draw input[type=text]", "a purple dragon")
    assert "dragon" in page.locator("form.draw .hint").inner_text()
    page.close()


def test_the_page_draws_when_it_is_opened_as_a_file(browser, site, drawing):
    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.goto((site / "chapters" / "00_the_whole_picture.html").as_uri())
    page.wait_for_selector("form.draw")
    assert drawing(page, "two green fish", 1).startswith("Drawn on your machine")
    page.close()


def test_without_javascript_the_picture_stands(browser, address):
    page = browser.new_page(java_script_enabled=False)
    page.goto(urljoin(address, "index.html"))
    assert page.locator("figure img[src*=first_pictures]").is_visible()
    assert page.locator("form.draw").count() == 0
    page.close()
