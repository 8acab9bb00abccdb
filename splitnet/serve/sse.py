"""Server-sent events as OpenAI's clients read them: one JSON document per event, then `[DONE]`."""

from __future__ import annotations

import json
from typing import Any

DONE = "data: [DONE]\n\n"


def framed(document: dict[str, Any]) -> str:
    """One event; JSON has no line breaks of its own, so one line is enough."""
    return f"data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n"
