"""The two ways to run a model that `splitnet bench` compares, a swarm and plain transformers, and the benchmark."""

from __future__ import annotations

import itertools
import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from splitnet.blocks.backbone import load_whole
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.cli.connection import ModelConnection
from splitnet.cli.stage_progress import StageProgress
from splitnet.errors import UnsupportedModel
from splitnet.hf.cache import ModelSession, RemoteCache
from splitnet.hf.causal_lm import RemoteCausalLM, attached
from splitnet.quant.native import path_in_use, prefetch_in_use, processor
from splitnet.tools.bench.report import (
    LOCAL,
    SWARM,
    Arm,
    Case,
    MeasuredTraffic,
    Report,
    ReportedHop,
    ReportedRoute,
    Round,
    TokenTimes,
    check_room,
    measure,
)
from splitnet.version import __version__


class Clock(BaseStreamer):
    """Records the time of each new token, by `time.perf_counter`. after: called with the number of new tokens."""

    def __init__(self, after: Callable[[int], None] | None = None) -> None:
        self.times: list[float] = []
        self._after = after
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:  # transformers passes the prompt first
            self._is_prompt = False
            return
        self.times.append(time.perf_counter())
        if self._after is not None:
            self._after(len(self.times))

    def end(self) -> None:
        pass


def gaps_s(times: Sequence[float]) -> tuple[float, ...]:
    return tuple(late - early for early, late in itertools.pairwise(times))


Result = TypeVar("Result")


class StartGate(threading.Barrier):
    """Opens when all clients wait at it, and records that time, by `time.perf_counter`."""

    def __init__(self, clients: int) -> None:
        self.opened_at = 0.0
        super().__init__(clients, action=self._note_opening)

    def raise_if_broken(self) -> None:
        """Raises threading.BrokenBarrierError, as `wait`, if a client has failed."""
        if self.broken:
            raise threading.BrokenBarrierError

    def _note_opening(self) -> None:
        self.opened_at = time.perf_counter()


def run_together(clients: Sequence[Callable[[], Result]], gate: StartGate) -> list[Result]:
    """The results of clients that run concurrently, each in its own thread. A single client runs in this thread.

    Raises the error of the first client that failed, after the others have ended.
    """
    if len(clients) == 1:
        return [clients[0]()]
    with ThreadPoolExecutor(len(clients), thread_name_prefix="splitnet-bench") as pool:
        running = [pool.submit(client) for client in clients]
        try:
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
        except BaseException:
            gate.abort()
            raise
        if any(each.exception() is not None for each in done):
            gate.abort()
    errors = [error for each in running if (error := each.exception()) is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return [each.result() for each in running]


class SwarmArm:
    """Clients of a swarm, each with its own session and thread; all clients use one model with remote blocks."""

    def __init__(self, model: RemoteCausalLM, seed: int, speculate: Any = None) -> None:
        self._model = model
        self._seed = seed
        self._speculate = speculate

    def run_case(self, case: Case) -> Round:
        """Runs a case once. Raises SplitnetError if the swarm fails."""
        prompts = random_prompts(self._model.config.vocab_size, case, self._seed)
        gate = StartGate(case.clients)
        clients = [_AnswerRun(self._model, prompt, case, gate, self._speculate) for prompt in prompts.split(1)]
        return tuple(run_together([client.answer_all for client in clients], gate))


class LocalArm:
    """Plain transformers in this process; several clients are the rows of one batch.

    The checkpoint is loaded whole, in its stored type. Raises UnsupportedModel if that is not possible.
    """

    def __init__(self, checkpoint: Checkpoint, seed: int, device: str) -> None:
        self._seed = seed
        try:
            self._model = load_whole(checkpoint, checkpoint.dtype).to(device)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            refusal = f"transformers cannot load {checkpoint.name} here ({reason}): leave out --local"
            raise UnsupportedModel(refusal) from error

    def run_case(self, case: Case) -> Round:
        prompts = random_prompts(self._model.config.get_text_config().vocab_size, case, self._seed)
        clock = Clock()
        began = time.perf_counter()
        generate_exactly(self._model, prompts, case.new_tokens, clock)
        return (TokenTimes(clock.times[0] - began, gaps_s(clock.times)),) * case.clients


def random_prompts(vocabulary: int, case: Case, seed: int) -> torch.Tensor:
    """Random token ids `[clients, prompt]`, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (case.clients, case.prompt), generator=generator)


def generate_exactly(model: Any, prompts: torch.Tensor, new_tokens: int, clock: Clock, **options: Any) -> None:
    """Greedy decoding of exactly `new_tokens` tokens after prompts `[rows, seq]`, past any end token."""
    prompts = prompts.to(model.device)
    model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new_tokens,
        # `min_new_tokens` would also suppress end tokens, but takes a pass over the vocabulary for every token.
        eos_token_id=None,
        pad_token_id=0,
        do_sample=False,
        temperature=None,
        top_p=None,
        use_cache=True,
        streamer=clock,
        **options,
    )


@dataclass
class _AnswerRun:
    """One answer through the swarm."""

    model: RemoteCausalLM
    prompt: torch.Tensor
    case: Case
    gate: StartGate
    speculate: Any

    def __post_init__(self) -> None:
        self._cache: RemoteCache = self.model.new_cache()
        self._bytes_before = (0, 0)

    def answer_all(self) -> TokenTimes:
        self._cache.remote.reserve(self.case.positions)
        clock = Clock(self._after_token)
        began = time.perf_counter()
        try:
            options = {"cache": self._cache, "speculate": self.speculate}
            generate_exactly(self.model, self.prompt, self.case.new_tokens, clock, **options)
            gaps = gaps_s([self.gate.opened_at, *clock.times[1:]])
            assert self._cache.session is not None
            return TokenTimes(clock.times[0] - began, gaps, self._traffic(self._cache.session))
        finally:
            self._cache.close()

    def _after_token(self, count: int) -> None:
        if count > 1:
            self.gate.raise_if_broken()
            return
        assert self._cache.session is not None
        if self.case.decodes:  # the prompt is not measured
            traffic = self._cache.session.traffic
            self._bytes_before = traffic.bytes_sent, traffic.bytes_received
        self.gate.wait()

    def _traffic(self, session: ModelSession) -> MeasuredTraffic:
        sent, received = self._bytes_before
        return MeasuredTraffic(
            sent_bytes=session.traffic.bytes_sent - sent,
            received_bytes=session.traffic.bytes_received - received,
            positions=session.traffic.positions,
            repairs=len(session.recoveries),
            route=route_of(session),
            joules_per_token=self._joules(session),
        )

    def _joules(self, session: ModelSession) -> float | None:
        joules = self.model.swarm.planner.token_joules([hop.planned for hop in session.hops])
        known = [each for each in joules if each is not None]
        return sum(known) if known and len(known) == len(joules) else None


def route_of(session: ModelSession) -> ReportedRoute:
    records = [(hop.blocks, hop.planned.record) for hop in session.hops]
    hops = (
        ReportedHop(start, end, record.key.text, record.address, record.device, record.dtype)
        for (start, end), record in records
    )
    return ReportedRoute(tuple(hops), tuple(session.links()))


@dataclass(frozen=True)
class Benchmark:
    """One call of the command; see its options."""

    cases: Sequence[Case]
    rounds: int
    warm_up: int
    seed: int
    threads: int | None
    local: bool
    speculate: Any = None  # source of drafts, see `RemoteCausalLM.generate`

    def run(self, connection: ModelConnection) -> Report:
        """Measures all cases. With `local` and without an address of a swarm, measures only plain transformers.

        Raises ContextTooLong if the model has no room for a case, and another SplitnetError for other problems.
        """
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        checkpoint = connection.checkpoint()
        check_room(self.cases, checkpoint.max_positions)
        arms: dict[str, Arm] = {}
        with ExitStack() as at_end, StageProgress() as progress:
            if self._measures_swarm(connection):
                swarm = connection.swarm(checkpoint)
                at_end.callback(swarm.close)
                model = attached(checkpoint, swarm, connection.options, self.speculate)
                arms[SWARM] = SwarmArm(model, self.seed, self.speculate)
            if self.local:
                progress.update(f"loading {checkpoint.name} for --local", 0, 0)
                arms[LOCAL] = LocalArm(checkpoint, self.seed, connection.options.device)
            measured = measure(arms, self.cases, rounds=self.rounds, warm_up=self.warm_up, progress=progress.update)
        return Report(checkpoint.name, self._settings(connection), environment(), measured)

    def _measures_swarm(self, connection: ModelConnection) -> bool:
        return bool(connection.requested.initial_peers or connection.requested.invite) or not self.local

    def _settings(self, connection: ModelConnection) -> dict[str, Any]:
        options = connection.options
        settings: dict[str, Any] = {"rounds": self.rounds, "warm_up": self.warm_up, "seed": self.seed}
        settings["device"] = options.device
        if self._measures_swarm(connection):
            settings |= {
                "codec": options.codec,
                "join": list(connection.requested.initial_peers),
                "prefer": options.prefer,
            }
        if options.local_blocks is not None or options.local_weights is not None:
            settings |= {"local_blocks": options.local_blocks, "local_weights": options.local_weights}
        return settings


def environment() -> dict[str, Any]:
    """The environment of this process; the environment of peers is unknown."""
    return {
        "splitnet": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "kernels": path_in_use(),
        "prefetch": str(prefetch_in_use()),
    }
