"""Renders chat templates, which are programs of strangers: a process of its own, see `checkpoint/chat_template.py`.

Says that it is ready by an empty frame; then reads frames (8 bytes with the length, then JSON) from stdin and answers
each on stdout with `[answer, error]`, one of which is null: a text, or of a template without messages its variables. It
has to run without splitnet's modules.
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import suppress
from typing import Any, BinaryIO

LENGTH_BYTES = 8
MEMORY_BYTES = 512 << 20  # that templates may take
RENDER_S = 10  # of processor time for one

_GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # transformers' own, around the answers in a template


def main() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    _bound_memory()
    given, told = sys.stdin.buffer, sys.stdout.buffer
    _write(told, b"")
    while head := given.read(LENGTH_BYTES):
        question: dict[str, Any] = json.loads(given.read(int.from_bytes(head, "big")))
        _bound_time()
        try:
            if "messages" not in question:
                answer = [_variables(question["template"]), None]
            else:
                texts, _ = render_jinja_template(
                    conversations=[question["messages"]],
                    tools=question["tools"],
                    chat_template=question["template"],
                    add_generation_prompt=question["answer"],
                    **question["variables"],
                )
                answer = [texts[0], None]
        except MemoryError:
            answer = [None, f"it takes more than {MEMORY_BYTES >> 20} MiB"]
        except Exception as error:
            answer = [None, str(error) or type(error).__name__]
        _write(told, json.dumps(answer).encode())


def _variables(template: str) -> list[str]:
    """Those that it uses and does not set, in a loop at least; jinja2 computes constants to find them."""
    from jinja2 import Environment, nodes
    from jinja2.meta import find_undeclared_variables

    syntax = Environment(extensions=["jinja2.ext.loopcontrols"])
    parsed = syntax.parse(_GENERATION_TAG.sub("", template))
    names = (name for loop in parsed.find_all(nodes.For) for name in loop.find_all(nodes.Name))
    used = find_undeclared_variables(parsed) - {name.name for name in names if name.ctx == "store"}
    return sorted(used - {*syntax.globals, "messages", "raise_exception", "strftime_now"})


def _write(told: BinaryIO, data: bytes) -> None:
    told.write(len(data).to_bytes(LENGTH_BYTES, "big") + data)
    told.flush()


def _bound_memory() -> None:
    with suppress(ImportError, ValueError, OSError):  # Windows; a system that does not bound it
        import resource

        with open("/proc/self/statm", encoding="ascii") as statm:
            taken = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _bound_time() -> None:
    """Who started this process ends it in time, unless it has been killed itself."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + 1 + RENDER_S
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
    main()
