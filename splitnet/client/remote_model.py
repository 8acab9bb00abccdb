"""What all transformers models with remote blocks have: the swarm, and hooks that tell the blocks of every call."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

from splitnet.client.cache import RemoteCache
from splitnet.client.local_blocks import Blocks, LocalBlocks
from splitnet.client.local_share import choose_local_blocks
from splitnet.client.pass_session import PassSession
from splitnet.client.remote import RemoteBlocks
from splitnet.client.swarm import ModelFacts, Swarm
from splitnet.client.trained_prompts import take_prefix
from splitnet.model.checkpoint import Checkpoint
from splitnet.model.shell import backbone_of, outline_in
from splitnet.net.identity import Identity

log = logging.getLogger(__name__)

AUTO = "auto"


class RemoteModel(PreTrainedModel):
    """What a model with remote blocks has beyond its transformers class. Without more it uses no caches."""

    swarm: Swarm
    transformers_class: type[PreTrainedModel]

    def connect_blocks(self, blocks: RemoteBlocks, swarm: Swarm) -> None:
        """Lets `blocks` see the mask, the cache and the prefix of every forward pass."""
        self.swarm = swarm
        self._blocks = blocks
        blocks.adapters.outline = outline_in(self)
        self.register_forward_pre_hook(self._before_model, with_kwargs=True)
        self.register_forward_hook(self._after_model, with_kwargs=True, always_call=True)
        backbone_of(self).register_forward_pre_hook(self._before_backbone, with_kwargs=True)

    @property
    def training_bytes(self) -> tuple[int, int]:
        """Bytes that training, and evaluation without a cache, have sent and received on the client's own links."""
        return self._blocks.passes_moved

    @property
    def local_spans(self) -> list[Blocks]:
        """The blocks `[start, end)` that run here and not on peers."""
        return self._blocks.local_spans

    def close(self) -> None:
        """Leaves the swarm."""
        self._blocks.close()
        self.swarm.close()

    def _get_name(self) -> str:
        # transformers' Trainer looks it up among those it knows, to tell how labels belong to positions.
        return self.transformers_class.__name__

    def _before_model(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._blocks.call.prefix = take_prefix(kwargs, args[0] if args else None)
        return args, kwargs

    def _after_model(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        call = self._blocks.call
        call.mask, call.cache, call.keep, call.prefix = None, None, 0, ()

    def _before_backbone(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cache = self._cache_for(kwargs.get("cache"), bool(kwargs.get("use_cache")))
        if cache is not None:
            kwargs["cache"] = cache
        else:
            # Otherwise transformers would make a local cache for blocks that aren't local.
            kwargs["use_cache"] = False
        self._blocks.call.cache = cache
        self._blocks.call.mask = kwargs.get("attention_mask")
        return args, kwargs

    def _cache_for(self, given: Any, wanted: bool) -> RemoteCache | None:
        """The cache that a call uses; None: it is a pass over whole sequences.

        Args:
            given: what the caller has passed as the cache.
            wanted: whether the call is to use one.

        Raises:
            TypeError: `given` is none that this model can use.
        """
        if given is not None:
            raise TypeError("this model runs whole sequences, without a cache: leave out `cache`")
        return None


Model = TypeVar("Model", bound=RemoteModel)


def made_remote(model: PreTrainedModel, remote_class: type[Model], source: str) -> Model:
    """Gives a shell the methods of `remote_class`, which come before those of its transformers class.

    Args:
        source: hub id or folder of the checkpoint; PEFT notes it in the adapters that it saves.
    """
    original = type(model)
    members = {"transformers_class": original}
    model.__class__ = type(f"Remote{original.__name__}", (remote_class, original), members)
    assert isinstance(model, remote_class)
    model.name_or_path = source
    model.eval()
    return model


def local_part(
    checkpoint: Checkpoint, swarm: Swarm, *, codec: str, blocks: str | None, device: str, weights: str | None
) -> LocalBlocks:
    """The blocks that run here; for the options see `AutoModelForCausalLM`."""
    if blocks == AUTO:
        blocks = choose_local_blocks(checkpoint, swarm, codec=codec, device=device, weights=weights)
        log.info("local blocks: %s", blocks or "none")
    return LocalBlocks.load(checkpoint, blocks, device=device, weights=weights)


def remote_blocks(
    checkpoint: Checkpoint,
    swarm: Swarm,
    local: LocalBlocks,
    *,
    codec: str,
    gradient_codec: str,
    recovery_timeout_s: float,
) -> RemoteBlocks:
    """What stands in the place of the blocks of `checkpoint`; for the options see `AutoModelForCausalLM`."""

    def open_passes(blocks: Blocks) -> PassSession:
        return PassSession(
            swarm,
            codec=codec,
            gradient_codec=gradient_codec,
            recovery_timeout_s=recovery_timeout_s,
            blocks=blocks,
        )

    return RemoteBlocks(local.stages, open_passes, checkpoint.max_positions)


@contextmanager
def joined(
    model: str | Path, *, initial_peers: Sequence[str], identity: Identity | None, revision: str | None
) -> Iterator[tuple[Checkpoint, Swarm]]:
    """Opens a checkpoint and joins its swarm, and leaves it again if the `with` ends in an error.

    Raises:
        ModelNotFound, UnsupportedModel: the model cannot be used.
        DirectoryError: no initial peer answers.
    """
    checkpoint = Checkpoint.open(model, revision=revision)
    swarm = Swarm(ModelFacts.of(checkpoint), initial_peers, identity=identity or Identity.load_or_create())
    try:
        yield checkpoint, swarm
    except BaseException:
        swarm.close()
        raise
