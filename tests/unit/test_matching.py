"""Which model is meant by a name that anybody may claim."""

from __future__ import annotations

from typing import Any

import pytest

from splitnet.errors import ModelNotFound
from splitnet.weights import matching
from splitnet.weights.matching import MAX_MODELS, find_manifest


def test_many_models_of_one_name_are_not_all_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    class Directory:
        def models(self) -> dict[str, str]:
            return {f"{index:064x}": "llama" for index in range(MAX_MODELS + 1)} | {"f" * 64: "other"}

        def peers(self, model: str) -> list[Any]:
            pytest.fail("peers are asked for")

    directory: Any = Directory()
    asking: Any = None
    with pytest.raises(ModelNotFound, match=r"9 models of this swarm are called llama: give --model-id"):
        find_manifest(directory, asking, "llama")
    monkeypatch.setattr(Directory, "peers", lambda self, model: [])
    with pytest.raises(ModelNotFound, match="none answers"):
        find_manifest(directory, asking, "llama", expected="0" * 64)
    monkeypatch.setattr(matching, "MAX_MODELS", 9)
    with pytest.raises(ModelNotFound, match="none answers"):
        find_manifest(directory, asking, "llama")
