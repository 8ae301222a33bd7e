"""How fast the model in the page is: the front page of the built book, in Chromium.

    make book && .venv/bin/python tools/benchmarks/bench_page.py [--file] [--steps 15]

Prints, in seconds, how long it took to load the model (until it is ready), the first
picture after that, and the median of five more; and the largest memory of the page's
process, in MB. One thread computes. --file opens the page as a file, and does not
serve it.
"""

import argparse
import functools
import http.server
import os
import re
import shutil
import statistics
import threading
from pathlib import Path

from playwright.sync_api import sync_playwright

SITE = Path(__file__).resolve().parents[2] / "_build" / "html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DRAW = """async ({seed, steps}) => {
  const play = window.sdbookPlay, box = document.querySelector('div.play');
  const facts = JSON.parse(box.querySelector('script.play-facts').textContent);
  const address = play.asFile ? (play.address ??= play.link(play.kept))
                              : (name) => play.here + name;
  const {engineOf} = await import(address('engine.js'));
  const start = performance.now(), engine = engineOf(facts);
  await engine.load();
  const loaded = (performance.now() - start) / 1000;
  const wish = {prompt: 'a red star above a blue house', seed, steps, guidance: 3};
  const {seconds} = await engine.call('draw', wish);
  return [loaded, seconds]}"""


def serve():
    """The address of the built pages, served from here."""

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Silent, directory=SITE)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/index.html"


def memory(browser):
    """The largest peak of resident memory among the page processes, in MB (Linux)."""
    session = browser.new_browser_cdp_session()
    processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
    peaks = [0.0]
    for process in processes:
        status = Path(f"/proc/{process['id']}/status")
        if process["type"] == "renderer" and status.exists():
            peaks.append(int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1e3)
    return max(peaks)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", action="store_true", help="open it as a file")
    parser.add_argument("--steps", type=int, default=15, help="guided steps of DDIM")
    options = parser.parse_args()
    names = [os.environ.get("CHROMIUM", ""), *BROWSERS]
    found = next(filter(None, (shutil.which(name) for name in names if name)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page()
        page.set_default_timeout(300_000)
        page.goto((SITE / "index.html").as_uri() if options.file else serve())
        page.wait_for_selector("form.draw")
        loaded, first = page.evaluate(DRAW, {"seed": 0, "steps": options.steps})
        warm = [
            page.evaluate(DRAW, {"seed": seed, "steps": options.steps})[1]
            for seed in range(1, 6)
        ]
        print(
            f"load {loaded:.2f} s, first picture {first:.2f} s, "
            f"then {statistics.median(warm):.2f} s; {memory(browser):.0f} MB"
        )
        browser.close()


if __name__ == "__main__":
    main()
