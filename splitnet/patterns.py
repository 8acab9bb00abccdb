"""Regular expressions that stand in files of others: some are made to be matched without end."""

from __future__ import annotations

import re
import time
from typing import Any

from splitnet.errors import UnsupportedModel

ONE_S = 0.5
"""For one match; those of names take microseconds."""
ALL_S = 10.0
"""For what all matches of one `Patterns` take beyond `FREE_S` each, of the time of a processor."""
FREE_S = 0.001
"""For one match in any case: a large model has a million, and other processes may run meanwhile."""
_LONGEST = 1000
_KNOWN = re.compile(
    r"(?:[\w/ ,:-]|\.|\\[.bdDwWsS/_-]|\[\^?(?:[\w./-]|\\[.dDwWsS_-])+\]|\((?:\?[:!=]|(?!\?))|[)|^$*+?]"
    r"|(?<=[\w.\]])\{\d{1,2}(?:,\d{0,2})?\})*"
)
"""What patterns of names consist of: no repeats of groups that are counted, for which an engine may take any memory,
and no references. It has one way to read each text, so it takes no time itself."""


class Patterns:
    """Matches patterns of one file, for no longer than `ONE_S` each and `ALL_S` in all.

    Args:
        source: what the patterns are in, for messages.
        fix: what to do if one cannot be used.
    """

    def __init__(self, source: str, fix: str = "take another checkpoint of this model") -> None:
        self._source = source
        self._fix = fix
        self._left = ALL_S
        self._compiled: dict[str, Any] = {}

    def match(self, pattern: str, text: str) -> bool:
        """Whether a text begins with what a pattern describes, as `re.match` says it.

        Raises:
            UnsupportedModel: it is no pattern of names, or it takes too long.
        """
        import regex  # unlike `re` it can be told to stop

        begin = time.thread_time()
        try:
            if pattern not in self._compiled:
                if len(pattern) > _LONGEST or not _KNOWN.fullmatch(pattern):
                    raise ValueError("it is longer than such patterns are, or has more in it")
                self._compiled[pattern] = regex.compile(pattern)
            return self._compiled[pattern].match(text, timeout=max(FREE_S, min(ONE_S, self._left))) is not None
        except TimeoutError:
            raise UnsupportedModel(
                f"the pattern {pattern!r} in {self._source} takes too long to match: {self._fix}"
            ) from None
        except (regex.error, ValueError, RecursionError) as error:
            raise UnsupportedModel(
                f"{pattern[:100]!r} in {self._source} is no pattern of names ({error}): {self._fix}"
            ) from None
        finally:
            self._left -= max(0.0, time.thread_time() - begin - FREE_S)
