"""Takes the pictures of docs/dashboard.md: `python -m tests.pictures CHECKPOINT docs/images`.

The pictures are screenshots of the dashboard in Chromium, of a server that is connected to daemons of a real chat
model.
"""

from __future__ import annotations

import re
import signal
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect

from tests.browser import NewPage, browsing
from tests.e2e.daemons import Daemon, background, daemons

PARTS = 3
ANSWERED = 40  # The minimum number of characters of an answer in a picture.


def main(checkpoint: Path, images: Path) -> None:
    """Takes the pictures with four peers; the two that serve the same blocks are killed at the end."""
    from splitnet.checkpoint.checkpoint import Checkpoint

    blocks = Checkpoint.open(checkpoint).num_blocks
    edges = [round(blocks * part / PARTS) for part in range(PARTS + 1)]
    spans = [(edges[part], edges[part + 1]) for part in (0, 1, 1, 2)]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        with daemons(home, checkpoint, spans, "--kv-memory", "128MiB") as peers:
            join = ("--join", peers[0].address())
            with background(home, "serve", str(checkpoint), *join, "--codec", "none", "--port", "0") as server:
                assert server.process.stdout is not None
                url = server.process.stdout.readline().decode().split()[-1].removesuffix("v1")
                with browsing(url) as new:
                    take(new, url, peers, images)
                server.stop(signal.SIGTERM)


def take(new: NewPage, url: str, peers: list[Daemon], images: Path) -> None:
    phone = opened(new(390, 844, "dark", has_touch=True, is_mobile=True, device_scale_factor=2), url)
    save(phone, images / "dashboard-phone.png")
    phone.close()
    page = opened(new(1440, 1000), url)
    ask(page, "What is the capital of France?")
    expect(page.locator(".answer .timing")).to_contain_text("tokens/s")
    expect(page.locator("#stop")).to_be_hidden()
    under_way(page, "Why do tides come twice a day? Explain it at length.")
    save(page, images / "dashboard.png")
    page.set_viewport_size({"width": 1440, "height": 1320})
    for peer in peers[1:3]:
        peer.stop(signal.SIGKILL)
    expect(page.locator("#map .hole-band")).to_have_count(1)
    expect(page.locator("#events li").nth(1)).to_be_visible()
    save(page, images / "dashboard-hole.png")


def opened(page: Page, url: str) -> Page:
    page.goto(url)
    expect(page.locator("#map .span")).to_have_count(PARTS + 1)
    return page


def ask(page: Page, text: str) -> None:
    page.fill("#question", text)
    page.click("#send")


def under_way(page: Page, text: str) -> None:
    ask(page, text)
    last = page.locator(".answer").last
    expect(last.locator(".chip").first).to_be_visible()
    expect(last.locator(".text")).to_have_text(re.compile(f".{{{ANSWERED}}}", re.DOTALL))
    expect(page.locator("#map .busy").first).to_be_visible()


def save(page: Page, file: Path) -> None:
    """Reduces the number of colours, for a small file."""
    page.screenshot(path=file, animations="disabled")
    Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
