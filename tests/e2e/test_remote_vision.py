"""`splitnet peer --vision` and `splitnet generate --vision peer`, run like a user runs them, on a small model."""

from __future__ import annotations

from base64 import b64decode
from pathlib import Path

import pytest

from tests.e2e.daemons import Daemon, Finished, daemons, run
from tests.image_models import IMAGE_MODELS
from tests.images import of_one_colour
from tests.swarm.test_serve_images import write_processor

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


def test_a_client_without_the_tower_gives_the_same_answer(tmp_path: Path) -> None:
    model, image = tmp_path / "model", tmp_path / "red.png"
    IMAGE_MODELS["llava"].write(model)
    write_processor(model)
    image.write_bytes(b64decode(of_one_colour("red", (40, 30))))

    def ask(joined: Daemon, *options: str) -> Finished:
        sampling = ("--max-new-tokens", "8", "--temperature", "0", "--codec", "none")
        asked = ("What?", "--join", joined.address(), *sampling, *options)
        return run(tmp_path, "generate", str(model), *asked)

    shown = ("--image", str(image))
    with daemons(tmp_path, model, [(0, 6), (0, 6)], each=[(), ("--vision",)]) as (blocks, tower):
        assert "reads images for clients" in tower.log and "reads images" not in blocks.log
        local, away = (ask(blocks, *shown, "--vision", where) for where in ("local", "peer"))
        assert local.code == away.code == 0, away.errors
        assert away.output == local.output.strip() + "\n" and local.output.strip()
        tower.stop()
        assert "--vision, or give --vision local" in ask(blocks, *shown, "--vision", "peer").errors.replace("`", "")
        assert "reads texts here" in ask(blocks, "--vision", "peer").error
