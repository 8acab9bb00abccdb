"""docs/models.md lists the models that the tests run."""

from __future__ import annotations

from pathlib import Path

from tests.models_page import with_tables

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def test_the_page_of_models_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_tables(text), "run: python -m tests.models_page docs/models.md"
