"""A model that loads and trains quickly."""

from __future__ import annotations

from pathlib import Path

from splitnet.checkpoint.checkpoint import Checkpoint
from tests.unit.random_models import random_checkpoint


def small_model(folder: Path, tokenizer_of: Path, seed: int) -> Path:
    """Six random blocks with the demo model's tokenizer: every text is an answer."""
    random_checkpoint("llama", folder, blocks=6, vocab=49152, seed=seed)
    Checkpoint.open(tokenizer_of).tokenizer().save_pretrained(folder)
    return folder
