"""What a page is beside its text: a title, a description and a picture for those who
share it, a link that opens it in Colab, and amends for what the theme leaves undone.

The repository's address stands in _config.yml and nowhere else; the book's own address
follows from it.
"""

import functools
import html
import re
from pathlib import Path

from docutils import nodes
from PIL import Image, ImageDraw, ImageFont
from sphinx_sdbook import chapter_number

ROOT = Path(__file__).resolve().parents[2]
COLAB = "https://colab.research.google.com/github"
DESCRIPTION = (
    "Build every part of Stable Diffusion in PyTorch, prove that it equals the real "
    "one, and draw with a model that you can train on a laptop."
)

# The theme's pages say some things twice, or only to the eye. (pattern, replacement)
MENDS = [
    # A button is called what is written on it.
    (r'(<button class="btn search-button-field[^>]*?) aria-label="Search"', r"\1"),
    (r'<span class="search-button__kbd-shortcut">',
     r'<span class="search-button__kbd-shortcut" aria-hidden="true">'),
    (r'(<i class="theme-switch [^>]*?) title="[^"]*"', r'\1 aria-hidden="true"'),
    (r'<summary aria-label="Toggle hidden content">', "<summary>"),
    (
        r'<summary>(<span class="toctree-toggle")',
        r'<summary aria-label="Show or hide the pages below">\1',
    ),
    # The front page is the book.
    (r"<title>([^<]+?) &#8212; \1</title>", r"<title>\1</title>"),
    # A list holds items only, and the bibliography's holds links to the places of use.
    (r'<div role="list" class="citation-list">', '<div class="citation-list">'),
    (r' role="doc-biblioentry"', ""),
    # Live code from another host, which this book does not use.
    (r"<script>const THEBE_JS_URL[^<]*</script>\s*", ""),
    (r'<script async="async" src="[^"]*sphinx-thebe\.js[^"]*"></script>\s*', ""),
    (r'<link [^>]*sphinx-thebe\.css[^>]*/>\s*', ""),
]  # fmt: skip


def repository(config):
    """(address, owner/name) of the repository."""
    url = config.html_theme_options["repository_url"].rstrip("/")
    return url, url.removeprefix("https://github.com/")


def set_address(app, config):
    """The book lies on GitHub's pages, as .github/workflows/book.yml publishes it."""
    owner, name = repository(config)[1].split("/")
    config.html_baseurl = f"https://{owner}.github.io/{name}/"


def colab_address(config, pagename):
    branch = config.html_theme_options["repository_branch"]
    return f"{COLAB}/{repository(config)[1]}/blob/{branch}/{pagename}.ipynb"


def describe(doctree, length=200):
    """The first sentences of a page, up to a length."""
    paragraphs = doctree.findall(nodes.paragraph) if doctree else ()
    text = next((p.astext() for p in paragraphs), DESCRIPTION).replace("\n", " ")
    text = " ".join(text.split())
    if len(text) <= length:
        return text
    sentence = text[:length].rpartition(". ")[0]
    return f"{sentence}." if sentence else text[:length].rsplit(" ", 1)[0] + " …"


def add_head(app, pagename, templatename, context, doctree):
    """Title, description, social picture; above a chapter, the link to Colab."""
    number = chapter_number(pagename)
    book = app.config.html_title or app.config.project
    title = re.sub(r"<[^>]+>", "", html.unescape(context.get("title") or book))
    if number is not None:
        title = f"{number} · {title}"
        context["title"] = html.escape(title)
    about = describe(doctree)
    picture = f"_static/social/{pagename.replace('/', '-')}.jpg"
    draw_social(Path(app.outdir) / picture, title, book)
    facts = {
        "og:title": title,
        "og:description": about,
        "og:type": "article" if number is not None else "website",
        "og:site_name": book,
        "og:url": f"{app.config.html_baseurl}{pagename}.html",
        "og:image": app.config.html_baseurl + picture,
        "og:image:width": "1200",
        "og:image:height": "630",
        "og:image:alt": f"{title}; below, pictures drawn by the book's model",
    }
    tags = [f'<meta name="description" content="{html.escape(about)}" />']
    tags += ['<meta name="twitter:card" content="summary_large_image" />']
    tags += [
        f'<meta property="{name}" content="{html.escape(value)}" />'
        for name, value in facts.items()
    ]
    context["metatags"] = context.get("metatags", "") + "\n".join(tags)
    if number is not None and "body" in context:
        kind = "Appendix" if isinstance(number, str) else "Chapter"
        links = (
            f'<p class="chapter-number">{kind} {number}</p>\n'
            f'<p class="open-in d-print-none"><a href="'
            f'{colab_address(app.config, pagename)}">Open in Colab</a></p>\n<h1>'
        )
        context["body"] = context["body"].replace("<h1>", links, 1)


# The picture that is shown where a page is shared --------------------------------


@functools.cache
def canvas():
    """The paper and the strip of our model's pictures, 1200 by 630 pixels."""
    paper = Image.new("RGB", (1200, 630), "#f6f3ea")
    strip = Image.open(ROOT / "assets" / "first_pictures.png").convert("RGB")
    height = round(1200 / strip.width * strip.height)
    paper.paste(
        strip.resize((1200, height), Image.Resampling.LANCZOS), (0, 630 - height)
    )
    return paper


def draw_social(path, title, book):
    """Write the title of a page and of the book above the strip."""
    picture = canvas().copy()
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(72)
    lines = [""]
    for word in title.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font) <= 1080:
            lines[-1] = longer
        else:
            lines.append(word)
    pen.multiline_text((60, 56), "\n".join(lines[:3]), "#2b2a27", font, spacing=14)
    if title != book:
        pen.text((60, 350), book, "#8a4b1f", ImageFont.load_default(36))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=85)


# The theme ------------------------------------------------------------------------


def mend(app, exception):
    """Correct the written pages; a second time changes nothing."""
    if exception or app.builder.format != "html":
        return
    for path in Path(app.outdir).rglob("*.html"):
        if "_static" in path.parts:
            continue
        text = before = path.read_text(encoding="utf-8")
        for pattern, replacement in MENDS:
            text = re.sub(pattern, replacement, text)
        if text != before:
            path.write_text(text, encoding="utf-8")


def setup(app):
    app.connect("config-inited", set_address)
    app.connect("html-page-context", add_head)
    app.connect("build-finished", mend)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
