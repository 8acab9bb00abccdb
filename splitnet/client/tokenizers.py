"""Tokenizers for who uses splitnet from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from splitnet.model.gguf_store import GgufStore


class AutoTokenizer:
    """transformers' `AutoTokenizer`, which takes the path of a GGUF file as well."""

    @staticmethod
    def from_pretrained(model: str | Path, **options: Any) -> Any:
        """Loads a tokenizer.

        Args:
            model: GGUF file, folder or Hugging Face id.
            options: of transformers.

        Raises:
            OSError, ValueError: there is none.
            ModelNotFound: likewise, of a GGUF file.
        """
        if str(model).endswith(".gguf"):
            return GgufStore.open(model).tokenizer(**options)
        # Left to itself, transformers asks the user whether code of the checkpoint may run.
        return transformers.AutoTokenizer.from_pretrained(model, **{"trust_remote_code": False} | options)
