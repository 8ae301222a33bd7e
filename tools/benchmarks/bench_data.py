"""How long a large folder of captioned pictures takes to open.

    python tools/benchmarks/bench_data.py  100,000 pictures, in three forms
    python tools/benchmarks/bench_data.py --count 1000000

The pictures are hard links to one file, so they take no room; captions are files
that differ. The folder is temporary, or --folder. Each form is opened twice: the
first time, the disk may have to look.
"""

import argparse
import functools
import json
import os
import sys
import tempfile
from pathlib import Path

from PIL import Image
from timing import seconds

from sdbook.images import CaptionedImages

FILES_PER_FOLDER = 10_000  # a file may have some 60,000 hard links, a folder any number


def make_pictures(folder: Path, count: int) -> list[str]:
    """Link `count` pictures below `folder`; returns their names."""
    names = []
    for index in range(count):
        place = folder / f"{index // FILES_PER_FOLDER:04}"
        if index % FILES_PER_FOLDER == 0:
            place.mkdir(parents=True)
            Image.new("RGB", (64, 64), "red").save(place / f"{index:07}.png")
            first = place / f"{index:07}.png"
        else:
            os.link(first, place / f"{index:07}.png")
        names.append(f"{place.name}/{index:07}.png")
    return names


def make(folder: Path, form: str, count: int) -> Path:
    """A folder of captioned pictures in one of the forms."""
    path = folder / form.replace(" ", "-")
    images = path / "images" if form == "images and captions" else path
    names = make_pictures(images, count)
    captions = [f"a red square, the {number}th" for number in range(count)]
    if form == "metadata.jsonl":
        rows = zip(names, captions, strict=True)
        lines = [json.dumps({"file_name": n, "text": c}) + "\n" for n, c in rows]
        (path / "metadata.jsonl").write_text("".join(lines))
        return path
    texts = path / "captions" if form == "images and captions" else path
    for name, caption in zip(names, captions, strict=True):
        file = (texts / name).with_suffix(".txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(caption)
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Open a large folder of pictures.")
    parser.add_argument("--count", type=int, default=100_000, help="pictures (100,000)")
    parser.add_argument("--folder", type=Path, help="where to make them")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for form in ("images and captions", "side by side", "metadata.jsonl"):
            path = make(Path(folder), form, options.count)
            open_it = functools.partial(CaptionedImages, path, on_error="raise")
            first, again = (seconds(open_it) for _ in range(2))
            count = f"{options.count:,} pictures"
            print(f"{form:<20} {count}: {first:.2f} s, again {again:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
