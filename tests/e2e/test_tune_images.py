"""`splitnet tune` with images, run like a user runs it, on a small model."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.hf.image_text import RemoteImageTextToText
from splitnet.tools.tune.data import read_examples
from splitnet.tools.tune.job import evaluate
from splitnet.tools.tune.methods import TrainingSettings
from splitnet.tools.tune.run import Encoder, TuningRun
from tests.e2e.conftest import Here
from tests.image_models import IMAGE, IMAGE_MODELS
from tests.images import of_one_colour
from tests.swarm.harness import LocalSwarm, local_swarm
from tests.swarm.test_serve_images import write_processor

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    folder = tmp_path_factory.mktemp("llava") / "published"
    IMAGE_MODELS["llava"].write(folder)
    write_processor(folder)
    with local_swarm(folder, [(0, 2), (2, 6)], dtype="float32") as swarm:
        yield swarm


def example(content: Any, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two images with a path and as a URL, and a text."""
    (tmp_path / "red.png").write_bytes(b64decode(of_one_colour("red", (40, 30))))
    url = "data:image/png;base64," + of_one_colour("blue")
    asked = {"type": "text", "text": "What colour?"}
    lines = [
        example([{"type": "image", "path": "red.png"}, asked], "red"),
        example([{"type": "image", "url": url}, asked], "blue"),
        example("What is grass?", "green"),
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_an_adapter_learns_from_images(
    swarm: LocalSwarm, here: Here, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, seen = tmp_path / "adapter", []
    inner = RemoteImageTextToText.use_handed

    def use(model: Any, *given: Any) -> None:
        inner(model, *given)
        model.model.vision_tower.register_forward_hook(lambda *_: seen.append(1))

    monkeypatch.setattr(RemoteImageTextToText, "use_handed", use)
    joining = (str(swarm.folder), "--join", swarm.addresses[0], "--codec", "none")
    how = ("--batch-size", "2", "--steps", "9", "--lr", "0.01", "--targets", "q_proj,down_proj")
    finished = here("tune", *joining, "--data", str(data), "--eval", str(data), "--output", str(output), *how)
    assert finished.code == 0, finished.errors
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    begun, ended = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert ended < begun - 0.5
    assert len(seen) == 2  # the tower has read each image once

    base = type(IMAGE_MODELS["llava"].write(tmp_path / "again")).from_pretrained(swarm.folder, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, str(output), is_trainable=True)
    checkpoint = Checkpoint.open(swarm.folder)
    tokenizer, processor = checkpoint.tokenizer(), checkpoint.store.processor()
    tokenizer.chat_template = processor.chat_template
    rows = Encoder(tokenizer, 64, processor=processor).encode_file(read_examples(data))
    assert [row.ids.count(IMAGE) for row in rows] == [16, 16, 0]
    answers = [tokenizer.decode([token for token in row.targets if token >= 0]) for row in rows]
    assert answers == [f" {colour}|assistant:" for colour in ("red", "blue", "green")]
    run = TuningRun(plain, rows, TrainingSettings(steps=1, learning_rate=0.1, batch_size=2), pad=0)
    assert evaluate(run, rows, None, lambda _: None).loss == pytest.approx(ended, rel=1e-4)
    assert all("language_model" in name for name, one in plain.named_parameters() if one.requires_grad)

    assert f"--adapter {output} --image FILE" in finished.output
    asked = here("generate", *joining, "--adapter", str(output), "--image", str(tmp_path / "red.png"), "What?")
    assert asked.code == 0, asked.errors
    with_side = here("tune", *joining, "--data", str(data), "--output", str(tmp_path / "side"), "--method", "side")
    assert with_side.code and "side networks read texts alone" in with_side.errors


WRONG = {
    "a part of a message has the type 'video'": {"type": "video", "path": "red.png"},
    "an image is a file in 'path', or 'url'": {"type": "image", "url": "ftp://host/red.png"},
    "none.png cannot be read": {"type": "image", "path": "none.png"},
    "image 1 cannot be used": {"type": "image", "path": "data.jsonl"},
    "an image has the key 'detail'": {"type": "image", "path": "red.png", "detail": "low"},
}


@pytest.mark.parametrize("problem", WRONG)
def test_errors_of_images_name_the_line(
    problem: str, swarm: LocalSwarm, here: Here, data: Path, tmp_path: Path
) -> None:
    with data.open("a") as file:
        file.write("\n" + json.dumps(example([WRONG[problem]], "red")) + "\n")
    finished = here("tune", str(swarm.folder), "--join", swarm.addresses[0], "--data", str(data), "--output", "adapter")
    assert finished.code and f"{data}, line 5: " in finished.errors and problem in finished.errors


def test_images_for_a_model_without_a_tower_are_refused(
    small: Path, duo: str, here: Here, data: Path, tmp_path: Path
) -> None:
    finished = here("tune", str(small), "--join", duo, "--data", str(data), "--output", str(tmp_path / "adapter"))
    assert finished.code and "no images" in finished.errors
