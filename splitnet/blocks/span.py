"""Blocks `[start, end)` of a model: the model's backbone in transformers, cut down to these blocks.

The family's own code runs the blocks: rotary embeddings, grouped heads, experts, soft caps and so on. The modules
before and after the blocks are made neutral, and only the tensors of the blocks are read.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from splitnet.blocks.adapters import PREFIX_KEYS, PREFIX_VALUES, AdapterTensors, SpanAdapters, applying
from splitnet.blocks.attention import (
    GROUPED,
    PACKED,
    PackedPass,
    RowChunk,
    positions_at_once,
    rotary_positions_of,
    running,
)
from splitnet.blocks.backbone import (
    cut_to_blocks,
    find_container,
    load_cut,
    parent_of,
    share_blocks,
    with_coded_experts,
)
from splitnet.blocks.block_inputs import PositionInputs
from splitnet.blocks.block_sizes import block_bytes, block_sizes, weights_of
from splitnet.blocks.client_part import check_neutral
from splitnet.blocks.fast.graph_step import GraphStep, with_recordings
from splitnet.blocks.fast.native_step import MOST_IN_STEPS, MOST_OF_EACH, MOST_POSITIONS, NativeStep, steps_of
from splitnet.blocks.fast.torch_step import TorchStep
from splitnet.blocks.kv_cache import (
    MAX_LIVE_STATES,
    OneSequence,
    PassThrough,
    SequenceCache,
    SequenceStates,
    TracedSequence,
)
from splitnet.blocks.kv_form import AUTO as AS_COMPUTED
from splitnet.blocks.kv_form import RING, SINKS, WINDOW, KVForm
from splitnet.blocks.rotary import LengthDependentRopes, axes_of
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.families import (
    NEUTRAL_CONFIG,
    PER_LAYER_INPUT,
    backbone_class,
    check_cut,
    family_of,
    keeps_states,
    packs_sequences,
    per_layer_size,
    rope_with_axes,
    score_heads,
    sliding_windows,
    states_per_block,
    why_no_prefix,
)
from splitnet.errors import AdapterError, PeerBusy, UnsupportedModel, WeightsError
from splitnet.quant.choose import AUTO, STORED, WeightChoice, name_of
from splitnet.quant.device import free_memory, guarded, move_to_large_pages, to_device
from splitnet.quant.experts import prove_grouped_product
from splitnet.quant.gpu import use_device_kernels
from splitnet.quant.linear import hold_weights

__all__ = ["RowChunk", "Span", "block_bytes", "free_memory"]

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # types and shapes of tensors, by name
FastStep = TorchStep | GraphStep | NativeStep

LEAN_PROMPT, LEAN_TRIALS = 5, 3
LEAN_TOLERANCE, LEAN_TOLERANCE_HALF = 0.02, 0.3
"""Tolerances relative to the norm of the difference between the output and the input of the blocks. The second is for
half precision, whose rounding errors grow on noise through many blocks. A block of another structure differs by about
the whole norm."""

LEAN_TOLERANCE_ALONE, LEAN_ROUNDING_ALONE = 0.04, 2.0**-8
"""Tolerances for one block alone in half precision, relative to the difference between output and input, and to the
input. Each block is also tried alone, because 30 % for all blocks together would accept some wrong blocks."""

# Maximum positions that run again in the same pass as new positions. More positions run in a separate pass, so that the
# states after that pass are kept.
MERGED_POSITIONS = 8
TRIALS = 3  # timed runs of each of two ways to run a pass; the runs of the two ways alternate
PASS_POSITIONS = 512  # positions per pass, for positions that run again and for whole sequences
# Maximum length of a sequence with gradients, in multiples of the positions whose attention scores fit in memory, for
# families that run sequence by sequence.
BACKWARD_FACTOR = 8


class Span:
    """Blocks `[start, end)` on one device, see `load`. Use a span, with all its views, from one thread at a time.

    Attributes:
        hidden_size: values per position of a boundary activation.
        kv_bytes_per_position: bytes that one position of one row takes in all blocks of the span.
        state_bytes: bytes of one row that do not depend on its length, for states and copies of them.
        row_bytes: `state_bytes`, and the bytes of positions that are held in full besides their codes.
        rotary_axes: most axes of a rotary position.
        joins_positions: whether positions can attend to later ones of their group, and states be added.
        per_layer_size: values per position of an input that each block has of its own; 0: there is none.
    """

    _lean: FastStep | None = None

    def __init__(
        self,
        backbone: PreTrainedModel,
        container: str,
        start: int,
        end: int,
        *,
        weights: WeightChoice,
        windows: Sequence[int | None],
        packs: bool,
        whole: Span | None = None,
        kv: str = AS_COMPUTED,
    ) -> None:
        self.start = start
        self.end = end
        self._whole = whole or self  # the span that a view belongs to, which numbers its blocks
        self._backbone = backbone
        self._container = container
        self._windows = windows
        self._packs = packs
        self._sdpa = bool(getattr(backbone, "_supports_sdpa", False))
        self._keeps_states = keeps_states(backbone.config)
        self._one_by_one = family_of(backbone.config).one_by_one
        self._score_heads = score_heads(backbone)
        self._nothing_cached = PassThrough()
        self._ropes: LengthDependentRopes = whole._ropes if whole else LengthDependentRopes(backbone)
        parent, name = parent_of(backbone, container)
        blocks: nn.ModuleList = getattr(parent, name)
        self._blocks = blocks
        self._steps_are_faster: dict[int, bool] = whole._steps_are_faster if whole else {}
        self._tapped: dict[int, Tensor] = {}  # during a pass: the last output of tapped blocks, by boundary
        self._adapters: SpanAdapters = whole._adapters if whole else SpanAdapters(blocks, start)
        self.device = next(backbone.parameters()).device
        self.weights = weights
        self.dtype = weights.dtype  # not the dtype of a parameter, because some families keep norms in float32
        self.hidden_size: int = backbone.config.hidden_size
        self.per_layer_size = per_layer_size(backbone.config)
        self.weight_bytes = sum(tensor.nbytes for tensor in (*backbone.parameters(), *backbone.buffers()))
        # Latents, from which keys and values are computed, are few numbers already.
        latents = not packs and getattr(backbone.config, "kv_lora_rank", None)
        form = KVForm.of(kv, self.dtype)
        self._kv_form: KVForm | None = None
        self.kv_bytes_per_position, self.state_bytes = self._probe()
        self.row_bytes = self.state_bytes
        if form is not None and not latents:
            self._hold_as(form)
        rope: Any = getattr(parent, "rotary_emb", None)
        self.rotary_axes: int = whole.rotary_axes if whole else axes_of(rope, self.hidden_size)
        self.joins_positions = packs
        self._lean = self._fast_step(list(blocks), rope)

    @classmethod
    @torch.inference_mode(False)  # the span is also used outside inference mode
    def load(
        cls,
        checkpoint: Checkpoint,
        start: int,
        end: int,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str | None = None,
        weights: str | None = None,
        kv: str = AS_COMPUTED,
        progress: Callable[[int, int], None] | None = None,
    ) -> Span:
        """Reads the weights of blocks `[start, end)`, and no others.

        Args:
            dtype: the type that the blocks compute in, such as "bfloat16"; None: the type that suits `weights`, or else
                the type in which the weights are stored.
            weights: the weight format of linear layers, see `splitnet.quant.choose`; None: as `dtype`, or in the codes
                of the checkpoint.
            kv: the format of keys and values, see `splitnet.blocks.kv_form`; latents, states and keys of indexers keep
                the type in which they are computed.
            progress: called with (bytes read, bytes to read).

        Raises:
            ValueError: the model has no such blocks.
            UnsupportedModel: its blocks cannot run on their own.
            WeightsError: its weights cannot be held in this format.
            OutOfMemory: the blocks do not fit; the message says how many would fit.
        """
        if not 0 <= start < end <= checkpoint.num_blocks:
            raise ValueError(f"blocks {start}:{end} are not within 0:{checkpoint.num_blocks}")
        check_cut(checkpoint.config, start, end)
        chosen = weights_of(checkpoint, weights, dtype, device)
        config = copy.deepcopy(checkpoint.config)
        for key, value in NEUTRAL_CONFIG.items():
            if hasattr(config, key):
                setattr(config, key, value)
        model_class = backbone_class(config)
        container = find_container(model_class, config)
        packs = packs_sequences(config)
        wanted = chosen.dtype
        names = {
            f"{container}.{index - start}.{tensor.rest}": tensor.name
            for index in range(start, end)
            for tensor in checkpoint.block_tensors[index]
        }

        def cut(backbone: PreTrainedModel) -> None:
            cut_to_blocks(backbone, container, start, end)
            for block in backbone.get_submodule(container).children():
                hold_weights(block, chosen)

        sizes = block_sizes(checkpoint, chosen, range(start, end))
        if chosen.forms and not any(size.converted for size in sizes):
            if weights != AUTO:
                raise WeightsError(
                    f"the blocks {start}..{end - 1} of {checkpoint.name} have no linear layers that can be held as "
                    f"{chosen.kind}: use --weights {name_of(wanted)}"
                )
            chosen = chosen.plain()
        if chosen.as_stored and any(size.coded for size in sizes):
            converts = chosen.forms and any(size.converted for size in sizes)
            chosen = replace(chosen, kind=f"{STORED}+{chosen.kind}" if converts else STORED)
        largest = max(size.held for size in sizes)
        grouped = keeps_states(config) and getattr(model_class, "_supports_sdpa", False)
        attention = PACKED if packs else GROUPED if grouped else None
        with guarded(checkpoint.name, start, end, largest, torch.device(device)):
            with checkpoint.store.load_tensors(names, wanted, progress) as tensors:
                tensors = with_coded_experts(tensors, checkpoint, model_class, container, range(start, end), chosen)
                backbone = load_cut(
                    model_class,
                    config,
                    cut,
                    tensors,
                    wanted,
                    attention,
                    names=names,
                    one_by_one=bool(chosen.forms),
                    codes_on=chosen.device if chosen.keeps_codes else None,
                )
            chosen = chosen.as_loaded(getattr(module, "held", None) for module in backbone.modules())
            parent: Any = parent_of(backbone, container)[0]
            if (rope := rope_with_axes(checkpoint.store.config, parent)) is not None:
                parent.rotary_emb = rope
            nn.Module.to(backbone, device).requires_grad_(False)
            for block in backbone.get_submodule(container).children():
                move_to_large_pages(block)
            use_device_kernels(backbone, wanted)
            prove_grouped_product(backbone)
            check_neutral(backbone, container, wanted)
            windows = sliding_windows(checkpoint.config)[start:end]
            return cls(backbone, container, start, end, weights=chosen, windows=windows, packs=packs, kv=kv)

    def new_row(
        self, room: int | None = None, adapter: AdapterTensors | None = None, *, exact: bool = False
    ) -> SequenceCache:
        """The empty cache of one sequence in the blocks, with the prefix of an adapter if it has one. `room`: positions
        that memory is allocated for; None: capacities double. `exact`: keys and values keep the type in which they are
        computed."""
        states = SequenceStates(states_per_block(self._backbone.config)) if self._keeps_states else None
        form = None if exact else self._kv_form
        return SequenceCache(room, self._adapters.prefix_of(adapter, self.start, self.end), states, form)

    @property
    def block_modules(self) -> nn.ModuleList:
        """The modules of the blocks, in order."""
        return self._blocks

    @property
    def kv(self) -> str:
        """The format of keys and values: the name of a form, or `AS_COMPUTED`."""
        return AS_COMPUTED if self._kv_form is None else self._kv_form.name

    @property
    def held_as(self) -> str:
        """The weight format, the type that blocks compute in, and a KV format that differs from it. A session can only
        continue on blocks with the same text."""
        return (
            self.weights.description if self._kv_form is None else f"{self.weights.description} KV {self._kv_form.name}"
        )

    def forward(self, hidden: Tensor, parts: Sequence[RowChunk], taps: Sequence[int] = ()) -> Tensor:
        """Runs new positions of one or more sequences through the blocks and appends them to their rows.

        `[positions, hidden]`, the parts concatenated -> the same shape, on the span's device and in its dtype. Each
        part has a different row, with exactly the positions before `start`. With `taps`, boundaries within the span in
        rising order, the result is `[positions, (taps + 1) * hidden]`: the hidden states at the boundaries, and the
        output last. Raises ValueError, without changing anything, if the parts do not fit `hidden` or their rows.
        """
        self._check_chunks(hidden, parts)
        for part in parts:
            if part.row.length - part.row.computed > MERGED_POSITIONS:
                self.catch_up(part.row, part.adapter)
        with torch.inference_mode():
            given = to_device(hidden, self.device, self.dtype)
            few = len(hidden) <= min(MOST_IN_STEPS, MOST_OF_EACH * len(parts))
            if isinstance(self._lean, NativeStep) and few and len(hidden) > MOST_POSITIONS:
                steps = steps_of(parts)
                if all(map(self._lean.takes, steps)) and self._prefers_steps(len(steps)):
                    return self._in_steps(given, steps, taps)
            return self._step(given, parts, taps)

    def _prefers_steps(self, count: int) -> bool:
        """Whether `count` native steps of many sequences are faster than products of matrices.

        That depends on the processor, the weights and their format. It is measured once, with one block, so that the
        result of a sequence does not depend on the moment.
        """
        if (known := self._steps_are_faster.get(count)) is not None:
            return known
        block = self.view(self.start, self.start + 1)
        hidden = torch.zeros(count * MOST_POSITIONS, self.hidden_size, dtype=self.dtype)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for in_steps in (True, False) * TRIALS:
            parts = [RowChunk(block.new_row(1), 0, 1) for _ in hidden]
            began = time.perf_counter()
            if in_steps:
                block._in_steps(hidden, steps_of(parts), ())
            else:
                block._step(hidden, parts, ())
            seconds[in_steps].append(time.perf_counter() - began)
        faster = self._steps_are_faster[count] = min(seconds[True]) < min(seconds[False])
        return faster

    def _in_steps(self, hidden: Tensor, steps: Sequence[Sequence[RowChunk]], taps: Sequence[int]) -> Tensor:
        counts = [sum(part.count for part in step) for step in steps]
        lengths = [(part.row, part.row.length) for step in steps for part in step]
        try:
            each = zip(hidden.split(counts), steps, strict=True)
            return torch.cat([self._step(given, step, taps) for given, step in each])
        except BaseException:
            for row, length in lengths:
                row.crop(length)
            raise

    def _step(self, hidden: Tensor, parts: Sequence[RowChunk], taps: Sequence[int]) -> Tensor:
        special = self._set_rotary(parts) or bool(self.per_layer_size)
        if not special and self._lean is not None and self._lean.takes(parts):
            output = self._lean.forward(hidden, parts, [tap - self.start for tap in taps] if taps else ())
        else:
            adding = self._adding(parts) if special else nullcontext()
            with self._tapping(taps) if taps else nullcontext(), adding:
                output = self._run_family_code(hidden, parts)
        for part in parts:
            part.row.advance(part.count)
        return output

    @staticmethod
    def _set_rotary(parts: Sequence[RowChunk]) -> bool:
        """Gives rows their rotary positions. Returns whether there are other block inputs, too."""
        for part in parts:
            part.row.set_rotary(part.start, part.count, part.inputs.positions if part.inputs else None)
        return any(part.inputs and (part.inputs.added or part.inputs.groups is not None) for part in parts)

    def catch_up(self, row: SequenceCache, adapter: AdapterTensors | None, most: int | None = None) -> int:
        """Runs positions of a row that must run again before new ones, at most `most` (None: all), and returns their
        number; otherwise `forward` runs them. `adapter`: the adapter with which they ran before."""
        done = 0
        while (most is None or done < most) and (
            hidden := row.begin_rerun(PASS_POSITIONS if most is None else min(PASS_POSITIONS, most - done))
        ) is not None:
            part = RowChunk(row, row.computed, len(hidden), adapter)
            with torch.inference_mode():
                self._run_one(hidden, part)
            row.set_computed(part.start + part.count)
            done += part.count
        return done

    def sequences(
        self,
        hidden: Tensor,
        lengths: Sequence[int],
        adapter: AdapterTensors | None = None,
        rope_length: int = 0,
        inputs: Sequence[PositionInputs] = (),
    ) -> Tensor:
        """Runs whole sequences without keeping their keys and values; with a graph for gradients if torch records one.

        `[positions, hidden]`, the sequences concatenated -> the same shape, on the span's device and in its dtype.
        `adapter`: one that `fit_adapter` has accepted; `rope_length`: as in `splitnet.wire.messages.Forward`;
        `inputs`: of each sequence, or none. Raises ValueError if the lengths do not fit `hidden`, and UnsupportedModel
        if the blocks do not read the inputs.
        """
        if self.per_layer_size:
            family = self._backbone.config.model_type
            raise UnsupportedModel(
                f"blocks of the family {family!r} have a second input for every token, which passes over whole "
                "sequences do not carry: use steps with a cache"
            )
        prefix = self._adapters.prefix_of(adapter, self.start, self.end)
        rows = [TracedSequence(prefix=prefix) for _ in lengths]
        parts = [
            RowChunk(row, 0, length, adapter, max(rope_length, row.prefix_length + length), own)
            for row, length, own in zip_longest(rows, lengths, inputs)
        ]
        self._check_chunks(hidden, parts)
        if not self._packs and self._score_heads > 1:
            longest = max(lengths)
            rope_length = parts[0].row.prefix_length + longest
            fitting = positions_at_once(self._score_heads, rope_length)
            if not torch.is_grad_enabled() and longest > fitting:
                parts = [replace(part, row=self.new_row(part.count, adapter, exact=True)) for part in parts]
            elif longest > BACKWARD_FACTOR * fitting:
                raise PeerBusy(
                    f"there is no memory for a backward pass through {rope_length} positions in blocks of the family "
                    f"{self._backbone.config.model_type!r}: train with shorter sequences"
                )
        hidden = hidden.to(device=self.device, dtype=self.dtype)
        if self._packs and len(hidden) > PASS_POSITIONS and not torch.is_grad_enabled():
            return self._in_passes(hidden, parts)
        with self._adding(parts) if self._set_rotary(parts) else nullcontext():
            return self._run_family_code(hidden, parts)

    def fit_adapter(self, adapter: AdapterTensors) -> None:
        """Prepares the blocks for an adapter. Raises AdapterError if the adapter names blocks or layers that the span
        lacks, or its shapes do not fit them."""
        if adapter.prefix_length:
            self._refuse_prefixes()
        self._adapters.fit_adapter(adapter, self.start, self.end)

    def keys_and_values(self, row: SequenceCache, length: int) -> dict[str, Tensor]:
        """Keys and values of the first `length` positions of a row after its prefix, named as the prefix of an adapter,
        float32.

        Raises AdapterError if the blocks cannot have a prefix, ValueError if the row has fewer positions.
        """
        self._refuse_prefixes()
        tensors: dict[str, Tensor] = {}
        for index, keys, values in row.keys_and_values(length):
            block = self._whole.start + index
            tensors[f"{block}.{PREFIX_KEYS}"], tensors[f"{block}.{PREFIX_VALUES}"] = keys[0].float(), values[0].float()
        return tensors

    def view(self, start: int, end: int) -> Span:
        """The blocks `[start, end)` of this span as a separate span, with the same weights in memory.

        Raises ValueError if this span does not hold all of these blocks.
        """
        if not self.start <= start < end <= self.end:
            raise ValueError(f"blocks {start}:{end} are not within {self.start}:{self.end}")
        backbone = share_blocks(self._backbone, self._container, start - self.start, end - self.start)
        own = {"weights": self.weights, "windows": self._windows, "packs": self._packs, "whole": self._whole}
        return Span(backbone, self._container, start, end, **own, kv=self.kv)

    def page_layout(self) -> tuple[Layout, Layout]:
        """Types and shapes of the tensors of one position, in `SequenceCache.page` and in its `states`."""
        row = self.new_row()
        self.forward(torch.zeros(1, self.hidden_size), [RowChunk(row, 0, 1)])
        page, states = (
            {name: (each.dtype, tuple(each.shape)) for name, each in tensors.items()}
            for tensors in (row.page(0, 1), row.states())
        )
        return page, states

    def kinds(self, row: SequenceCache) -> dict[int, int]:
        """First block -> number of blocks, for each group of blocks whose rows have the same shapes and window."""
        first: dict[Any, int] = {}
        counts: dict[int, int] = {}
        for index, shapes in sorted(row.shapes().items()):
            block = first.setdefault((tuple(shapes), self._windows[index] if self._windows else None), index)
            counts[self.start + block] = counts.get(self.start + block, 0) + 1
        return counts

    def weight_addresses(self) -> frozenset[int]:
        """Addresses of the memory of the weights."""
        tensors = (*self._backbone.parameters(), *self._backbone.buffers())
        return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors)

    @property
    def replayed_positions(self) -> int:
        """The maximum number of positions of a decode step that graphs replay; 0: graphs replay no step."""
        return self._lean.most if isinstance(self._lean, GraphStep) else 0

    def _refuse_prefixes(self) -> None:
        if reason := why_no_prefix(self._backbone.config):
            family = self._backbone.config.model_type
            raise AdapterError(
                f"blocks of the family {family!r} {reason}: train an adapter of another kind, such as LoRA"
            )

    def _check_chunks(self, hidden: Tensor, parts: Sequence[RowChunk]) -> None:
        if hidden.ndim != 2 or hidden.shape[1] != self.hidden_size:
            raise ValueError(f"expected [positions, {self.hidden_size}], got {list(hidden.shape)}")
        left, rows = hidden.shape[0], set[int]()
        for part in parts:
            if part.count < 1:
                raise ValueError(f"the parts do not add up to {hidden.shape[0]} positions")
            if part.start != part.row.length:
                raise ValueError("a part does not start where its row ends: crop the row first")
            left -= part.count
            rows.add(id(part.row))
        if left:
            raise ValueError(f"the parts do not add up to {hidden.shape[0]} positions")
        if len(rows) != len(parts):
            raise ValueError("two parts of one pass have the same row")

    def _run_family_code(self, hidden: Tensor, parts: Sequence[RowChunk]) -> Tensor:
        """Runs the family's own code."""
        return self._run_packed(hidden, parts) if self._packs else self._run_rows(hidden, parts)

    def _run_packed(self, hidden: Tensor, parts: Sequence[RowChunk]) -> Tensor:
        adapters = applying([part.adapter for part in parts], [part.count for part in parts])
        with adapters, running(PackedPass(parts, self._windows, self._sdpa)):
            return self._run_backbone(hidden, parts, self._nothing_cached)

    def _run_backbone(self, hidden: Tensor, parts: Sequence[RowChunk], cache: Any) -> Tensor:
        """`[positions, hidden]` -> `[positions, (taps + 1) * hidden]`, see `forward`."""
        output = self._backbone(
            inputs_embeds=hidden[None],
            position_ids=rotary_positions_of(parts).to(self.device),
            cache=cache,
            use_cache=cache is not None,
        )[0][0]
        return torch.cat((*self._tapped.values(), output), dim=1) if self._tapped else output

    @contextmanager
    def _tapping(self, taps: Sequence[int]) -> Iterator[None]:
        """Within the context, keeps the hidden states at these boundaries while the family's own code runs."""

        def keep(tap: int, _: nn.Module, __: Any, output: Any) -> None:
            self._tapped[tap] = (output[0] if isinstance(output, tuple) else output)[0]

        hooks = [self._blocks[tap - 1 - self.start].register_forward_hook(partial(keep, tap)) for tap in taps]
        try:
            yield
        finally:
            self._tapped = {}
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _adding(self, parts: Sequence[RowChunk]) -> Iterator[None]:
        """Within the context, blocks add `PositionInputs.added` to their hidden states, and read `per_layer`.

        Raises UnsupportedModel: the sequences of the family do not share passes.
        """
        if not self._packs:
            raise UnsupportedModel(f"blocks of the family {self._backbone.config.model_type!r} read only hidden states")

        def add(block: int, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
            hidden: Tensor = given[0] if given else named["hidden_states"]
            begin, hidden = 0, hidden.clone()
            own = hidden.new_zeros(1, hidden.shape[1], self.per_layer_size)  # as it stays in trials without inputs
            for part in parts:
                if part.inputs is not None and block in part.inputs.added:
                    hidden[:, begin : begin + part.count] += part.inputs.added[block].to(hidden)
                if part.inputs is not None and self.per_layer_size:
                    own[:, begin : begin + part.count] = part.inputs.per_layer[block].to(hidden)
                begin += part.count
            if given:
                return (hidden, *((own, *given[2:]) if self.per_layer_size else given[1:])), named
            own_named = {PER_LAYER_INPUT: own} if self.per_layer_size else {}
            return given, named | {"hidden_states": hidden} | own_named

        given = {block for part in parts if part.inputs for block in part.inputs.added}
        own = range(self.start, self.end)
        wanted = own if self.per_layer_size else given & {*own}
        hooks = [
            self._blocks[block - self.start].register_forward_pre_hook(partial(add, block), with_kwargs=True)
            for block in wanted
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _in_passes(self, hidden: Tensor, sequences: Sequence[RowChunk]) -> Tensor:
        """As `sequences`, in passes of `PASS_POSITIONS` positions, as steps have them, to limit memory for
        activations; a pass that would end within a group of positions is longer."""
        outputs: list[Tensor] = []
        parts: list[RowChunk] = []
        begin = end = 0
        for whole in sequences:
            row, start = self.new_row(whole.count, whole.adapter, exact=True), 0
            inputs = whole.inputs or PositionInputs()
            while start < whole.count:
                stop = inputs.end_of_group(min(whole.count, start + begin + PASS_POSITIONS - end))
                parts.append(RowChunk(row, start, stop - start, whole.adapter, inputs=inputs.cut(start, stop)))
                start, end = stop, end + stop - start
                if end >= begin + PASS_POSITIONS or end == len(hidden):
                    with self._adding(parts) if self._set_rotary(parts) else nullcontext():
                        outputs.append(self._run_packed(hidden[begin:end], parts))
                    for part in parts:
                        part.row.advance(part.count)
                    begin, parts = end, []
        return torch.cat(outputs)

    def _run_rows(self, hidden: Tensor, parts: Sequence[RowChunk]) -> Tensor:
        outputs: list[Tensor] = []
        begin = 0
        for part in parts:
            given = part.row.begin_pass(hidden[begin : begin + part.count])
            output = self._run_one(given, replace(part, start=part.row.computed, count=len(given)))
            outputs.append(output[-part.count :])
            begin += part.count
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _run_one(self, hidden: Tensor, part: RowChunk) -> Tensor:
        """Runs positions of one sequence, `[positions, hidden]`, from `part.start`, in as many calls as necessary."""
        outputs: list[Tensor] = []
        done = 0
        while done < part.count:
            start = part.start + done
            most = positions_at_once(self._score_heads, part.row.prefix_length + part.start + part.count)
            count = 1 if self._one_by_one and start else min(part.count - done, most)
            if part.count <= WINDOW:
                count = part.row.count_same_codes(count)
            if self._ropes.has_any:
                count = min(count, self._ropes.count_same_frequencies(part.row.prefix_length + start, part.rope_length))
            outputs.append(self._run_sequence(hidden[done : done + count], replace(part, start=start, count=count)))
            done += count
            if done < part.count:
                part.row.set_computed(part.start + done)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _run_sequence(self, hidden: Tensor, part: RowChunk) -> Tensor:
        row = part.row
        cache = None if isinstance(row, TracedSequence) and not row.prefix_length else OneSequence(row)
        length = max(part.rope_length, part.positions.stop)
        with self._ropes.one_sequence(length), applying([part.adapter], [part.count]):
            return self._run_backbone(hidden, [part], cache)

    def _fast_step(self, blocks: Sequence[nn.Module], rope: nn.Module | None) -> FastStep | None:
        """The fastest implementation of decode steps with the same result as the family's own code; None: there is
        none."""
        config, former = self._backbone.config, self._whole._lean
        family = family_of(config)
        of_torch = self._packs and family.torch_step
        if not of_torch and (not family.native_step or self._ropes.has_any):
            return None
        everywhere = getattr(config, "sliding_window", None) if family.one_window else None
        windows = self._windows or [everywhere] * (self._whole.end - self._whole.start)

        def native(some: Sequence[nn.Module]) -> NativeStep | None:
            with suppress(Exception):  # blocks of another structure raise anything; the family's own code runs them
                return NativeStep.of(some, rope, windows, self.dtype, self._kv_form)
            return None

        in_torch = partial(TorchStep.of, rope=rope, windows=windows)
        if self._whole is not self:
            if former is None or isinstance(former, NativeStep):
                return former and native(blocks)
            lean = in_torch(blocks)
            return GraphStep(lean, former.recorded) if isinstance(former, GraphStep) and lean is not None else lean
        for make in (native if self.device.type == "cpu" else None, in_torch if of_torch else None):
            step = make and make(blocks)
            if make is None or step is None:
                continue
            with suppress(RuntimeError):  # shapes do not fit if another structure has the same names
                if _gives_the_same(self, step) and (self.dtype == torch.float32 or self._each_same(blocks, make)):
                    return with_recordings(self, step) if isinstance(step, TorchStep) else step
        return None

    def _each_same(
        self, blocks: Sequence[nn.Module], make: Callable[[Sequence[nn.Module]], NativeStep | TorchStep | None]
    ) -> bool:
        """Whether a step of each block alone gives the same result. Blocks with experts are skipped, as rounding may
        change the choice of experts."""
        for index, block in enumerate(blocks, self.start):
            if any(hasattr(module, "top_k") for module in block.modules()):
                continue
            step = make([block])
            if step is None or not _gives_the_same(self.view(index, index + 1), step, alone=True):
                return False
        return True

    def _hold_as(self, form: KVForm) -> None:
        """Sets the KV format of new rows. Raises WeightsError: heads do not fit it."""
        shapes, first = self._adapters.kv_shapes, self._whole.start
        for index in range(self.start - first, self.end - first):
            for (heads, size), own in zip(shapes.get(index, ()), (form, form.values), strict=False):
                self._kv_form = form
                plain = heads * size * self.dtype.itemsize
                self.kv_bytes_per_position -= plain - heads * own.bytes_of(size)
                self.row_bytes += (SINKS + RING) * plain if form.coded else 0

    def _probe(self) -> tuple[int, int]:
        """Runs one position, which proves that the blocks run on their own and measures the memory of a row.

        Returns bytes per position, and bytes of a row that do not depend on its length.
        """
        row = self.new_row()
        family = self._backbone.config.model_type
        try:
            output = self.forward(torch.zeros(1, self.hidden_size, dtype=torch.float32), [RowChunk(row, 0, 1)])
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            held = f" with weights held as {self.weights.kind}" if self.weights.kind != name_of(self.dtype) else ""
            raise UnsupportedModel(f"blocks of the family {family!r} do not run on their own{held}: {error}") from error
        # In families with states, some blocks may consist of experts only. Others read keys and values of other blocks.
        reading = [each for each in self._blocks.modules() if getattr(each, "is_kv_shared_layer", False)]
        all_keep = len(row.blocks) == self.end - self.start - len(reading) or self._keeps_states
        if output.shape != (1, self.hidden_size) or not all_keep:
            raise UnsupportedModel(f"some blocks of the family {family!r} keep a state other than a KV cache")
        if self._whole is self:
            self._adapters.kv_shapes = row.shapes()
        return row.bytes_per_position, row.state_bytes * MAX_LIVE_STATES


@torch.inference_mode()
def _gives_the_same(span: Span, step: FastStep, *, alone: bool = False) -> bool:
    """Whether some steps after a prompt give the results of the family's own code; `alone`: with the tolerance for one
    block."""
    rows = span.new_row(), span.new_row()
    noise = torch.Generator().manual_seed(0)
    tolerance, rounding = LEAN_TOLERANCE if span.dtype == torch.float32 else LEAN_TOLERANCE_HALF, 0.0
    if alone:
        tolerance, rounding = LEAN_TOLERANCE_ALONE, LEAN_ROUNDING_ALONE
    prompt = torch.randn(LEAN_PROMPT, span.hidden_size, generator=noise, dtype=torch.float32)
    span.forward(torch.cat((prompt, prompt)), [RowChunk(row, 0, LEAN_PROMPT) for row in rows])
    for position in range(LEAN_PROMPT, LEAN_PROMPT + LEAN_TRIALS):
        given = torch.randn(1, span.hidden_size, generator=noise).to(device=span.device, dtype=span.dtype)
        expected = span.forward(given, [RowChunk(rows[0], position, 1)])
        got = step.forward(given, [RowChunk(rows[1], position, 1)])
        rows[1].advance(1)
        allowed = tolerance * (expected - given).float().norm() + rounding * given.float().norm()
        if not (got - expected).float().norm() <= allowed:
            return False
    return True
