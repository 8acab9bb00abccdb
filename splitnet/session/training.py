"""Forward and backward passes over whole sequences along a route: for training, and for logits without a cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from scheduler.liveness import PASS_PROGRESS_S
from splitnet.blocks.adapters import AdapterTensors
from splitnet.blocks.block_inputs import PositionInputs, encode_step
from splitnet.errors import NotFinite, SplitnetError
from splitnet.session.driver import LinkCodecs, SessionDriver
from splitnet.session.events import Backward, Submit, UseAdapter
from splitnet.session.options import ConnectionOptions
from splitnet.session.requests import BackwardState, Batch, PassRequest
from splitnet.swarm.swarm import Swarm
from splitnet.wire.codecs import Codec, are_finite, check_finite, codec_by_code, codec_by_name, encode_finite
from splitnet.wire.messages import MAX_PAYLOAD_BYTES, Forward, Gradient, Result, chunks_of

MICRO_BATCHES_PER_HOP = 2  # micro-batches of a batch per hop, so that all hops compute most of the time
MIN_POSITIONS = 64
MAX_POSITIONS = 512  # of a micro-batch: fewer use devices badly, more make hops wait for each other
LOSSY_GRADIENT_CODEC = "bf16"


@dataclass(slots=True)
class Passed:
    """A batch after its forward pass, with the state that its backward pass needs."""

    passes: list[PassRequest]
    adapter: AdapterTensors | None


class PassSession(SessionDriver):
    """A route for whole sequences without KV caches. One thread uses it at a time.

    A batch is cut into micro-batches, which flow through the hops one after the other. When a hop dies, micro-batches
    under way or before their backward pass are repeated: the same bytes give the same gradients.

    options, blocks: see `splitnet.session.driver.SessionDriver`.
    """

    def __init__(self, swarm: Swarm, options: ConnectionOptions, *, blocks: tuple[int, int] | None = None) -> None:
        super().__init__(
            swarm,
            options,
            reservation=1,
            codecs=LinkCodecs(swarm, options.codec, exact_embeddings=blocks is None or not blocks[0]),
            blocks=blocks,
            in_flight=MICRO_BATCHES_PER_HOP * 4,
            progress_timeout_s=PASS_PROGRESS_S,
        )
        self._gradient_codec = options.gradient_codec
        if self._gradient_codec != "auto":
            codec_by_name(self._gradient_codec)
        self._kept: set[int] = set()
        self._forgotten: deque[list[int]] = deque()

    def forward(
        self,
        hidden: torch.Tensor,
        lengths: Sequence[int],
        adapter: AdapterTensors | None = None,
        *,
        keep: bool,
        rope_length: int,
        inputs: Sequence[PositionInputs] = (),
    ) -> tuple[torch.Tensor, Passed]:
        """Runs sequences through all blocks.

        Args:
            hidden: `[positions, hidden]`: the sequences one after the other.
            lengths: positions of each sequence.
            keep: `backward` or `forget_batch` will follow.
            rope_length: see `splitnet.wire.messages.Forward`.
            inputs: block inputs of each sequence; empty: none.

        Returns:
            `[positions, hidden]` float32, and the argument of `backward`.

        Raises:
            PeerLost, CoverageError, PeerFailed, PeerBusy, ContextTooLong: as in `Session.step`.
            AdapterError: the adapter does not fit the blocks.
            NotFinite: `hidden` or the adapter holds inf or NaN, or two peers of the same blocks compute inf or NaN from
                finite values.
            CodecError: block inputs cannot be encoded.
        """
        self._open_with_adapter(adapter)
        while self._forgotten:
            self._kept.difference_update(self._forgotten.popleft())
        state, codec, batch = self.state, self.state.first_codec, Passed([], adapter)
        inputs = [own.of_blocks(*state.blocks) for own in inputs]
        check_finite(codec, hidden, *(values for own in inputs for values in own.added.values()))
        groups = self._micro_batches(lengths, 1 + max((len(own.added) for own in inputs), default=0))
        parts, each = zip(groups, hidden.split([sum(group) for group in groups]), strict=True), iter(inputs)
        encoded = [encode_step(part, chunks_of(group), [*islice(each, len(group))], codec) for group, part in parts]
        for group, (payload, described) in zip(groups, encoded, strict=True):
            number = state.next_number()
            if keep:
                self._kept.add(number)
            ids, since = (self.id, state.epoch, number), min(self._kept, default=number)
            how = keep, self._version(adapter), self._codec_of_gradients().code, codec.code
            message = Forward(*ids, since, tuple(group), *how, payload, rope_length=rope_length, inputs=described)
            batch.passes.append(PassRequest(message))
        self.traffic.steps += len(batch.passes)
        self.traffic.positions += len(hidden)
        self.feed(Submit(tuple(batch.passes)))
        self._wait_for_batch(batch)
        self.count_energy(request.result for request in batch.passes)
        return torch.cat([self._decode_result(request.result, request) for request in batch.passes]), batch

    def backward(self, batch: Passed, gradient: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Gradients of a loss with respect to the inputs of `forward`, once per batch. Raises as `forward`.

        Args:
            batch: the result of `forward` with `keep`.
            gradient: the gradient of the loss with respect to the output, `[positions, hidden]`.

        Returns:
            The gradients with respect to `hidden`, `[positions, hidden]` float32, and to the adapter's tensors.
        """
        self.forget_batch(batch)
        self._open_with_adapter(batch.adapter)
        codec = self._codec_of_gradients()
        together = Batch(batch.passes)
        parts = gradient.split([request.message.positions for request in batch.passes])
        payloads = [encode_finite(codec, part) for part in parts]
        for request, payload in zip(batch.passes, payloads, strict=True):
            request.back = BackwardState(together, codec.code, payload)
        self.feed(Backward(together, self._version(batch.adapter)))
        self._wait_for_batch(batch)
        self.count_energy(request.gradient for request in batch.passes)
        by_input = torch.cat([self._decode_result(request.gradient, request) for request in batch.passes])
        return by_input, together.by_adapter

    def forget_batch(self, batch: Passed) -> None:
        """Gives up the backward pass of a batch; peers free its memory at the next pass. Any thread may call this."""
        self._forgotten.append([request.number for request in batch.passes])

    def _version(self, adapter: AdapterTensors | None) -> int:
        return self.state.adapter_version if adapter is not None else 0

    def _open_with_adapter(self, adapter: AdapterTensors | None) -> None:
        """Opens a route whose blocks run with an adapter; sends the adapter only if it has changed."""
        if adapter is not None and adapter is not self.state.adapter:
            if not are_finite(adapter.tensors.values()):
                raise NotFinite("the adapter holds inf or NaN: go back to an earlier state of the adapter")
            self.feed(UseAdapter(adapter, for_passes=True))
        self.open()

    def _wait_for_batch(self, batch: Passed) -> None:
        try:
            self._wait_for(batch.passes)
        except SplitnetError:
            self.forget_batch(batch)
            raise

    def _codec_of_gradients(self) -> Codec:
        if self._gradient_codec != "auto":
            return codec_by_name(self._gradient_codec)
        exact = self.state.first_codec.name == "none" and all(hop.codec.name == "none" for hop in self.hops)
        return codec_by_name("none" if exact else LOSSY_GRADIENT_CODEC)

    def _decode_result(self, answer: Result | Gradient | None, request: PassRequest) -> torch.Tensor:
        assert answer is not None
        size = request.message.positions, self._swarm.facts.hidden_size
        return codec_by_code(answer.codec).decode(answer.payload, *size)

    def _micro_batches(self, lengths: Sequence[int], states: int) -> list[list[int]]:
        """Groups sequences into micro-batches; no sequence is cut. states: hidden states of a position."""
        wanted = -(-sum(lengths) // (MICRO_BATCHES_PER_HOP * len(self.hops)))
        most = min(MAX_POSITIONS, MAX_PAYLOAD_BYTES // (4 * states * self._swarm.facts.hidden_size))
        limit = min(max(wanted, MIN_POSITIONS), most)
        groups: list[list[int]] = [[]]
        for length in lengths:
            if groups[-1] and sum(groups[-1]) + length > limit:
                groups.append([])
            groups[-1].append(length)
        return groups
