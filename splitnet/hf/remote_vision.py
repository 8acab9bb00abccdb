"""Features of images from peers that have the vision tower of the model, for clients without the memory."""

from __future__ import annotations

import functools
import inspect
import math
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, Final

import torch
from torch import Tensor

from splitnet.blocks.client_part import ImageTextLayout
from splitnet.blocks.vision import (
    GRID,
    MASK,
    PIXELS,
    Features,
    check_family,
    pack_images,
    split_images,
    unpack_features,
)
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.directory.record import PeerRecord
from splitnet.errors import CoverageError, PeerFailed, PeerLost, SplitnetError
from splitnet.hf.parameters import refuse
from splitnet.hf.remote_model import MEMORY_SHARE
from splitnet.quant.device import free_memory
from splitnet.quant.packed_tensor import as_dtype
from splitnet.session.blame import error_of
from splitnet.session.options import ConnectionOptions
from splitnet.swarm.swarm import Swarm
from splitnet.wire.codecs import EXACT, codec_by_name
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import MAX_PAYLOAD_BYTES, Failure, ImageFeatures, ImageTensor, Message, ReadImages

LOOK_S: Final = 5.0  # a peer that neither answers a ping nor receives bytes for this time is left
ANSWER_S: Final = 600.0  # for one image
FAILED_S: Final = 60.0  # for this time after a failure other peers are asked first


def is_read_at_peers(checkpoint: Checkpoint, swarm: Swarm, options: ConnectionOptions) -> bool:
    """Whether peers run the vision tower. Raises UnsupportedModel: the option says so, and peers do not read images of
    the family."""
    if options.vision == "auto":
        towers = ImageTextLayout.of(checkpoint).towers
        size = checkpoint.bytes_of(towers, as_dtype(options.dtype))
        if size <= MEMORY_SHARE * free_memory(torch.device(options.device)):
            return False
        if not any(record.reads_images for record in swarm.peers()):
            return False
    elif options.vision == "local":
        return False
    check_family(checkpoint)
    return True


class PeerFeatures:
    """In place of `get_image_features` of `module`: sends its tensors to a peer. Thread-safe.

    Raises CoverageError: no peer has read an image; UnsupportedParameter: a peer does not know an argument.
    """

    def __init__(self, module: Any, swarm: Swarm, codec: str) -> None:
        functools.update_wrapper(self, module.get_image_features)
        self._signature = inspect.signature(module.get_image_features)
        self._module, self._swarm = module, swarm
        self._hidden: int = module.config.get_text_config().hidden_size
        vision = module.config.vision_config
        self._levels = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())
        self._pixel_codec = EXACT if codec == EXACT else "fp16"
        self._codec = EXACT if codec == EXACT else "int8" if codec.startswith("int") else "bf16"
        self._failed: dict[str, float] = {}  # time of the last failure, by key

    def __call__(self, *args: Any, **kwargs: Any) -> Features:
        given = self._tensors(*args, **kwargs)
        levels: list[list[Tensor]] = [[] for _ in range(self._levels)]
        stacked = False
        for image in split_images(given):
            found, stacked = self._read(*pack_images(image, self._pixel_codec))
            for level, more in zip(levels, found, strict=True):
                level += [each.to(given[PIXELS].device, self._module.dtype) for each in more]
        made: list[Any] = [torch.stack(level) if stacked else level for level in levels]
        return Features(made[0], made[1:])

    def _tensors(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        bound = self._signature.bind(*args, **kwargs).arguments
        others = bound.pop("kwargs", {})
        given = {name: value for name, value in {**bound, **others}.items() if value is not None}
        tensors = {name: given.pop(name) for name in (PIXELS, GRID, MASK) if torch.is_tensor(given.get(name))}
        for name, value in given.items():
            is_known = not torch.is_tensor(value) and value == getattr(self._module.config, name, None)
            if name not in ("return_dict", "use_cache") and not is_known:
                raise refuse(name, "is not sent to peers that read images: leave it out, or give vision `local`")
        return tensors

    def _read(self, tensors: Sequence[ImageTensor], payload: bytes) -> tuple[list[list[Tensor]], bool]:
        """The features of images, by level, from the first peer that answers."""
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise refuse(PIXELS, f"take {len(payload) >> 20} MiB: give a smaller image, or vision `local`")
        told: list[str] = []
        for record in self._peers(len(payload)):
            try:
                codes = codec_by_name(self._pixel_codec).code, codec_by_name(self._codec).code
                ids = secrets.token_bytes(16), 0, 1, self._swarm.facts.fingerprint
                answer = self._ask(record.endpoint, ReadImages(*ids, *codes, tuple(tensors), payload))
                return unpack_features(answer, self._codec, self._hidden, self._levels), answer.stacked
            except SplitnetError as error:
                told.append(str(error))
                self._failed[record.key.text] = time.monotonic()
        why = f" ({'; '.join(told)})" if told else ""
        raise CoverageError(
            f"no peer of this swarm reads images of {self._swarm.facts.name}{why}: start one with "
            f"`{self._swarm.start_peer(0, 1)} --vision`, or give --vision local at this client"
        )

    def _peers(self, nbytes: int) -> list[PeerRecord]:
        """The peers that read images, the fastest first. Peers that have failed come last."""
        found = [one for one in self._swarm.peers() if one.reads_images]
        found = found or [one for one in self._swarm.peers(fresh=True, whole=True) if one.reads_images]
        now = time.monotonic()

        def cost(record: PeerRecord) -> tuple[bool, float]:
            link = self._swarm.link(None, record)
            failed = now - self._failed.get(record.key.text, -math.inf) < FAILED_S
            return failed, record.queue_ms + 2 * link.latency_ms + nbytes / link.bytes_per_ms

        return sorted((one for one in found if one.serves), key=cost)

    def _ask(self, endpoint: Endpoint, message: ReadImages) -> ImageFeatures:
        """Sends a question and waits for the answer. Raises SplitnetError: the peer refuses it, or is gone."""
        links, question = self._swarm.links, _Question(message.session, endpoint)
        links.register(question)
        try:
            links.send(endpoint, message)
            unsent, until = math.inf, time.monotonic() + ANSWER_S
            while time.monotonic() < until:
                pong = self._swarm.ping(endpoint, message.session)
                with suppress(TimeoutError):
                    answer = question.answer.result(LOOK_S)
                    if isinstance(answer, ImageFeatures):
                        return answer
                    raise PeerFailed(f"the peer at {endpoint.address} sent another answer")
                before, traffic = unsent, links.traffic(endpoint)
                unsent = traffic.unsent if traffic is not None else 0
                if not pong.done() and unsent >= before:  # pings wait behind pixels
                    raise PeerLost(f"the peer at {endpoint.address} does not answer")
                if pong.done() and not pong.result().holds and not question.answer.done():
                    break  # pongs come behind answers
            raise PeerLost(f"the peer at {endpoint.address} has given up the image")
        finally:
            links.unregister(question)


class _Question:
    """Receives one answer of one peer, see `splitnet.swarm.client_links.Subscriber`."""

    def __init__(self, name: bytes, asked: Endpoint) -> None:
        self.id, self._asked = name, asked
        self.answer: Future[Message] = Future()

    def deliver(self, source: Endpoint, message: Message) -> None:
        if isinstance(message, Failure):
            self.link_failed(source, error_of(message, source))
        elif source == self._asked:
            with suppress(InvalidStateError):
                self.answer.set_result(message)

    def link_failed(self, endpoint: Endpoint, error: SplitnetError) -> None:
        if endpoint == self._asked:
            with suppress(InvalidStateError):
                self.answer.set_exception(error)

    def close(self) -> None:
        self.link_failed(self._asked, PeerLost("this client was closed"))
