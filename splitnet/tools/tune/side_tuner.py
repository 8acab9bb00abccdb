"""Training of a side network: peers compute the states of all texts once; training steps then need no peer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from splitnet.errors import SplitnetError
from splitnet.hf.causal_lm import RemoteCausalLM
from splitnet.hf.peft_adapters import CONFIG_FILE, WEIGHTS_FILE
from splitnet.hf.side_network import SideNetwork
from splitnet.tools.tune.run import Encoded
from splitnet.tools.tune.states import States, parts_of, states_of

PASS_POSITIONS = 2048  # Maximum number of positions of texts in one pass through the blocks
FILE_VALUES = 64 << 20  # Approximate number of values of hidden states in one file


class SideTuner(nn.Module):
    """The model that training calls: a new side network for `model`, which reads hidden states from the disk."""

    loss_in_parts = True  # training may compute losses in parts, as with the model itself

    def __init__(
        self, model: RemoteCausalLM, width: int | None, states: States, rows: Sequence[Encoded], limit: int
    ) -> None:
        """Makes the side network. rows: all rows of later calls, see `compute_states`.

        Raises AdapterError if no network of this width is possible, and SplitnetError if the states need more than
        `limit` bytes.
        """
        super().__init__()
        model.requires_grad_(False)
        self.side = SideNetwork.beside(model.ends.hidden_size, model.ends.num_blocks, width).to(model.device)
        self._model = (model,)  # a tuple hides its parameters, which are not trained
        self.states = states
        # The different texts of later calls
        self.rows = [*{tuple(row.ids): row for row in rows}.values()]
        positions = sum(len(row.ids) for row in self.rows)
        self.disk_bytes = positions * (len(self.side.taps) + 1) * self.side.hidden_size * 2
        if self.disk_bytes > limit:
            raise SplitnetError(
                f"the hidden states of {len(self.rows):,} examples need {self.disk_bytes / 2**20:,.0f} MiB of disk, "
                f"and --states-limit is {limit / 2**20:,.0f} MiB: raise it, or give fewer or shorter examples"
            )
        self.training_bytes = 0, 0  # bytes sent and received on the client's own links
        self.training_joules = 0.0  # energy that the model counts for its passes
        self._places: dict[tuple[int, ...], tuple[Path, int]] = {}

    def compute_states(self, pad: int, say: Callable[[str], None], stopped: Sequence[int]) -> None:
        """Lets the peers compute the states of all rows that are not on the disk, until `stopped` is not empty.

        Raises DataError if the states cannot be written, and the errors of calling the model.
        """
        (model,), states, count = self._model, self.states, len(self.rows)
        positions = max(PASS_POSITIONS, FILE_VALUES // ((len(self.side.taps) + 1) * self.side.hidden_size))
        states.folder.claim({})
        there = {ids for ids, _, _ in states.text_places()}
        left = [row for row in self.rows if tuple(row.ids) not in there]
        if left:
            say(f"peers compute the hidden states of {count:,} examples, {self.disk_bytes / 2**20:,.0f} MiB ...")
        for some in parts_of(sorted(left, key=lambda row: len(row.ids)), positions):
            if stopped:
                return
            found = [self._computed(model, together, pad) for together in parts_of(some, PASS_POSITIONS)]
            states.add_texts(some, [one for each in found for one in each])
            say(f"states of {states.texts:,} of {count:,} examples, {states.nbytes / 2**20:,.0f} MiB")
        self._places = {ids: (path, first) for ids, path, first in states.text_places()}

    def _computed(self, model: RemoteCausalLM, rows: Sequence[Encoded], pad: int) -> list[Tensor]:
        longest = max(len(row.ids) for row in rows)
        ids = torch.tensor([[pad] * (longest - len(row.ids)) + row.ids for row in rows], device=model.device)
        mask = torch.tensor([[0] * (longest - len(row.ids)) + [1] * len(row.ids) for row in rows], device=model.device)
        cache = model.new_cache()
        cache.remote.reserve_step = 1  # many owners may use the same peers at the same time
        try:
            found = model.states_at(self.side.taps, ids, mask, cache)
            assert cache.session is not None
            traffic, (sent, received) = cache.session.traffic, self.training_bytes
            self.training_bytes = sent + traffic.bytes_sent, received + traffic.bytes_received
            self.training_joules += traffic.joules
        finally:
            cache.close()
        return [states[longest - len(row.ids) :] for states, row in zip(found, rows, strict=True)]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **given: Any) -> Any:
        """Calls the model with the side network, for rows of `compute_states` with padding on the right."""
        (model,) = self._model
        rows = [row[kept.bool()].tolist() for row, kept in zip(input_ids, attention_mask, strict=True)]
        states = [states_of(*self._places[tuple(row)], len(row)) for row in rows]
        padded = nn.utils.rnn.pad_sequence(states, batch_first=True).to(model.device)
        with model.beside_states(self.side, padded):
            return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **given)

    def save_pretrained(self, folder: str, **_: Any) -> None:
        """Saves the side network; training calls this method as it calls the method of PEFT models."""
        base = self._model[0].name_or_path
        self.side.save(Path(folder) / CONFIG_FILE, Path(folder) / WEIGHTS_FILE, base)
