"""A question about an image of one megapixel: time to the first token, ms per token and bytes; prints Markdown.

    python -m benchmarks.images [--rounds 3] [--weights float32] [--codec auto] [--tiles 17]

The model has the shape of SmolVLM-256M (Marafioti et al., arXiv:2504.05299) and random weights. Two daemons of one
thread each have half of the blocks, on this machine. The whole model in transformers runs in turns with them, on as
many threads. The image has `--tiles` tiles of 512 x 512 pixels, 64 tokens each; an image of one megapixel has 17.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, LlamaConfig, SmolVLMConfig, SmolVLMVisionConfig

import splitnet
from benchmarks.serve_load import Peer, peer

TOKENS, SIDE = 64, 512
IMAGE, TEXT, NEW = 49190, 20, 16
BLOCKS = 30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weights", default="float32", help="weight format of the peers and of the head")
    parser.add_argument("--codec", default="auto")
    parser.add_argument("--tiles", type=int, default=17)
    arguments = parser.parse_args()
    arguments.streams = 1
    with tempfile.TemporaryDirectory() as name, ExitStack() as running:
        folder = Path(name)
        arguments.checkpoint = str(folder / "model")
        local = write(folder / "model")
        peers: list[Peer] = []
        for span in ((0, BLOCKS // 2), (BLOCKS // 2, BLOCKS)):
            peers.append(running.enter_context(peer(folder, arguments, span, peers)))
        remote = splitnet.AutoModelForImageTextToText.from_pretrained(
            arguments.checkpoint,
            initial_peers=[peers[0].address_file.read_text().strip()],
            codec=arguments.codec,
            local_weights=arguments.weights,
            prefixes="off",
        )
        running.callback(remote.close)
        measure(remote, local, arguments)
    return 0


def write(folder: Path) -> Any:
    """Writes a random checkpoint, and returns the whole model."""
    text = LlamaConfig(
        vocab_size=49280,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=BLOCKS,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
    )
    vision = SmolVLMVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=SIDE,
        patch_size=16,
    )
    config = SmolVLMConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, scale_factor=4)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    return model


def measure(remote: Any, local: Any, arguments: argparse.Namespace) -> None:
    seed = torch.Generator().manual_seed(0)
    ids = [*[IMAGE] * (arguments.tiles * TOKENS), *torch.randint(3, 40000, (TEXT,), generator=seed).tolist()]
    pixels = torch.randn(1, arguments.tiles, 3, SIDE, SIDE, generator=seed)
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": pixels}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    first: dict[str, list[float]] = {"peers": [], "transformers": []}
    each: dict[str, list[float]] = {"peers": [], "transformers": []}
    with remote.session() as cache:
        for number in range(arguments.rounds):
            inputs["pixel_values"] = pixels + number  # features of known images are kept
            for name, model in (("peers", remote), ("transformers", local)):
                first_ms, token_ms = timed(model, inputs)
                first[name].append(first_ms)
                each[name].append(token_ms)
        sent = cache.session.traffic.bytes_sent / arguments.rounds
    began = time.perf_counter()
    with torch.no_grad():
        remote.get_image_features(pixels - 1)
    tower_ms = (time.perf_counter() - began) * 1000
    print("| | first token, ms (range) | ms per token (range) |\n|---|---|---|")
    for name in first:
        print(f"| {name} | {shown(first[name])} | {shown(each[name])} |")
    print(
        f"\nOf the time to the first token, the tower takes {tower_ms:.0f} ms. A prompt of {len(ids)} tokens and {NEW} "
        f"new ones: {sent / 2**10:.0f} KiB from the client. A JPEG of one megapixel: {jpeg_bytes() / 2**10:.0f} KiB."
    )


def timed(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Ms to the first token, and ms per further token."""
    times: list[float] = []

    def stop(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)

    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW}
    criteria: list[Callable[..., torch.Tensor]] = [stop]
    began = time.perf_counter()
    model.generate(**inputs, **options, stopping_criteria=criteria)
    return (times[0] - began) * 1000, (times[-1] - times[0]) * 1000 / (NEW - 1)


def jpeg_bytes() -> int:
    """Bytes of a smooth random picture of 1024 x 1024 pixels at quality 85."""
    noise = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = Image.fromarray(noise.numpy()).resize((1024, 1024), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.tell()


def shown(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


if __name__ == "__main__":
    sys.exit(main())
