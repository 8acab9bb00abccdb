"""Jobs of libraries on texts and images of strangers, with bounds of time and memory; `bounded.py` starts this program.

    python -P bounded_program.py JOB

Reads frames from stdin: 8 bytes with the length, then JSON, and, behind a zero byte, bytes beside the JSON. The first
frame is the setup of the job; its answer, an empty frame, says that the process is ready. Each further frame is a
question; the answer on stdout is `[answer, error]`, with null for the answer or the error. Where the system can fork,
each question runs in a child process, so that exceeded bounds end one question only. The program does not import
splitnet.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO

LENGTH_BYTES = 8
BESIDE = b"\0"  # separates the JSON of a frame from bytes beside it; JSON has no zero bytes
STACK_BYTES = 4 << 20  # Stack of the thread that does the jobs: half of the usual stack of a thread
NICENESS = 10  # lower priority, so that steps of answers run first

BOUNDS = {"template": (10, 512 << 20), "grammar": (1, 128 << 20), "image": (10, 1 << 30)}
"""Seconds of processor time, and bytes of memory in addition to the setup, for a question of each job."""

GRAMMAR_LIMITS: dict[str, Any] = {"max_lexer_states": 2**15, "verbose_errors": False}
"""Limits of llguidance for an answer that differ from its defaults; a state takes up to 2 kB."""

MOST_PIXELS = 50_000_000  # Pixels of the largest image that is read
MOST_TIMES = 100  # Longest side of an image, in shortest sides: some models scale the shortest side to a fixed length

FIRST_TOKENS = 8  # Tokens of an answer with which a grammar is tried

_GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # transformers' tag around answers in a template

Job = Callable[[Any], Any]  # the answer to a question, or a tuple with bytes beside it; raises errors for the fault


def templates(_setup: None) -> Job:
    """Renders chat templates; the answer to a question without messages is the list of the template's variables."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def answer(question: dict[str, Any]) -> str | list[str]:
        if "messages" not in question:
            return _variables(question["template"])
        texts, _ = render_jinja_template(
            conversations=[question["messages"]],
            tools=question["tools"],
            chat_template=question["template"],
            add_generation_prompt=question["answer"],
            **question["variables"],
        )
        return texts[0]

    return answer


def _variables(template: str) -> list[str]:
    """The variables that a template reads and no loop of the template sets; jinja2 computes constants to find them."""
    from jinja2 import Environment, nodes
    from jinja2.meta import find_undeclared_variables

    syntax = Environment(extensions=["jinja2.ext.loopcontrols"])
    parsed = syntax.parse(_GENERATION_TAG.sub("", template))
    names = (name for loop in parsed.find_all(nodes.For) for name in loop.find_all(nodes.Name))
    used = find_undeclared_variables(parsed) - {name.name for name in names if name.ctx == "store"}
    return sorted(used - {*syntax.globals, "messages", "raise_exception", "strftime_now"})


def grammars(setup: dict[str, Any]) -> Job:
    """Checks a grammar (llguidance's Lark): compiles it, and takes the first tokens of an answer."""
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    tokens = LLTokenizer(setup["tokenizer"], n_vocab=setup["vocabulary"], eos_token=setup["end_tokens"])

    def answer(grammar: str) -> None:
        matcher = LLMatcher(tokens, grammar, log_level=0, limits=LLParserLimits(**GRAMMAR_LIMITS))
        for _ in range(FIRST_TOKENS):
            if matcher.is_stopped():
                break
            mask = matcher.compute_bitmask()
            lowest = next((8 * at + (byte & -byte).bit_length() - 1 for at, byte in enumerate(mask) if byte), None)
            forced = matcher.compute_ff_tokens()
            matcher.consume_tokens(forced or ([] if lowest is None else [lowest]))
        if matcher.is_error():
            raise ValueError(matcher.get_error())

    return answer


def images(_setup: None) -> Job:
    """Reads images in base64 as browsers show them. The answer: width and height, and the RGB values beside it."""
    from base64 import b64decode
    from io import BytesIO

    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None  # refused below, with the number

    def answer(question: dict[str, Any]) -> tuple[tuple[int, int], bytes]:
        try:
            data = b64decode(b"".join(question.get("data", b"").split()), validate=True)
        except ValueError:
            raise ValueError("it is not valid base64") from None
        try:
            image: Any = Image.open(BytesIO(data), formats=("PNG", "JPEG", "WEBP", "GIF"))
        except UnidentifiedImageError:
            raise ValueError("it is not a PNG, JPEG, WebP or GIF image, or its beginning is damaged") from None
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise ValueError(f"it has {width} x {height} pixels, and at most {MOST_PIXELS} are read")
        if max(width, height) > MOST_TIMES * min(width, height):
            raise ValueError(f"it has {width} x {height} pixels: one side is more than {MOST_TIMES} times the other")
        if getattr(image, "is_animated", False) and image.format != "MPO":  # phones write photos with previews as MPO
            raise ValueError("it is animated, and only still images are read")
        shrink = min(1.0, (question["most"] / (width * height)) ** 0.5)
        if shrink < 1:
            image.draft(None, (int(width * shrink), int(height * shrink)))  # a JPEG is read at a part of its size
        try:
            image.load()
        except (OSError, SyntaxError, EOFError) as error:
            raise ValueError(f"it is damaged ({error})") from None
        with suppress(Exception):  # as in browsers, invalid EXIF data does not turn an image
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image, seen = image.convert("RGBA"), Image.new("RGB", image.size, "white")
            seen.paste(image, mask=image.getchannel("A"))
            image = seen
        image = image.convert("RGB")
        shrink = min(1.0, (question["most"] / (image.width * image.height)) ** 0.5)
        if shrink < 1:
            image = image.resize([max(1, int(side * shrink)) for side in image.size])
        return image.size, image.tobytes()

    return answer


JOBS: dict[str, Callable[[Any], Job]] = {"template": templates, "grammar": grammars, "image": images}


def main(name: str) -> None:
    given, told = sys.stdin.buffer, sys.stdout.buffer
    with suppress(AttributeError, OSError):  # Windows
        os.nice(NICENESS)
    job = JOBS[name](json.loads(_read(given).partition(BESIDE)[0]))
    seconds, memory = BOUNDS[name]
    _write(told, b"")

    def answered(question: bytes) -> bytes:
        _bound(seconds, memory)
        asked, _, data = question.partition(BESIDE)
        beside = b""
        try:
            given = json.loads(asked)
            answer = [job(given | {"data": data} if data else given), None]
            if isinstance(answer[0], tuple):
                answer[0], beside = answer[0]
        except MemoryError:
            answer = [None, too_much(name)]
        except Exception as error:
            answer = [None, str(error) or type(error).__name__]
        return json.dumps(answer).encode() + BESIDE + beside

    while question := _read(given):
        if hasattr(os, "fork"):
            _write(told, _forked(lambda asked=question: answered(asked)) or json.dumps([None, too_much(name)]).encode())
        else:
            _write(told, answered(question))


def too_much(name: str) -> str:
    """The error of a question that exceeds the bounds of its job."""
    seconds, memory = BOUNDS[name]
    return f"it takes more than {seconds} s or {memory >> 20} MiB"


def _forked(work: Callable[[], bytes]) -> bytes | None:
    """The result of `work`, which runs in a child process; None: the child was killed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with open(write, "wb") as made:
                made.write(work())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(write)
    with open(read, "rb") as made:
        answer = made.read()
    return answer if os.waitpid(child, 0)[1] == 0 else None


def _read(given: BinaryIO) -> bytes:
    return given.read(int.from_bytes(given.read(LENGTH_BYTES), "big"))


def _write(told: BinaryIO, data: bytes) -> None:
    told.write(len(data).to_bytes(LENGTH_BYTES, "big") + data)
    told.flush()


def _bound(seconds: int, memory: int) -> None:
    """Bounds this process itself: the asking process, which kills it in time, may have been killed."""
    with suppress(ImportError, ValueError, OSError):  # Windows, or a system without these limits
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + 1 + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        with open("/proc/self/statm", encoding="ascii") as statm:
            taken = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + memory, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    threading.stack_size(STACK_BYTES)
    worker = threading.Thread(target=main, args=sys.argv[1:])
    worker.start()
    worker.join()
