"""Contents of messages: one text, or parts in the form that chat templates expect, if there are images.

The part of an image is `{"type": "image", "data": BASE64}`, or has the key `url` if the image must be fetched; chat
templates get `{"type": "image"}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from splitnet.images import DATA_URL, image
from splitnet.serve.failures import ApiError

Part = str | dict[str, Any]


def image_at(url: str, param: str) -> dict[str, Any]:
    """The part of an image at a data URL, or at a URL of http or https. Raises ApiError for other URLs."""
    if begin := DATA_URL.match(url):
        return image(url[begin.end() :])
    if url[:8].lower().startswith(("http://", "https://")):
        return {"type": "image", "url": url}
    fix = "send a data URL such as data:image/png;base64,... with a PNG, JPEG, WebP or GIF image"
    raise ApiError(400, f"images are data URLs: {fix}", param=param)


def content_of(parts: Sequence[Part], role: str, between: str = "", param: str = "messages") -> Any:
    """The content of a message of texts and images; texts without an image between them are joined by `between`.

    Raises ApiError for images of a role that shows none to models.
    """
    joined: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, dict):
            joined.append(part)
        elif joined and joined[-1]["type"] == "text":
            joined[-1]["text"] += f"{between}{part}"
        else:
            joined.append({"type": "text", "text": part})
    if all(part["type"] == "text" for part in joined):
        return "".join(part["text"] for part in joined)
    if role not in ("user", "tool"):
        raise ApiError(400, f"a message of the {role} has an image: send it in a message of the user", param=param)
    return joined
