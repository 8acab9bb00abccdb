"""The module in place of all blocks of a model, which peers run; this process may run some of them.

New positions of rows with cached keys and values are steps, without gradients. Whole sequences without a cache are
passes: for training, and for logits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, Never, TypeVar

import torch
from torch import nn

from splitnet.blocks.adapters import AdapterTensors, block_of
from splitnet.blocks.block_inputs import PositionInputs
from splitnet.blocks.stand_ins import HandedStates
from splitnet.checkpoint.families import RopeLengths
from splitnet.errors import AdapterError, PeerBusy, SplitnetError, UnsupportedModel
from splitnet.hf.cache import ModelSession, RemoteCache, RemoteLayer
from splitnet.hf.parameters import check_positions, mask_of, rope_length_of, too_long
from splitnet.hf.peft_adapters import LocalAdapters, Prefixes
from splitnet.session.local import Blocks, LocalSpan
from splitnet.session.training import Passed, PassSession
from splitnet.wire.messages import Chunk

Fields = TypeVar("Fields", bound=Any)


@dataclass(frozen=True, slots=True)
class ModelCall:
    """Context of a call of the model, for the blocks.

    keep: number of last positions that the head needs; 0: all. length: length of the whole text, if the call has a
    piece of a text. run: runs the blocks, `[batch, seq, hidden]` in and out. backbone: called in place of the backbone,
    with a function that calls the backbone. seen: called with the features of steps, `[batch, kept, taps * hidden]`,
    or with the outputs of whole sequences.
    """

    keep: int = 0
    prefix: Prefixes = ()
    length: int = 0
    run: Callable[[torch.Tensor], torch.Tensor] | None = None
    backbone: Callable[[Callable[[], Any]], Any] | None = None
    seen: Callable[[torch.Tensor], None] | None = None


class CallArguments(NamedTuple):
    """Arguments of a call of the backbone, for `RemoteBlocks.step`."""

    mask: Any
    positions: Any
    inputs: Sequence[PositionInputs] = ()


class PerThread(threading.local, Generic[Fields]):
    """A frozen dataclass for each thread, with other fields for the time of a call."""

    def __init__(self, initial: Fields) -> None:
        self.now = initial

    @contextmanager
    def within(self, **changes: Any) -> Iterator[None]:
        """Replaces some fields for the time of a call."""
        outer, self.now = self.now, replace(self.now, **changes)
        try:
            yield
        finally:
            self.now = outer


@dataclass(slots=True)
class Exchange:
    """New positions under way through the blocks, and the place of their outputs.

    under_way: the session's requests; None: no position was sent. hidden: inputs, `[batch, seq, hidden]`. new_mask:
    `[batch, seq]`; False is padding. past: columns of the cache before these positions. tapped: after `finish`, if the
    cache has taps: the hidden states at the taps, `[batch, seq, taps * hidden]`, zero where the outputs are zero.
    """

    layer: RemoteLayer
    session: ModelSession
    in_flight: Any
    parts: list[Chunk]
    hidden: torch.Tensor
    new_mask: torch.Tensor
    past: int
    tapped: torch.Tensor | None = None

    def finish(self) -> torch.Tensor:
        """Waits for the outputs, `[batch, seq, hidden]`: zero at padding and at positions that are not kept.

        Raises PeerLost, PeerFailed, PeerBusy, CoverageError: see `Session.step`.
        """
        if self.in_flight is None:
            nothing = torch.zeros_like(self.hidden).repeat(1, 1, len(self.session.taps) + 1)
            return self._with_taps(nothing, self.new_mask)
        began = time.perf_counter()
        returned = self.session.finish(self.in_flight).to(self.hidden.device, self.hidden.dtype)
        self.layer.waited_ms += (time.perf_counter() - began) * 1000
        if len(returned) == self.hidden.shape[0] * self.hidden.shape[1]:
            return self._with_taps(returned.view(*self.hidden.shape[:2], -1), self.new_mask)
        wanted = self.new_mask.clone()
        if any(part.keep != part.length for part in self.parts):
            # Peers return the last `keep` positions of each row, without padding.
            from_right = wanted.flip(1).cumsum(1).flip(1)
            rows = [row for row in range(len(wanted)) if bool(wanted[row].any())]
            for row, part in zip(rows, self.parts, strict=True):
                wanted[row] &= from_right[row] <= part.keep
        output = self.hidden.new_zeros(*self.hidden.shape[:2], returned.shape[1])
        output[wanted.to(self.hidden.device)] = returned
        return self._with_taps(output, wanted)

    def _with_taps(self, states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Splits the outputs from the hidden states at the session's taps, and keeps the latter."""
        if not self.layer.taps:
            return states
        size = self.hidden.shape[2]
        output = states[..., -size:].contiguous()
        known = {0: self.hidden * wanted[..., None].to(self.hidden)}
        known |= zip(self.session.taps, states.split(size, dim=-1), strict=False)
        self.tapped = torch.cat([known.get(tap, output) for tap in self.layer.taps], dim=-1)
        return output

    def features(self, output: torch.Tensor) -> torch.Tensor:
        """The input of a draft head: the hidden states at the taps; without taps, the output of `finish`."""
        return output if self.tapped is None else self.tapped

    def abandon(self) -> None:
        """Gives up the outputs."""
        if self.in_flight is not None:
            self.session.abandon(self.in_flight)

    @contextmanager
    def rewound(self) -> Iterator[None]:
        """Resets the cache for a time to its columns before this exchange, from which transformers counts positions."""
        columns, self.layer.columns = self.layer.columns, self.past
        try:
            yield
        finally:
            self.layer.columns = columns


class RemoteBlocks(nn.Module):
    """All blocks of a model.

    transformers calls this module with hidden states only. Further arguments come from the context, see `calling`.

    stages: see `splitnet.session.local.load_stages`. make_passes: opens the session for passes through remote blocks.
    """

    def __init__(
        self,
        stages: Sequence[LocalSpan | Blocks],
        make_passes: Callable[[Blocks], PassSession],
        max_positions: int | None,
        ropes: RopeLengths,
    ) -> None:
        super().__init__()
        self.adapters = LocalAdapters()
        self.handed: HandedStates | None = None  # what the model hands to blocks besides hidden states
        self.max_positions = max_positions
        self.ropes = ropes
        ends = (stage.end if isinstance(stage, LocalSpan) else stage[1] for stage in stages)
        self.num_blocks = max(ends, default=0)
        self.local_spans = [(stage.start, stage.end) for stage in stages if isinstance(stage, LocalSpan)]
        self._lengths_matter = ropes.frequencies_vary
        self.stages = stages
        self._make_passes = make_passes
        self.passes: dict[Blocks, PassSession] = {}  # by the range of blocks
        self._passing = threading.RLock()
        self._local = PerThread(ModelCall())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Boundary activations in and out, `[batch, seq, hidden]`; see `step` and `run_whole`."""
        run = self.call.run
        assert run is not None, "the backbone calls the blocks"
        return run(hidden)

    def __deepcopy__(self, memo: object) -> Never:
        raise AdapterError(
            "remote blocks cannot be copied, as a copy of the model or LoRA's layer_replication would need: load the "
            "model a second time"
        )

    @property
    def call(self) -> ModelCall:
        """The context of the running thread's call."""
        return self._local.now

    def calling(self, **changes: Any) -> AbstractContextManager[None]:
        """A context manager that replaces fields of `ModelCall` for the running thread."""
        return self._local.within(**changes)

    def begin_step(
        self,
        cache: RemoteCache,
        hidden: torch.Tensor,
        mask: torch.Tensor | None = None,
        keep: int = 0,
        adapter: AdapterTensors | None = None,
        rope_length: int = 0,
        inputs: Sequence[PositionInputs] = (),
    ) -> Exchange:
        """Sends new positions `[batch, seq, hidden]` after the cached positions.

        Without a mask there is no padding, and the outputs equal single steps: if rotary frequencies depend on
        the length, each position has the frequencies of its length.

        mask: `[batch, columns]` bool for past and new columns; False is padding. keep: number of last positions whose
        outputs are needed; 0: all. adapter, rope_length, inputs: those of the positions, if there is a mask; `inputs`
        has one entry for each row, or none.

        Raises:
            ValueError: the cache has taps where the model has no boundary.
            ContextTooLong: the sequence is longer than the model's context.
            PeerLost, PeerFailed, PeerBusy, CoverageError: see `Session.step`.
        """
        layer = cache.remote
        past = layer.columns
        if any(not 0 <= tap <= self.num_blocks for tap in layer.taps):
            raise ValueError(f"hidden states after {layer.taps} blocks of {self.num_blocks} are wanted")
        if mask is None:
            adapter, mask = layer.adapter, torch.ones(len(hidden), past + hidden.shape[1], dtype=torch.bool)
            if (offsets := layer.rotary_offsets) is not None:
                inputs = [PositionInputs(torch.arange(past, mask.shape[1])[:, None] + own) for own in offsets]
        if self.handed is not None:
            inputs = self.handed.with_per_layer(inputs, len(hidden))
        self._check_context(mask.shape[1])
        try:
            session, parts, forks = layer.begin_step(mask, keep, adapter)
            self._note_rope_length(layer, past, rope_length)
            new_mask = mask[:, past:]
            if all(part.length == hidden.shape[1] for part in parts):
                packed = hidden.reshape(-1, hidden.shape[-1])
            else:
                packed = hidden[new_mask.to(hidden.device)]
                inputs = [own.at(kept) for own, kept in zip(inputs, new_mask, strict=False) if bool(kept.any())]
                parts = [part for part in parts if part.length]
            if rope_length and all(
                part.length == 1 and layer.prefix_length + part.start + 1 >= rope_length for part in parts
            ):
                rope_length = 0  # each position has its own length, so a replay may send many positions together
            how: dict[str, Any] = {"rope_length": rope_length, "inputs": inputs}
            under_way = session.begin(packed.detach(), parts, forks, **how) if parts else None
        except BaseException as error:
            layer.columns = past
            if isinstance(error, PeerBusy):
                layer.give_up_room()
            raise
        return Exchange(layer, session, under_way, parts, hidden, new_mask, past)

    def step(
        self,
        cache: RemoteCache,
        hidden: torch.Tensor,
        mask: Any,
        positions: Any,
        call: ModelCall,
        inputs: Sequence[PositionInputs] = (),
    ) -> torch.Tensor:
        """The outputs of new positions, `[batch, seq, hidden]`, without gradients.

        mask, positions: the caller's `attention_mask` and `position_ids`. inputs: as in `begin_step`.

        Raises:
            UnsupportedParameter: the mask or the positions cannot be honoured.
            AdapterError: the adapter does not fit the blocks, or is not the adapter of the cache.
            ContextTooLong, PeerLost, PeerFailed, PeerBusy, CoverageError: see `begin`.
        """
        layer, (batch, new, _), prefix = cache.remote, hidden.shape, call.prefix
        past = layer.columns
        self._check_context(past + new)
        checked = mask_of(mask, batch, past + new)
        before = prefix[0][0].shape[1] if prefix else 0
        check_positions(positions, checked, past, before)
        rope_length = rope_length_of(positions, before + past + new, self.ropes, before + call.length)
        parameters = {} if past else self.adapters.parameters_for(prefix)
        adapter = self.adapters.recent(layer.adapter, prefix) if past else self.adapters.adapter_of(parameters)
        with torch.no_grad():
            exchange = self.begin_step(cache, hidden, checked, call.keep, adapter, rope_length, inputs)
            rotary = [own.positions for own in inputs if own.positions is not None]
            layer.note_rotary(past, torch.stack(rotary) if rotary else None)
            try:
                output = exchange.finish()
            except BaseException:
                layer.columns = past
                raise
        if call.seen is not None:
            call.seen(exchange.features(output)[:, -call.keep :])
        if torch.is_grad_enabled():
            output = _NoBackward.apply(output, hidden, *parameters.values())
            assert isinstance(output, torch.Tensor)
        return output

    def run_whole(self, hidden: torch.Tensor, given: CallArguments, prefix: Prefixes) -> torch.Tensor:
        """The outputs of whole sequences, `[batch, seq, hidden]`: zero at padding, which may be anywhere.

        Gradients go to the input and to the adapter. Arguments and errors as in `step`.
        """
        mask, positions, inputs = given
        batch, new, _ = hidden.shape
        if self.handed is not None and self.handed.per_layer:
            raise UnsupportedModel(
                "blocks of this model have a second input for every token, which passes over whole sequences do not "
                "carry yet: use torch.no_grad(); training needs a model without such inputs"
            )
        self._check_context(new)
        checked = mask_of(mask, batch, new)
        before = prefix[0][0].shape[1] if prefix else 0
        check_positions(positions, checked, 0, before)
        lengths = [int(length) for length in checked.sum(dim=1).tolist() if length]
        if not lengths:
            return torch.zeros_like(hidden)
        rope_length = rope_length_of(positions, before + new, self.ropes)
        parameters = self.adapters.parameters_for(prefix)
        where = checked.to(hidden.device)
        packed = hidden[where]
        inputs = [own.at(kept) for own, kept in zip(inputs, checked, strict=False) if bool(kept.any())]
        for stage in self.stages:
            if isinstance(stage, LocalSpan):
                adapter = stage.fit_adapter(AdapterTensors(parameters)) if parameters else None
                packed = stage.sequences(packed, lengths, adapter, rope_length, inputs)
            else:
                own = {name: tensor for name, tensor in parameters.items() if block_of(name) in range(*stage)}
                how = {"lengths": lengths, "rope_length": rope_length, "inputs": inputs}
                packed = _RemotePass.apply(self, stage, how, tuple(own), packed, *own.values())
                assert isinstance(packed, torch.Tensor)
        output = torch.zeros_like(hidden)
        output[where] = packed.to(hidden.dtype)
        return output

    def close(self) -> None:
        """Frees the peers' memory of passes."""
        with self._passing:
            for passes in self.passes.values():
                passes.close()
            self.passes = {}

    def go(
        self, blocks: Blocks, packed: torch.Tensor, parameters: dict[str, torch.Tensor], **how: Any
    ) -> tuple[torch.Tensor, Passed]:
        """See `PassSession.forward`."""
        with self._passing:
            if blocks not in self.passes:
                self.passes[blocks] = self._make_passes(blocks)
            return self.passes[blocks].forward(packed, adapter=self.adapters.adapter_of(parameters), **how)

    def go_back(
        self, blocks: Blocks, batch: Passed, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `PassSession.backward`."""
        with self._passing:
            if blocks not in self.passes:
                raise SplitnetError("the model was closed before backward(): run it again")
            return self.passes[blocks].backward(batch, gradient)

    def forget_batch(self, blocks: Blocks, batch: Passed) -> None:
        """See `PassSession.forget_batch`."""
        if blocks in self.passes:
            self.passes[blocks].forget_batch(batch)

    def _check_context(self, positions: int) -> None:
        if self.max_positions is not None and positions > self.max_positions:
            raise too_long(positions, self.max_positions)

    def _note_rope_length(self, layer: RemoteLayer, past: int, rope_length: int) -> None:
        """Counts the columns with the rotary frequencies of the whole text."""
        if not past or not self._lengths_matter:
            layer.rope_length, layer.alike = rope_length, layer.columns
        elif layer.alike >= past and rope_length:
            layer.alike = layer.columns if rope_length == layer.rope_length else past
        elif layer.alike >= past:
            layer.alike = min(layer.columns, self.ropes.last(max(layer.rope_length, 1)))


class _NoBackward(torch.autograd.Function):
    """Refuses gradients, because peers record none for cached keys and values."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        raise NotImplementedError("gradients do not go through caches: call the model with use_cache=False to train")


class _RemotePass(torch.autograd.Function):
    """A pass through remote blocks, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        blocks: RemoteBlocks,
        stage: Blocks,
        how: dict[str, Any],
        names: tuple[str, ...],
        packed: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        keep = any(ctx.needs_input_grad)
        by_name = dict(zip(names, parameters, strict=True))
        output, batch = blocks.go(stage, packed.detach(), by_name, keep=keep, **how)
        ctx.names = names
        ctx.devices = [parameter.device for parameter in parameters]  # outlines are always on the CPU
        ctx.batch = _KeptPass(blocks, stage, batch) if keep else None
        return output.to(packed.device, packed.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        kept, (gradient,) = ctx.batch, grad_outputs
        if kept is None or kept.used:
            raise RuntimeError("gradients go back through the peers once: run the model again for another backward()")
        kept.used = True
        by_input, by_name = kept.blocks.go_back(kept.stage, kept.passed, gradient)
        by_input = by_input.to(gradient.device, gradient.dtype)
        by_parameter = (by_name[name].to(device) for name, device in zip(ctx.names, ctx.devices, strict=True))
        return (None, None, None, None, by_input, *by_parameter)


@dataclass(slots=True, eq=False)
class _KeptPass:
    """State of the peers for a backward pass; without a backward pass, its end frees this state."""

    blocks: RemoteBlocks
    stage: Blocks
    passed: Passed
    used: bool = False

    def __del__(self) -> None:
        if not self.used:
            self.blocks.forget_batch(self.stage, self.passed)
