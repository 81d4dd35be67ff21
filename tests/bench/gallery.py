"""How soon the gallery answers, and how it scrolls: `python -m tests.bench.gallery`.

A gallery of 16,000 features, 400 of them with 4 pictures each on the first screen, in a headless Chromium without a GPU.
"""

import argparse
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.bench.record import emit
from tests.pages import FLAGS, chromium, find_chromium, write_gallery

ROUNDS, N_SHOWN = 5, 400
MOST_ROWS = 300_000  # of the table, as script.js has it
SCROLL = """async () => {
  const gaps = [], end = document.documentElement.scrollHeight; let last = await new Promise(requestAnimationFrame);
  for (let y = 0; y < end; y += 120) {
    scrollTo(0, y);
    const now = await new Promise(requestAnimationFrame); gaps.push(now - last); last = now;
  }
  return gaps.sort((a, b) => a - b);
}"""
TIMED = """async ([address, ready]) => {
  const start = performance.now(), done = new Function(`return ${ready}`); location.hash = address;
  while (!done()) await new Promise(requestAnimationFrame);
  return performance.now() - start;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, default=16_000, help="features, at least 400")
    d_sae = parser.parse_args().d_sae
    if find_chromium() is None:
        print("no chromium on PATH: nothing is measured")
        return
    shown = tuple(range(0, d_sae, d_sae // N_SHOWN))[:N_SHOWN]
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        gallery = write_gallery(Path(name) / "visuals", d_sae=d_sae, shown=shown)
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        version = browser.version
        rows: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            page = browser.new_page(viewport={"width": 1400, "height": 900})
            page.goto(gallery.url)
            assert page.locator("#grid > li").count() == N_SHOWN
            ready = page.evaluate("performance.getEntriesByName('gallery-ready')[0].startTime")
            rows.setdefault("interactive", []).append(ready)
            gaps = page.evaluate(SCROLL)
            rows.setdefault("frame_median", []).append(gaps[len(gaps) // 2])
            rows.setdefault("frame_p99", []).append(gaps[int(len(gaps) * 0.99)])
            took = page.evaluate(
                TIMED, ["view=table&show=all", "document.querySelectorAll('#rows [data-feature]').length > 10"]
            )
            assert page.locator("#table table").get_attribute("aria-rowcount") == str(min(d_sae, MOST_ROWS) + 1)
            rows.setdefault("table_drawn", []).append(took)
            took = page.evaluate(TIMED, [f"feature={shown[100]}", "document.querySelectorAll('#images > li').length === 5"])
            rows.setdefault("feature_opened", []).append(took)
            page.close()
        browser.close()
    shapes = {"d_sae": d_sae, "n_shown": N_SHOWN, "chromium": version, "rounds": ROUNDS}
    best_and_worst = {name: [round(min(values)), round(max(values))] for name, values in rows.items()}
    emit("gallery", "gallery: milliseconds, best and worst", shapes, ms=best_and_worst)


if __name__ == "__main__":
    main()
