"""The cache of one sequence in the blocks of a span, and the caches for transformers' backbones."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import LinearAttentionLayer

from splitnet.blocks.adapters import Prefix
from splitnet.blocks.kv_form import RING, SINKS, WINDOW, KVForm, in_full
from splitnet.quant.device import new_empty

# Copies of earlier states that a row keeps for rewinds: two of the last steps, and two that are farther apart.
COPIES = 4
# The oldest copy is at least this many positions back, if the row is long enough, because drafts are shorter than this.
OLDEST_COPY_DISTANCE = 64
# Positions between copies while positions arrive one by one. Before a pass of several positions a copy is always made.
SPACING = 32
# Positions of a row's first allocation if its size is unknown; each later allocation doubles it.
FIRST_CAPACITY = 256
# Maximum number of live versions of a row's states: the present states, the states of a running pass, and the copies.
MAX_LIVE_STATES = COPIES + 2


class StateLayer(LinearAttentionLayer):
    """The states of one block in transformers' interface. This class never writes to a tensor that another copy may
    share."""

    def own(self, states: dict[int, Tensor | None], index: int) -> Tensor | None:
        """One state of the block, which the caller may write to; None at the beginning of a sequence."""
        state = states[index] if self.has_previous_state[index] else None
        if state is not None:
            state = states[index] = state.clone()
        return state

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        self.own(self.conv_states, state_idx)
        return super().update_conv_state(conv_states, state_idx, conv_kernel_size, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: Tensor | list[Tensor], state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        before = self.recurrent_states[state_idx]
        last = recurrent_states if isinstance(recurrent_states, Tensor) else recurrent_states[-1]
        state = last if before is None else last.to(before.dtype)
        if state.untyped_storage().nbytes() > state.nbytes:
            state = state.clone()  # a view would keep the whole tensor in memory
        self.recurrent_states[state_idx] = state
        self.is_recurrent_states_initialized[state_idx] = True
        return state

    def forked(self) -> StateLayer:
        """A copy that can change independently of this layer."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, dict):
                setattr(other, name, dict(value))
        return other

    @property
    def nbytes(self) -> int:
        tensors = (*self.conv_states.values(), *self.recurrent_states.values())
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class SequenceStates:
    """The states of one row in all blocks of a span; `per_block`: the convolutions of a block, each of which has a
    state."""

    def __init__(self, per_block: int) -> None:
        self._per_block = per_block
        self._layers: dict[int, StateLayer] = {}
        self._working: dict[int, StateLayer] = {}
        self._copies: list[tuple[int, dict[int, StateLayer]]] = []  # each with the length of the row at that time

    @property
    def blocks(self) -> frozenset[int]:
        return frozenset(self._layers)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self._layers.values())

    def begin_pass(self, start: int, count: int) -> None:
        """Prepares a pass of `count` positions from `start` on; drops the states of a pass that failed."""
        self._working = {}
        newest = self._copies[-1][0] if self._copies else 0
        if start > newest and (count > 1 or start - newest >= SPACING):
            self._copies.append((start, self._layers))
            if len(self._copies) > COPIES:
                del self._copies[0 if self._copies[1][0] <= start - OLDEST_COPY_DISTANCE else 2]

    def layer(self, block: int) -> StateLayer:
        """The states of a block, for the pass that is running."""
        layer = self._working.get(block)
        if layer is None:
            present = self._layers.get(block)
            layer = self._working[block] = StateLayer(self._per_block) if present is None else present.forked()
        return layer

    def commit(self) -> None:
        """Makes the states of the finished pass the present states."""
        self._layers, self._working = {**self._layers, **self._working}, {}

    def rewind(self, length: int) -> int:
        """Returns to the last copy at or before `length`, or to the beginning, and returns that position."""
        while self._copies and self._copies[-1][0] > length:
            self._copies.pop()
        self._working = {}
        if not self._copies:
            self._layers = {}
            return 0
        start, self._layers = self._copies[-1]
        return start

    def tensors(self) -> dict[str, Tensor]:
        """See `SequenceCache.states`."""
        found: dict[str, Tensor] = {}
        for block, layer in self._layers.items():
            for kind, states in (("conv", layer.conv_states), ("recurrent", layer.recurrent_states)):
                found |= {
                    f"{block}.{kind}.{index}": state.cpu() for index, state in states.items() if state is not None
                }
        return found

    def restore(self, tensors: Mapping[str, Tensor], length: int, device: torch.device) -> None:
        """Makes `tensors` the present states of a row of `length` positions. Raises ValueError: `tensors` are not
        states of these blocks."""
        self._layers = {}
        for name, tensor in tensors.items():
            block, kind, index = name.split(".")
            layer = self._layers.setdefault(int(block), StateLayer(self._per_block))
            if kind == "conv":
                layer.conv_states[int(index)] = state = tensor.to(device)
                layer.conv_kernel_size[int(index)] = state.shape[-1]
                layer.dtype, layer.device = state.dtype, state.device
                layer.is_conv_states_initialized[int(index)] = layer.has_previous_state[int(index)] = True
            else:
                layer.recurrent_states[int(index)] = tensor.to(device)
                layer.is_recurrent_states_initialized[int(index)] = True
        self._copies, self._working = [(length, self._layers)], {}

    def fork(self) -> SequenceStates:
        """An independent copy. The copy and this object share tensors until one of them replaces a tensor."""
        other = SequenceStates(self._per_block)
        other._layers, other._copies = self._layers, list(self._copies)
        return other


@dataclass
class _Block:
    keys: Tensor
    values: Tensor
    near: tuple[Tensor, ...] = ()  # if keys and values are codes: the positions of both that are held in full
    near_from: int = 0  # the first of the last positions in `near`

    def wrote(self, start: int, end: int) -> None:
        """Records positions that overwrote others in the ring; a row that was cropped continues at `start`."""
        self.near_from = max(min(self.near_from, start), end - RING)

    @property
    def addresses(self) -> list[int]:
        """A row of the result of `SequenceCache.reserve`."""
        near = [tensor.data_ptr() for tensor in self.near] or [0, 0]
        return [self.keys.data_ptr(), self.values.data_ptr(), self.keys.shape[2], *near, self.near_from]

    @property
    def numbers(self) -> tuple[Tensor, ...]:
        """Tensors with keys and values of some positions as numbers, not codes."""
        return self.near or (self.keys, self.values)


class SequenceCache:
    """Keys and values of one sequence (row), one pair of tensors `[1, kv heads, capacity, head size]` per block.

    Memory is allocated as positions arrive, for `room` positions, or else in capacities that double, so that appending
    a token copies only the token. All positions are kept, also for blocks with a sliding window, so that a rewind is
    exact.

    `form` is the format in which keys and values of blocks are held. If this format has codes, the first `SINKS`
    positions and the last `WINDOW` are also held in full, the latter in a ring of `RING` positions: a crop within the
    ring is exact.

    Where blocks keep states, the row also keeps the inputs of the span. If a rewind ends where no copy of the states
    exists, the positions from `computed` to `length` must run again before new ones.

    Args:
        room: positions after the prefix that memory is allocated for; None: capacities double. If more positions
            arrive, capacities double from there on.
        prefix: keys and values of an adapter before the first position, by block of the span.
        states: an empty object where blocks keep states.
        form: the format of keys and values; None: the type in which they arrive.
    """

    def __init__(
        self,
        room: int | None = None,
        prefix: Mapping[int, Prefix] | None = None,
        states: SequenceStates | None = None,
        form: KVForm | None = None,
    ) -> None:
        self.length = 0  # stored positions, without the prefix
        self.computed = 0  # positions that keys, values and states include
        self.form = form
        self.rotary: Tensor | None = None  # rotary positions, `[length, axes]`; None: the numbers of the positions
        self._states = states
        self.prefix_length = next(iter(prefix.values())).keys.shape[2] if prefix else 0
        self._room = room
        # By block with a prefix; None once the prefix is stored, so that the row keeps no adapter alive.
        self._prefix: dict[int | str, Prefix | None] = {**prefix} if prefix else {}
        self._blocks: dict[int | str, _Block] = {}  # and, by name, other tensors with one entry per position
        # By blocks: their least capacity, and the result of `reserve`, until the memory of a block moves.
        self._places: dict[tuple[int, ...], tuple[int, Tensor]] = {}

    @property
    def room(self) -> int:
        """Positions after the prefix that memory is allocated for. A smaller value frees memory at once. Raises
        ValueError if the row holds more positions."""
        if self._room is not None:
            return self._room
        return max((block.keys.shape[2] - self._before(i) for i, block in self._blocks.items()), default=0)

    @room.setter
    def room(self, room: int) -> None:
        if room < self.length:
            raise ValueError(f"a row of {self.length} positions cannot have room for {room}")
        self._room = room
        for index, block in self._blocks.items():
            capacity = self._before(index) + room
            if block.keys.shape[2] > capacity:
                self._move(block, capacity, self._before(index) + self.length)

    @property
    def nbytes(self) -> int:
        """Bytes of the row's tensors, without copies of states."""
        held = sum(block.keys.nbytes + block.values.nbytes for block in self._blocks.values())
        return held + self.near_bytes + self.state_bytes

    @property
    def near_bytes(self) -> int:
        """Bytes of the positions that are held in full besides their codes; independent of the row's length."""
        return sum(tensor.nbytes for block in self._blocks.values() for tensor in block.near)

    @property
    def state_bytes(self) -> int:
        """Bytes of the present states; independent of the row's length."""
        return self._states.nbytes if self._states is not None else 0

    @property
    def has_states(self) -> bool:
        return self._states is not None

    @property
    def blocks(self) -> frozenset[int]:
        """The blocks that have stored something."""
        return frozenset(self.shapes()) | (self._states.blocks if self._states is not None else frozenset())

    @property
    def bytes_per_position(self) -> int:
        """Bytes that one position takes in all blocks that have stored something."""
        pairs = ((block.keys, block.values) for block in self._blocks.values())
        return sum(tensor.nbytes // tensor.shape[2] for pair in pairs for tensor in pair)

    def count_same_codes(self, count: int) -> int:
        """How many of the next `count` positions, at least 1, see the same earlier positions as codes."""
        if self.form is None or not self.form.coded:
            return count
        start = self.prefix_length + self.computed
        held = min((block.near_from for block in self._blocks.values() if block.near), default=0)
        return max(1, min(count, max(SINKS, min(held, start)) + WINDOW - start))

    def shapes(self) -> dict[int, list[tuple[int, int]]]:
        """Heads and head size of the keys and of the values, by block with keys and values."""
        return {
            index: [(tensor.shape[1], tensor.shape[3]) for tensor in block.numbers]
            for index, block in self._blocks.items()
            if isinstance(index, int)
        }

    def crop(self, length: int) -> None:
        """Drops all positions from `length` on, but keeps their memory. Raises ValueError if the row has fewer
        positions."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop a row of {self.length} positions to {length}")
        self.length = length
        if length < self.computed:
            self.computed = self._states.rewind(length) if self._states is not None else length

    def fork(self, length: int | None = None, room: int | None = None) -> SequenceCache:
        """An independent copy of the first `length` positions; None: of all. `room`: None: as much as this row has."""
        states = self._states.fork() if self._states is not None else None
        copy = SequenceCache(self._room if room is None else room, None, states, self.form)
        copy.prefix_length, copy._prefix = self.prefix_length, dict(self._prefix)
        copy.length, copy.computed, copy.rotary = self.length, self.computed, self.rotary
        copy.crop(self.length if length is None else length)
        for index, block in self._blocks.items():
            before = self._before(index)
            capacity = block.keys.shape[2] if room is None else before + room
            held = before + copy.length
            keys, values = _grown(block.keys, capacity, held), _grown(block.values, capacity, held)
            near = tuple(tensor.clone() for tensor in block.near)
            copy._blocks[index] = _Block(keys, values, near, block.near_from)
        return copy

    def set_rotary(self, start: int, count: int, positions: Tensor | None) -> None:
        """Sets the rotary positions of the positions from `start` on, `[count, axes]`; None: their numbers."""
        if positions is None and self.rotary is None:
            return
        numbers = torch.arange(start + count)[:, None]
        own = numbers[start:] if positions is None else positions
        before = numbers[:start] if self.rotary is None else self.rotary[:start]
        axes = max(before.shape[1], own.shape[1])
        self.rotary = torch.cat((before.expand(-1, axes), own.expand(-1, axes)))

    def rotary_positions(self, start: int, count: int) -> Tensor:
        """`[count, axes]`, with the positions of the prefix before them."""
        own = torch.arange(start, start + count)[:, None] if self.rotary is None else self.rotary[start : start + count]
        return own + self.prefix_length

    def keys_and_values(self, length: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Keys and values of the first `length` positions after the prefix, `[1, kv heads, length, head size]`, block
        by block.

        Raises ValueError if the row has fewer positions.
        """
        if not 0 < length <= self.length:
            raise ValueError(f"the row has {self.length} positions, not {length}")
        for index in sorted(self.shapes()):
            block, before = self._blocks[index], self._before(index)
            end = before + length
            none = [tensor[:, :, :0] for tensor in block.numbers]
            keys, values = self._seen(index, block, end, none, block.near_from)
            yield index, keys[:, :, before:end], values[:, :, before:end]

    def page(self, start: int, end: int) -> dict[str, Tensor]:
        """A copy on the CPU of all that is stored for positions `[start, end)` after the prefix: for each block, and
        each other tensor with one entry per position, `NAME.keys` and `NAME.values`, `[1, kv heads, positions, head
        size]`, or codes. With codes, the page of the first positions also has `NAME.first_keys` and
        `NAME.first_values`, which are in full."""
        found: dict[str, Tensor] = {}
        for key, block in self._blocks.items():
            before = self._before(key)
            for name, tensor in (("keys", block.keys), ("values", block.values)):
                own = tensor[:, :, before + start : before + end]
                found[f"{key}.{name}"] = own.to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, near in zip(("first_keys", "first_values"), block.near, strict=False):
                if not start:
                    found[f"{key}.{name}"] = near[:, :, :SINKS].cpu().clone()
        return found

    def states(self) -> dict[str, Tensor]:
        """The present states, `BLOCK.KIND.INDEX`, on the CPU; empty where blocks keep none. Do not call it during a
        pass."""
        return self._states.tensors() if self._states is not None else {}

    def fill(self, pages: Sequence[Mapping[str, Tensor]], device: torch.device) -> None:
        """Appends consecutive pages of `page` to a row that began with the pages before them. Where blocks keep states,
        these positions must run again before new ones, unless `restore` follows. Raises ValueError: the pages are not
        of such a row."""
        if self.has_states and not all("inputs.keys" in page for page in pages):
            raise ValueError("these pages are of blocks that keep no states")
        end, begin = self.length, pages[0] if pages else {}
        for kind in [name.removesuffix(".keys") for name in begin if name.endswith(".keys")]:
            key = int(kind) if kind.isdecimal() else kind
            numbers = [[page[f"{kind}.{part}"] for page in pages] for part in ("keys", "values")]
            start, end = self.length, self.length + sum(keys.shape[2] for keys in numbers[0])
            if device.type == "cpu" and not self._has_codes(key):
                before = self._before(key)
                block = self._with_room(key, numbers[0][0], numbers[1][0], before + end)
                for held, own in zip(block.numbers, numbers, strict=True):
                    room = held[:, :, before + start : before + end].split([each.shape[2] for each in own], 2)
                    for place, page in zip(room, own, strict=True):
                        if place.shape != page.shape:
                            raise ValueError(f"a page of {tuple(page.shape)} is not of a row of {tuple(place.shape)}")
                        place.copy_(page)
                continue
            # Many small copies to another device take far longer than one large copy.
            both = (torch.cat(numbers[0], 2).to(device), torch.cat(numbers[1], 2).to(device))
            if self._has_codes(key):
                first = [
                    begin[name].to(device) for name in (f"{kind}.first_keys", f"{kind}.first_values") if name in begin
                ]
                self._store_codes(int(kind), start, both, first)
            else:
                self.store(key, start, *both)
        self.length, self.computed = end, 0 if self._states is not None else end

    def restore(self, states: Mapping[str, Tensor], computed: int, device: torch.device) -> None:
        """Call after `fill`: sets the states after position `computed`."""
        if self._states is not None and computed:
            self.computed = computed
            self._states.restore(states, computed, device)

    def _store_codes(self, key: int, position: int, codes: Sequence[Tensor], first: Sequence[Tensor]) -> None:
        """Stores a block's part of a page; `first`: the first positions in full, for a row that has none yet."""
        start = self._before(key) + position
        end = start + codes[0].shape[2]
        if not position and len(first) < len(codes):
            raise ValueError("the keys and values of a page have another format than the row")
        keys, values = first or codes
        block = self._with_room(key, keys, values, end)
        for held, new in zip((block.keys, block.values), codes, strict=True):
            if new.dtype != held.dtype or new.shape != held[:, :, start:end].shape:
                raise ValueError("the keys and values of a page have another format than the row")
            held[:, :, start:end] = new
        for near, new in zip(block.near, first, strict=False):
            near[:, :, :SINKS] = new
        block.near_from = end  # the other positions are in codes alone

    def append(self, block_index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new positions after `computed`, `[1, kv heads, new positions, head size]`, of a block of the span.

        Returns views of all keys and values up to the new ones, with the prefix first. Only `advance` moves `computed`,
        when all blocks have stored theirs: a pass that fails half-way leaves the row unchanged.
        """
        return self.store(block_index, self.computed, keys, values)

    def append_with_codes(self, block_index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, range]:
        """As `append`, but each new position may see the last `WINDOW` positions in full and the codes of all others.

        So the result does not depend on the step in which a position arrives. The range has the positions that some new
        positions see in codes and others in full: the returned keys and values have these twice, as codes, then in
        full.
        """
        if not self._has_codes(block_index):
            return *self.append(block_index, keys, values), range(0)
        start = self._before(block_index) + self.computed
        end = start + keys.shape[2]
        block = self._with_room(block_index, keys, values, end)
        held = min(block.near_from, start)
        since, until = max(held, start + 1 - WINDOW), max(held, end - WINDOW)
        # The new positions overwrite the ring, so it is read first.
        full = [
            torch.cat((in_full(near, since, start), new), 2)
            for near, new in zip(block.near, (keys, values), strict=True)
        ]
        self._write(block, start, keys, values)
        return *self._seen(block_index, block, until, full, until), range(since, until)

    def begin_pass(self, hidden: Tensor) -> Tensor:
        """Prepends positions that must run again to new positions, `[positions, hidden]`; returns the input of the
        pass. The pass counts only after `advance`."""
        if self._states is None:
            self.computed = self.length  # a pass that was cut may have failed
            return hidden
        if self.computed > self.length:  # a pass has failed
            self.computed = self._states.rewind(self.length)
        inputs, _ = self.store("inputs", self.length, hidden[None, None], hidden[None, None, :, :0])
        given = inputs[0, 0, self.computed :]
        self._states.begin_pass(self.computed, len(given))
        return given

    def begin_rerun(self, most: int) -> Tensor | None:
        """The first positions that must run again, at most `most`, `[positions, hidden]`; None: there are none."""
        if self._states is None or self.computed >= self.length:
            return None
        given = self._blocks["inputs"].keys[0, 0, self.computed : min(self.length, self.computed + most)]
        self._states.begin_pass(self.computed, len(given))
        return given

    def state_layer(self, block_index: int) -> StateLayer:
        """The states of a block, for the running pass. Raises LookupError if rows of the span keep no states."""
        if self._states is None:
            raise LookupError("some blocks keep a state other than a KV cache")
        return self._states.layer(block_index)

    def store(self, key: int | str, position: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As `append`, from `position` on, for a block or for another tensor with one entry per position."""
        start = self._before(key) + position
        end = start + keys.shape[2]
        block = self._with_room(key, keys, values, end)
        if not self._has_codes(key):
            block.keys[:, :, start:end] = keys
            block.values[:, :, start:end] = values
            return block.keys[:, :, :end].to(keys.dtype), block.values[:, :, :end].to(values.dtype)
        seen = self._seen(key, block, start, (keys, values), max(block.near_from, start - WINDOW + 1))
        self._write(block, start, keys, values)
        return seen

    def _has_codes(self, key: int | str) -> bool:
        """Whether `key` is a block whose keys and values are codes."""
        return self.form is not None and self.form.coded and not isinstance(key, str)

    def _seen(
        self, key: int | str, block: _Block, start: int, new: Sequence[Tensor], since: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the positions before `start`, in full from `since` on, followed by `new`."""
        if not self._has_codes(key):
            return block.keys[:, :, :start], block.values[:, :, :start]
        assert self.form is not None
        keys = self.form.read_positions(block.keys, block.near[0], since, start, new[0])
        return keys, self.form.values.read_positions(block.values, block.near[1], since, start, new[1])

    def _write(self, block: _Block, start: int, keys: Tensor, values: Tensor) -> None:
        assert self.form is not None
        self.form.write_positions(block.keys, block.near[0], start, keys)
        self.form.values.write_positions(block.values, block.near[1], start, values)
        block.wrote(start, start + keys.shape[2])

    def reserve(
        self, indices: tuple[int, ...], count: int, shapes: Sequence[tuple[int, int]], dtype: torch.dtype
    ) -> Tensor:
        """Makes room for `count` new positions in blocks, for code that writes to their memory.

        `shapes`: heads and head size of keys and of values. Returns int64 `[blocks, 6]`, valid until the next call: the
        addresses of a block's keys and of its values, and their capacity; with codes also the addresses of keys and of
        values in full, and the first of the last positions in full.
        """
        end = self.prefix_length + self.length + count
        known = self._places.get(indices)
        if known is None or known[0] < end:
            keys, values = (torch.empty(1, heads, 0, size, dtype=dtype) for heads, size in shapes)
            blocks = [self._with_room(index, keys, values, end) for index in indices]
            expected = torch.float16 if self.form is not None and not self.form.coded else dtype
            for block in blocks:
                for tensor, shape in zip(block.numbers, shapes, strict=True):
                    if tensor.dtype != expected or (tensor.shape[1], tensor.shape[3]) != shape:
                        raise RuntimeError("keys and values of this row have another type or shape")
            stores = torch.tensor([block.addresses for block in blocks])
            known = self._places[indices] = int(stores[:, 2].min()), stores
        if self.form is not None and self.form.coded:
            for index in indices:
                self._blocks[index].wrote(end - count, end)
            known[1][:, 5] = torch.tensor([self._blocks[index].near_from for index in indices])
        return known[1]

    def advance(self, count: int) -> None:
        """Counts `count` positions that all blocks have stored, and the positions that ran again before them."""
        self.length += count
        self.set_computed(self.length)

    def set_computed(self, length: int) -> None:
        """Records that keys, values and states include the first `length` positions."""
        if self._states is not None:
            self._states.commit()
        self.computed = length

    def _with_room(self, block_index: int | str, keys: Tensor, values: Tensor, end: int) -> _Block:
        """A block with memory for `end` positions. A new block has the shapes and types of `keys` and `values`."""
        before = self._before(block_index)
        block = self._blocks.get(block_index)
        if block is None:
            capacity = self._capacity(block_index, end, 0)
            block = self._blocks[block_index] = self._new_block(block_index, keys, values, capacity)
            prefix = self._prefix.get(block_index)
            if prefix is not None:
                if not self._has_codes(block_index):
                    block.keys[:, :, :before], block.values[:, :, :before] = prefix.keys, prefix.values
                else:
                    self._write(block, 0, prefix.keys, prefix.values)
                self._prefix[block_index] = None
        elif end > block.keys.shape[2]:
            held = max(self.length, self.computed)  # `computed` is larger while a pass runs position by position
            self._move(block, self._capacity(block_index, end, block.keys.shape[2]), before + held)
        return block

    def _new_block(self, key: int | str, keys: Tensor, values: Tensor, capacity: int) -> _Block:
        """A block without positions, for keys and values of these shapes and types."""
        if self.form is None or isinstance(key, str):
            return _Block(_grown(keys, capacity, 0), _grown(values, capacity, 0))
        own = self.form.encode(keys[:, :, :0]), self.form.values.encode(values[:, :, :0])
        held = [_grown(tensor, capacity, 0) for tensor in own]
        if not self.form.coded:
            return _Block(held[0], held[1])
        return _Block(held[0], held[1], tuple(_grown(tensor, SINKS + RING, 0) for tensor in (keys, values)))

    def _move(self, block: _Block, capacity: int, held: int) -> None:
        block.keys = _grown(block.keys, capacity, held)
        block.values = _grown(block.values, capacity, held)
        self._places.clear()

    def _before(self, block_index: int | str) -> int:
        return self.prefix_length if block_index in self._prefix else 0

    def _capacity(self, block_index: int | str, needed: int, current: int) -> int:
        if self._room is not None and needed <= self._before(block_index) + self._room:
            return self._before(block_index) + self._room
        capacity = max(FIRST_CAPACITY, current)
        while capacity < needed:
            capacity *= 2
        return capacity


class TracedSequence(SequenceCache):
    """A row that stores nothing and records gradients: a whole sequence passes at once, from its beginning."""

    def append(self, block_index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        prefix = self._prefix.get(block_index)
        if prefix is None:
            return keys, values
        return torch.cat((prefix.keys.to(keys), keys), 2), torch.cat((prefix.values.to(values), values), 2)


def _grown(tensor: Tensor, capacity: int, kept: int) -> Tensor:
    """A tensor like `tensor` with room for `capacity` positions, with the first `kept` positions of `tensor`."""
    grown = new_empty(tensor, (*tensor.shape[:2], capacity, tensor.shape[3]))
    if kept:
        grown[:, :, :kept] = tensor[:, :, :kept]
    return grown


class PassThrough(Cache):
    """The cache for a backbone whose attention function writes to the rows itself."""

    def __init__(self) -> None:
        self.layers = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states


class OneSequence(Cache):
    """One row as the cache of a backbone that runs one sequence at a time with its own attention code."""

    def __init__(self, row: SequenceCache) -> None:
        self.layers = []
        self._row = row

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return self._row.append(layer_idx, key_states, value_states)

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Keys by which a block with sparse attention chooses positions: `[1, positions, size]`."""
        keys = indexer_key_states[:, None]
        return self._row.store(f"indexer {layer_idx}", self._row.computed, keys, keys[..., :0])[0][:, 0]

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        layer = self._row.state_layer(layer_idx)
        return layer.own(layer.conv_states, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        layer = self._row.state_layer(layer_idx)
        return layer.own(layer.recurrent_states, state_idx)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        return self._row.state_layer(layer_idx).update_conv_state(conv_states, state_idx, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: object
    ) -> Tensor:
        return self._row.state_layer(layer_idx).update_recurrent_state(recurrent_states, state_idx, **kwargs)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self._row.computed > 0

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def increase_count(self, layer_idx: int, state_idx: int) -> None:
        """Does nothing, because the row counts its positions itself."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._row.prefix_length + self._row.computed

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._row.prefix_length + self._row.computed + query_length, 0

    # All positions are kept, and the mask alone applies the window: an empty `layers` tells transformers so.
