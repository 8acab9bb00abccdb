"""The base of all transformers models with remote blocks: the swarm, and the context of calls for the blocks."""

from __future__ import annotations

import functools
import inspect
import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from splitnet.blocks.client_part import backbone_of, outline_in
from splitnet.blocks.span import RowChunk, Span, block_bytes
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.families import RopeLengths, can_cut, has_attention
from splitnet.checkpoint.transfer.fetching import PeerQuestions, Report
from splitnet.checkpoint.transfer.manifest import Manifest
from splitnet.checkpoint.transfer.manifest_search import differs, find_manifest
from splitnet.directory.joining import join
from splitnet.errors import CoverageError, ModelNotFound, PeerBusy, UnsupportedModel
from splitnet.hf.cache import RemoteCache
from splitnet.hf.parameters import check_forward
from splitnet.hf.peft_adapters import take_prefix
from splitnet.hf.remote_blocks import CallArguments, RemoteBlocks
from splitnet.paths import public_name
from splitnet.quant.device import free_memory, seconds_after_work
from splitnet.security.identity import AuthorizedKeys, Identity, PublicKey
from splitnet.security.swarm_key import OPEN, SwarmKey
from splitnet.session.driver import LinkCodecs
from splitnet.session.local import Blocks, load_stages
from splitnet.session.options import ConnectionOptions
from splitnet.session.training import PassSession
from splitnet.swarm.client_links import Links
from splitnet.swarm.plan import Needs, PlannedHop
from splitnet.swarm.swarm import ModelFacts, Swarm

log = logging.getLogger(__name__)

AUTO = "auto"
MEMORY_SHARE = 0.5  # of the free memory, at most, for weights that "auto" loads here: caches need memory, too
TIMED_STEPS = 5


def learn_manifest(
    checkpoint: Checkpoint,
    addresses: Sequence[str],
    identity: Identity,
    *,
    swarm_key: SwarmKey | None = None,
    trusted: AuthorizedKeys | None = None,
    expected: str | None = None,
    report: Report = lambda stage, done, total: None,
) -> None:
    """Finds in a swarm the manifest of a model that fits all local files of the model.

    trusted: keys of the peers that may be asked; None: any. expected: the fingerprint of the model; None: there must be
    only one fitting manifest with the model's name.

    Raises:
        ModelNotFound: no manifest fits, or several do.
        DirectoryError: the swarm does not answer.
    """
    swarm = swarm_key or OPEN
    links = Links(identity)

    def allows(key: PublicKey) -> bool:
        return trusted is None or trusted.allows(key.curve_raw)

    def why_not(manifest: Manifest, heads: Sequence[bytes]) -> str:
        return differs(manifest, checkpoint.store, lambda done, total: report("check the weights", done, total))

    try:
        with join(addresses, lambda: links, swarm=swarm) as directory, PeerQuestions(identity, swarm) as asking:
            how: dict[str, Any] = {"joined": addresses, "allows": allows, "accept": why_not, "report": report}
            found = find_manifest(directory, asking, checkpoint.name, expected=expected, **how)
    finally:
        links.close()
    if found is None:
        raise ModelNotFound(
            f"not all of {checkpoint.name} is on this machine, and no peer of this swarm tells what it is: join a "
            "swarm that serves it, or download all of it"
        )
    checkpoint.adopt(found[0])


def choose_local_blocks(
    checkpoint: Checkpoint, swarm: Swarm, *, codec: str, device: str, weights: str | None
) -> str | None:
    """The range of first blocks, for `load_stages`, with the lowest latency per token; None: no blocks. Prefers fewer.

    Raises CoverageError, PeerBusy: no peer runs the blocks for which the client lacks memory.
    """
    blocks = checkpoint.num_blocks
    size = block_bytes(checkpoint, None, weights, device)
    most = min(blocks, int(MEMORY_SHARE * free_memory(torch.device(device)) / size))
    encodings = LinkCodecs(swarm, codec).encodings
    # Between the ends of spans, the cost is linear in the number of blocks.
    edges = {edge for record in swarm.peers() for edge in (record.start, record.end) if edge <= most}
    routes: dict[int, tuple[Needs, list[PlannedHop]]] = {}
    problem: CoverageError | PeerBusy | None = None
    for first in filter(functools.partial(can_cut, checkpoint.config), {0, most, *edges}):
        needs = Needs(1, encodings, (first, blocks))
        try:
            routes[first] = needs, swarm.plan_route(needs) if first < blocks else []
        except (CoverageError, PeerBusy) as error:
            problem = error
    if problem and not routes:
        raise problem
    # Planning also measures, so routes are compared after the last plan.
    costs = {first: swarm.planner.cost_ms(needs, hops) if hops else 0.0 for first, (needs, hops) in routes.items()}
    block_ms = _block_ms(checkpoint, device, weights) if most else 0.0
    share = min(costs, key=lambda first: (first * block_ms + costs[first], first))
    return f"0:{share}" if share else None


def _block_ms(checkpoint: Checkpoint, device: str, weights: str | None) -> float:
    """Ms of a decode step through the first block, in this process."""
    span = Span.load(checkpoint, 0, 1, device=device, weights=weights)
    row = span.new_row()
    hidden = torch.randn(1, span.hidden_size, generator=torch.Generator().manual_seed(0))
    times: list[float] = []
    for position in range(1 + TIMED_STEPS):
        began = seconds_after_work(span.device)
        span.forward(hidden, [RowChunk(row, position, 1)])
        times.append((seconds_after_work(span.device) - began) * 1000)
    return statistics.median(times[1:])


class RemoteModel(PreTrainedModel):
    """Methods of a model with remote blocks beyond its transformers class. This base uses no caches."""

    swarm: Swarm
    transformers_class: type[PreTrainedModel]

    def connect_blocks(self, blocks: RemoteBlocks, swarm: Swarm) -> None:
        """Passes the mask, the cache and the prefix of every call to `blocks`."""
        self.swarm = swarm
        self.local_spans = blocks.local_spans  # the blocks `[start, end)` of this process
        self._blocks = blocks
        blocks.adapters.outline = outline_in(self)
        blocks.handed = outline_in(self)[-1].handed
        self._backbone_parameters = frozenset(inspect.signature(backbone_of(self).forward).parameters)
        _stand_around(backbone_of(self), self._call_backbone)
        _stand_around(self, self._call_model)

    @property
    def training_bytes(self) -> tuple[int, int]:
        """Bytes that training and evaluation without a cache have sent and received on the client's links."""
        moved = [passes.traffic for passes in self._blocks.passes.values()]
        return sum(traffic.bytes_sent for traffic in moved), sum(traffic.bytes_received for traffic in moved)

    @property
    def training_joules(self) -> float:
        """Energy that peers have spent on these passes; nan: not all peers report their watts (docs/energy.md)."""
        return sum(passes.traffic.joules for passes in self._blocks.passes.values())

    @property
    def peft_config(self) -> Mapping[str, Any]:
        """The configs of adapters on layers, by name. PEFT sets this with the first adapter.

        Setting raises AdapterError: peers cannot run the adapter.
        """
        if self._blocks.adapters.configs is None:
            raise AttributeError("there are no adapters on this model")
        return self._blocks.adapters.configs

    @peft_config.setter
    def peft_config(self, configs: Mapping[str, Any]) -> None:
        self._blocks.adapters.configs = configs
        self._blocks.adapters.check_blocks()

    @peft_config.deleter
    def peft_config(self) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._blocks.adapters.configs = None

    def close(self) -> None:
        """Closes all sessions and leaves the swarm."""
        self._blocks.close()
        self.swarm.close()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Raises UnsupportedModel: the blocks are on peers. PEFT's `save_pretrained` writes trained adapters."""
        raise UnsupportedModel(
            f"the blocks of {self.name_or_path} are on peers, so a checkpoint from here would lack them: keep "
            f"{self.name_or_path}, and save what was trained with peft_model.save_pretrained(FOLDER)"
        )

    def get_submodule(self, target: str) -> nn.Module:
        # PEFT looks for embeddings by this name, then for a parameter of their size, which quantized embeddings lack.
        return self.get_input_embeddings() if target == "embeddings.word_embeddings" else super().get_submodule(target)

    def _call_model(self, forward: Callable[..., Any], given: dict[str, Any]) -> Any:
        prefix = take_prefix(given, self)
        with self._blocks.calling(prefix=prefix, keep=self._kept_positions(given)):
            return forward(**given)

    def _call_backbone(self, forward: Callable[..., Any], given: dict[str, Any]) -> Any:
        instead = self._blocks.call.backbone
        return instead(lambda: self._run_backbone(forward, given)) if instead else self._run_backbone(forward, given)

    def _run_backbone(self, forward: Callable[..., Any], given: dict[str, Any]) -> Any:
        if "past_key_values" in given:  # the former name of the argument
            given.setdefault("cache", given.pop("past_key_values"))
        check_forward(self._arguments_to_check(given), self.config, self._backbone_parameters)
        cache = self._cache_for(given.get("cache"), bool(given.get("use_cache")))
        if cache is not None:
            given["cache"] = cache
        else:
            # Otherwise transformers makes a local cache for remote blocks.
            given["use_cache"] = False
        call = self._blocks.call
        # Families without attention omit the mask after the prompt in their generation.
        no_masks_later = not has_attention(self.config.get_text_config())

        def run(hidden: Any) -> Any:
            arguments = self._call_arguments(hidden, given, 0 if cache is None else cache.remote.columns)
            if cache is None:
                output = self._blocks.run_whole(hidden, arguments, call.prefix)
                if call.seen is not None:
                    call.seen(output)
                return output
            layer, (mask, positions, inputs) = cache.remote, arguments
            seen = layer.mask(hidden.shape[1]) if mask is None and layer.columns and no_masks_later else mask
            return self._blocks.step(cache, hidden, seen, positions, call, inputs)

        with self._blocks.calling(run=call.run or run):
            return forward(**given)

    def _arguments_to_check(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the backbone that `check_forward` checks."""
        return given

    def _call_arguments(self, hidden: torch.Tensor, given: dict[str, Any], past: int) -> CallArguments:
        """What the blocks read besides `hidden`, `[batch, new, hidden]`, in a call of the backbone after `past` cached
        columns."""
        return CallArguments(given.get("attention_mask"), given.get("position_ids"))

    def _kept_positions(self, given: Mapping[str, Any]) -> int:
        """Number of last positions that the head needs in a call; 0: all."""
        return 0

    def _cache_for(self, given: Any, wanted: bool) -> RemoteCache | None:
        """The cache of a call; None: a pass over whole sequences. given: the caller's cache, if any.

        Raises TypeError: this model cannot use the caller's cache.
        """
        if given is not None:
            raise TypeError("this model runs whole sequences, without a cache: leave out `cache`")
        return None


def _stand_around(module: nn.Module, call: Callable[[Callable[..., Any], dict[str, Any]], Any]) -> None:
    """Replaces `forward` of a module by `call`, which gets the original `forward` and the arguments by name."""
    inner = module.forward
    signature = inspect.signature(inner)
    rest = next((name for name, one in signature.parameters.items() if one.kind is one.VAR_KEYWORD), "")

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not args:
            return call(inner, kwargs)
        given = signature.bind(*args, **kwargs).arguments
        others = given.pop(rest, {})
        return call(inner, {**given, **others})

    module.forward = forward


Model = TypeVar("Model", bound=RemoteModel)


def made_remote(model: PreTrainedModel, remote_class: type[Model], source: str) -> Model:
    """Adds the methods of `remote_class` to a model, before the methods of its transformers class.

    source: hub id or folder of the checkpoint, which PEFT writes into adapters.
    """
    original = type(model)
    # transformers' Trainer looks up the class's name to find whether labels are shifted.
    members = {"transformers_class": original, "_get_name": lambda _: original.__name__}
    model.__class__ = type(f"Remote{original.__name__}", (remote_class, original), members)
    assert isinstance(model, remote_class)
    model.name_or_path = model.config._name_or_path = public_name(source)
    model.eval()
    return model


def remote_blocks(checkpoint: Checkpoint, swarm: Swarm, options: ConnectionOptions) -> RemoteBlocks:
    """The module in place of the blocks of `checkpoint`: local blocks, and remote ones that peers run."""
    local, device, weights = options.local_blocks, options.device, options.held_as
    if local == AUTO:
        local = choose_local_blocks(checkpoint, swarm, codec=options.codec, device=device, weights=weights)
        log.info("local blocks: %s", local or "none")

    def open_passes(blocks: Blocks) -> PassSession:
        return PassSession(swarm, options, blocks=blocks)

    stages = load_stages(checkpoint, local, device=device, weights=weights)
    return RemoteBlocks(stages, open_passes, checkpoint.max_positions, RopeLengths(checkpoint.config))


@contextmanager
def joined(model: str | Path, options: ConnectionOptions) -> Iterator[tuple[Checkpoint, Swarm]]:
    """Opens a checkpoint and joins its swarm; leaves the swarm if the `with` block raises.

    Raises ModelNotFound, UnsupportedModel, DirectoryError, KeyFileError: see `from_pretrained`.
    """
    known: dict[str, Any] = {"swarm_key": options.load_swarm_key(), "trusted": options.load_trusted()}
    checkpoint = Checkpoint.open(model, revision=options.revision)
    identity = options.identity or Identity.load_or_create(options.key_file)
    if not checkpoint.knows_manifest:
        learn_manifest(checkpoint, options.initial_peers, identity, **known)
    swarm = Swarm(ModelFacts.of(checkpoint), options.initial_peers, identity=identity, **known)
    try:
        yield checkpoint, swarm
    except BaseException:
        swarm.close()
        raise
