"""A stand-in for the remote model, which `splitnet/serve/generation.py` calls: it has no peers and no weights."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LlamaConfig

from splitnet.errors import SessionClosed
from splitnet.hf.cache import RemoteCache
from splitnet.swarm.swarm import ModelFacts

VOCABULARY, BLOCKS, HIDDEN = 49152, 6, 64


class FakeSession:
    """The tokens that a session holds, and the attributes of a session that metrics read."""

    timings = recoveries = hops = ()
    prefix_hit = reused = 0
    audit = None

    def __init__(self, opened: list[FakeSession]) -> None:
        self.tokens: list[int] = []
        self.passed = 0
        self.traffic = SimpleNamespace(bytes_sent=0, bytes_received=0)
        self.use_namespace = self.reserve = lambda given: None
        self.close = self.close_later = lambda: opened.remove(self) if self in opened else None
        self.links = tuple
        opened.append(self)


class FakeModel:
    """A model whose scores of the next token and hidden states are functions of all tokens before it.

    sessions: the open sessions. may_step: while this event is cleared, no step ends
    but the next `free_steps`.
    """

    headless = False
    auditor = None
    speculator = SimpleNamespace(counts=SimpleNamespace(drafted=0, accepted=0, tokens=0, round_trips=0))
    local_spans = ((0, BLOCKS),)
    device = torch.device("cpu")

    def __init__(self, positions: int = 256) -> None:
        facts = ModelFacts("", "small", BLOCKS, HIDDEN, positions)
        links, events = SimpleNamespace(state=lambda endpoint: None), SimpleNamespace(since=lambda number: [])
        self.swarm = SimpleNamespace(facts=facts, links=links, events=events, start_peer=str, peers=lambda **_: [])
        self.config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=BLOCKS, max_position_embeddings=positions
        )
        self.generation_config = GenerationConfig(eos_token_id=2)
        self.sessions: list[FakeSession] = []
        self.may_step = threading.Event()
        self.may_step.set()
        self.free_steps = 0
        self.ends = SimpleNamespace(head=lambda states: states @ self._head.T)
        self._scores = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1), dtype=torch.float32)

    @cached_property
    def _head(self) -> torch.Tensor:
        return torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(2), dtype=torch.float32)

    def scores(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits `[positions, vocabulary]` after each of these tokens."""
        return torch.stack([self._scores.roll(each) for each in _sums(tokens)])

    def states(self, tokens: Sequence[int]) -> torch.Tensor:
        """States `[positions, hidden]` after the final norm."""
        rows = [np.random.default_rng(each).standard_normal(HIDDEN, np.float32) for each in _sums(tokens)]
        return torch.from_numpy(np.stack(rows))

    def new_cache(self, scope: str = "") -> RemoteCache:
        session: Any = lambda positions: FakeSession(self.sessions)  # noqa: E731
        return RemoteCache(session, scope)

    def can_draft(self, prompt: int, new: int) -> bool:
        return False

    def fitting(self, cache: RemoteCache, length: int) -> int:
        return cache.remote.columns

    def pieces_of(self, length: int) -> Any:
        return nullcontext()

    def states_for_head(self, ids: torch.Tensor, mask: torch.Tensor, cache: RemoteCache, keep: int = 0) -> torch.Tensor:
        self._step(cache, mask.bool())
        states = torch.zeros(*ids.shape, HIDDEN, dtype=torch.float32)
        for row, tokens, wanted in zip(states, ids, mask.bool(), strict=True):
            row[wanted] = self.states(tokens[wanted].tolist())
        return states[:, -keep:]

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, cache: RemoteCache, **options: Any
    ) -> Any:
        """Logits of one row."""
        tokens = [*self._held(cache), *input_ids[0].tolist()]
        self._step(cache, attention_mask.bool())
        self._hold(cache, tokens)
        return SimpleNamespace(
            logits=self.scores(tokens)[None, -(options.get("logits_to_keep") or input_ids.shape[1]) :]
        )

    def generate(
        self,
        input_ids: torch.Tensor,
        cache: RemoteCache,
        max_new_tokens: int,
        logits_processor: Any,
        stopping_criteria: Any,
        **others: Any,
    ) -> torch.Tensor:
        held, ids = self._held(cache), input_ids
        for _token in range(max_new_tokens):
            self._step(cache, torch.ones_like(ids, dtype=torch.bool))
            rows = [[*held, *row[len(held) :]] for row in ids.tolist()]
            self._hold(cache, rows[0])
            scores = torch.stack([self._scores.roll(_sums(row)[-1]) for row in rows])
            for process in logits_processor:
                scores = process(ids, scores)
            ids = torch.cat([ids, scores.argmax(dim=-1, keepdim=True)], dim=1)
            if all(bool(ended(ids, scores).all()) for ended in stopping_criteria):
                break
        return ids

    def _step(self, cache: RemoteCache, mask: torch.Tensor) -> None:
        session: Any
        session, chunks, _ = cache.remote.begin_step(mask, 1)
        session.passed += sum(chunk.length for chunk in chunks)
        session.traffic.bytes_sent += 2 * session.passed
        session.traffic.bytes_received += session.passed
        if not self.may_step.is_set() and self.free_steps:
            self.free_steps -= 1
            return
        while not self.may_step.wait(0.005):
            if cache.remote.closed:
                break
        if cache.remote.closed:
            raise SessionClosed("the session was closed")

    def _held(self, cache: RemoteCache) -> list[int]:
        session: Any = cache.session
        return session.tokens[: cache.remote.columns] if session is not None else []

    def _hold(self, cache: RemoteCache, tokens: list[int]) -> None:
        session: Any = cache.session
        session.tokens = tokens


def _sums(tokens: Sequence[int]) -> list[int]:
    """A checksum of each prefix of a text."""
    sums = [0]
    for token in tokens:
        sums.append(zlib.crc32(token.to_bytes(4, "little"), sums[-1]))
    return sums[1:]
