"""The models that `splitnet run` lists when none is named: files that are here, and models of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from splitnet.checkpoint.demo import DEMO_NAME
from splitnet.cli.tables import table

HUB_MODELS = (
    (DEMO_NAME, 0.1),
    ("Qwen/Qwen3-0.6B", 0.6),
    ("meta-llama/Llama-3.2-3B-Instruct", 3.2),
    ("Qwen/Qwen3-8B", 8.2),
    ("Qwen/Qwen3-30B-A3B", 30.5),
    ("meta-llama/Llama-3.3-70B-Instruct", 70.6),
    ("Qwen/Qwen3-235B-A22B-Instruct-2507", 235.0),
)
"""Ids, and parameters in 10^9. Shapes of these families are tested, see docs/models.md."""

BYTES_PER_PARAMETER = 1.0625  # in int8 with a scale of 16 bits for 32 numbers
WEIGHTS = (".safetensors", ".bin", ".gguf")


def model_list(memory: int) -> str:
    """A table of models with their sizes, and the number of machines with `memory` bytes that they need."""
    rows = [
        *models_here(),
        *((name, int(count * 1e9 * BYTES_PER_PARAMETER), "hub, int8") for name, count in HUB_MODELS),
    ]
    cells = [
        (name, f"{size / 2**30:.1f}", str(max(1, -(-size // max(memory, 1)))), place) for name, size, place in rows
    ]
    return table(["model", "GiB", "machines", "where"], cells, ["GiB", "machines"])


def models_here() -> Iterator[tuple[str, int, str]]:
    """Names, bytes and places of GGUF files and checkpoints in this folder, and of models in the cache of the hub."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    for path in sorted(Path.cwd().iterdir()):
        if path.suffix == ".gguf" and path.is_file():
            yield f"./{path.name}", path.stat().st_size, "this folder"
        elif (path / "config.json").is_file():
            size = sum(file.stat().st_size for file in path.iterdir() if file.suffix in WEIGHTS)
            yield f"./{path.name}", size, "this folder"
    try:
        cached = scan_cache_dir().repos
    except CacheNotFound:
        return
    for repo in sorted(cached, key=lambda repo: repo.repo_id):
        files = max(repo.revisions, key=lambda revision: revision.last_modified).files if repo.revisions else ()
        names = {file.file_name for file in files}
        if repo.repo_type == "model" and "config.json" in names:
            size = sum(file.size_on_disk for file in files if file.file_path.suffix in WEIGHTS)
            yield repo.repo_id, size, "downloaded"
