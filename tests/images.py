"""Files of images for tests."""

from __future__ import annotations

import base64
import struct
import zlib
from io import BytesIO
from typing import Any

from PIL import Image


def as_base64(image: Any, kind: str = "PNG", **options: Any) -> str:
    """The file of one of Pillow's images."""
    file = BytesIO()
    image.save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()


def of_one_colour(colour: str = "red", size: tuple[int, int] = (28, 28)) -> str:
    return as_base64(Image.new("RGB", size, colour))


def huge_png(width: int, height: int) -> str:
    """A PNG of one colour, which takes a byte for some hundreds of its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(1), bytes(1 + width)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return base64.b64encode(png).decode()


def hostile_images() -> dict[str, tuple[str, str]]:
    """Images that must be refused, in base64, by name, each with a part of the error."""
    noise = Image.effect_noise((200, 200), 50)
    cut = base64.b64decode(as_base64(noise, "JPEG"))
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    told = {"PNG": "it is not a PNG, JPEG, WebP or GIF image"}
    files: dict[str, tuple[bytes | str, str]] = {
        "bomb": (huge_png(30_000, 30_000), "it has 30000 x 30000 pixels, and at most 50000000 are read"),
        "100 MP": (huge_png(10_000, 10_001), "it has 10000 x 10001 pixels"),
        "strip": (huge_png(5000, 2), "it has 5000 x 2 pixels: one side is more than 100 times the other"),
        "truncated JPEG": (cut[: len(cut) // 2], "it is damaged"),
        "truncated PNG": (base64.b64decode(as_base64(noise))[:3000], "it is damaged"),
        "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", told["PNG"]),
        "HTML": (b"<!doctype html><script>alert(1)</script>", told["PNG"]),
        "TIFF": (as_base64(noise, "TIFF"), told["PNG"]),
        "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", told["PNG"]),
        "empty": (b"", told["PNG"]),
        "animated GIF": (as_base64(frames[0], "GIF", save_all=True, append_images=frames[1:]), "it is animated"),
        "animated WebP": (as_base64(frames[0], "WEBP", save_all=True, append_images=frames[1:]), "it is animated"),
        "no base64": ("!!!!", "it is not valid base64"),
    }
    return {
        name: (data if isinstance(data, str) else base64.b64encode(data).decode(), says)
        for name, (data, says) in files.items()
    }
