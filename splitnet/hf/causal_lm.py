"""A transformers causal LM whose blocks are remote."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedModel, StoppingCriteria
from transformers.loss.loss_utils import ForCausalLMLoss

from splitnet.audit.auditor import Auditor, auditor_for
from splitnet.blocks.adapters import PREFIX_KEYS, PREFIX_VALUES
from splitnet.blocks.client_part import ClientPart, backbone_of, client_part_of, load_client_part
from splitnet.blocks.head import Head, loss_in_parts
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.families import per_layer_size
from splitnet.checkpoint.gguf.gguf_store import GgufStore
from splitnet.drafts.speculator import AUTO, OFF, Drafts, Speculator
from splitnet.errors import AdapterError, PeerLied, SplitnetError, UnsupportedModel, UnsupportedParameter
from splitnet.hf.cache import CachedSession, ModelSession, RemoteCache
from splitnet.hf.decoding import Decoding, FamilyLoop, GrowingText, Outputs
from splitnet.hf.parameters import GenerateCall, refuse, too_long
from splitnet.hf.peft_adapters import Prefixes, prompt_wrapper, with_trained_prompt
from splitnet.hf.remote_blocks import Exchange, PerThread, RemoteBlocks
from splitnet.hf.remote_model import RemoteModel, joined, made_remote, remote_blocks
from splitnet.hf.side_network import SideCache, SideNetwork
from splitnet.quant.device import end_threads
from splitnet.session.inference import Session
from splitnet.session.local import Blocks, MixedSession
from splitnet.session.options import GENERATING, JOINING, ConnectionOptions, takes
from splitnet.swarm.swarm import Swarm

_PLAIN = frozenset({"attention_mask", "cache", "use_cache", "position_ids", "logits_to_keep", "inputs_embeds"})
"""Arguments of the model with which `Decoding` can replace transformers' loop."""

PROMPT_FEATURES = 512  # largest number of last positions of a prompt whose states a draft head gets
PROMPT_FEATURE_VALUES = 2 << 20  # largest number of values of these hidden states

_TRANSFORMERS: Any = GenerationMixin
log = logging.getLogger(__name__)

MOST_REPEATED = 3  # times that an answer is computed again because a peer has lied

_POSITIONAL = [
    name
    for name, parameter in inspect.signature(_TRANSFORMERS.generate).parameters.items()
    if name != "self" and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
]
"""The positional parameters of transformers' `generate()`, in order."""


class AutoModelForCausalLM:
    """Loads a model with local embeddings, final norm and head, and remote blocks; use `from_pretrained`."""

    def __init__(self) -> None:
        raise OSError("use splitnet.AutoModelForCausalLM.from_pretrained(MODEL, initial_peers=[ADDR])")

    @classmethod
    @takes(*JOINING, *GENERATING)
    def from_pretrained(cls, model: str | Path, *, initial_peers: Sequence[str], **options: Any) -> RemoteCausalLM:
        """A causal LM of transformers, with all methods such as `generate()`, whose blocks run on peers of a swarm.

        `peft.get_peft_model` adds adapters, and `loss.backward()` trains them; see docs/tuning.md.

        Args:
            model: hub id or checkpoint folder; only the tensors outside the blocks are read.
            initial_peers: addresses of the swarm, multiaddrs or `tcp://HOST:PORT?key=...` of peers.
            identity: the client's key, for private swarms; None: the user's own key (see `splitnet key`).
            revision: revision of the model on the hub.
            swarm_key: the key of a closed swarm, or its file (see `splitnet key --swarm-key`).
            trusted_peers: file with the keys of the peers that may be used; None: any.
            codec: codec of activations: "auto", or a name from `splitnet.wire.codecs.CODECS`.
            dtype, device: for the local part; "auto": the best device that works, see `splitnet.blocks.chosen_device`.
            recovery_timeout_s: how long to wait for other peers when blocks are suddenly not served.
            any_weights: whether to continue with weights in another format, such as int4 after float32, when no peer
                holds the session's format; if False, this raises OtherWeights. None: only with the codec "auto".
            prefer: "latency": the lowest latency per token; "throughput": the most tokens per second, for batches;
                "energy": the least energy per token, as reported by peers (docs/energy.md).
            kv_at_least: "float16", "int8", "int8-int4" or "int4": the coarsest format of keys and values on used peers.
            prefixes: "own": peers store keys and values of a text for later texts with the same beginning and of the
                same key; "shared": also for keys that the owner of a peer has put in one group; "off": no storage.
            standby: bytes per second, or a text such as "8MiB", at which replicas copy the keys and values of sessions,
                so that a replacement of a hop need not compute them; None: no copies.
            audit: part of the peers' work that is computed again, from 0 (no audits) to 1, on this machine or, without
                the weights, by other peers; peers that are new to this client are examined once besides. A peer that
                lies is named and not used any more. None: 0.01 for peers on other machines, without `trusted_peers` and
                `swarm_key`.
            auditors: file with the keys of the peers that may compute the work of other peers again, even if the
                weights are here; None: any.
            energy_slowdown: with "energy", the largest allowed multiple of the fastest route's time; None: 1.5.
            gradient_codec: codec of gradients; "auto": exact if the activations are exact, else "bf16".
            local_blocks: blocks that this process runs, such as "0:10" or "0:2,28:30"; "auto": the number of first
                blocks with the lowest latency per token, in at most half of the free memory; None: none.
            local_weights: format of the weights of local blocks and of the head, such as "float16"; None: "auto", or
                as stored with the codec "none".

        Raises:
            ModelNotFound, UnsupportedModel: the model cannot be used.
            DirectoryError: no initial peer answers.
            KeyFileError: a file with keys cannot be used.
            TypeError: there is no such option.
        """
        chosen = ConnectionOptions.of({"initial_peers": initial_peers, **options}, (*JOINING, *GENERATING))
        with joined(model, chosen) as (checkpoint, swarm):
            return attached(checkpoint, swarm, chosen)


def attach(checkpoint: Checkpoint, swarm: Swarm, **options: Any) -> RemoteCausalLM:
    """The causal LM of `checkpoint` with its blocks on `swarm`; see `AutoModelForCausalLM.from_pretrained`."""
    return attached(checkpoint, swarm, ConnectionOptions.of(options))


def attached(
    checkpoint: Checkpoint, swarm: Swarm, options: ConnectionOptions, speculate: Any = AUTO, *, headless: bool = False
) -> RemoteCausalLM:
    """As `attach`, with options whose device was resolved.

    headless: the checkpoint may lack a head, see `RemoteCausalLM.headless`. speculate, errors: see `connected`.
    """
    if options.vision == "peer":
        raise SplitnetError("vision `peer` is for prompts with images, and this model reads texts here: leave it out")
    blocks = remote_blocks(checkpoint, swarm, options)
    how: dict[str, Any] = {"dtype": options.dtype, "device": options.device, "weights": options.held_as}
    client_part = load_client_part(checkpoint, blocks, headless=headless, **how)
    return connected(client_part, RemoteCausalLM, blocks, checkpoint, swarm, options, speculate)


Model = TypeVar("Model", bound="RemoteCausalLM")


def connected(
    client_part: PreTrainedModel,
    remote_class: type[Model],
    blocks: RemoteBlocks,
    checkpoint: Checkpoint,
    swarm: Swarm,
    options: ConnectionOptions,
    speculate: Any,
) -> Model:
    """The client part of a checkpoint as a model that generates through `blocks`.

    speculate: the source of drafts, see `RemoteCausalLM.generate`. A named source is loaded at once, "auto" later.
    Raises SplitnetError: the source of drafts cannot be loaded, or does not fit the model.
    """
    whole = (0, checkpoint.num_blocks)

    auditor = auditor_for(checkpoint, swarm, options)

    def open_part(reservation: int, part: Blocks) -> Session:
        session = Session(swarm, options, reservation=reservation, blocks=part)
        if auditor is not None:
            auditor.watch(session)
        return session

    def open_session(reservation: int) -> ModelSession:
        if blocks.stages == [whole]:
            return open_part(reservation, whole)
        return MixedSession(blocks.stages, open_part, reservation)

    model = made_remote(client_part, remote_class, checkpoint.source)
    model.auditor = auditor
    model.open_sessions_with(open_session)
    model.ends = client_part_of(model)
    model.speculator = Speculator(model, checkpoint)
    model.connect_blocks(blocks, swarm)
    if speculate not in (None, OFF, AUTO):
        model.speculator.drafts_by(speculate)
    end_threads()  # another thread may generate
    return model


class RemoteCausalLM(RemoteModel):
    """Methods of a causal LM with remote blocks beyond its transformers class: sessions, and a cache."""

    # `logits_to_keep` is allowed with `labels`: the loss is of all positions, the logits of the kept ones.
    loss_in_parts = True

    sees_images = False  # whether calls take images
    prompt_arguments: frozenset[str] = frozenset()  # arguments that only the call of a prompt reads

    ends: ClientPart  # the layers before and after the blocks
    speculator: Speculator
    side: SideNetwork | None = None  # see `use_side`
    auditor: Auditor | None = None  # examines the work of peers; None: no audits

    def __init_subclass__(cls) -> None:
        family: Any = getattr(cls, "transformers_class", None)
        if family is not None:
            cls.prepare_inputs_for_generation = _keeping_the_cache(family.prepare_inputs_for_generation)

    def open_sessions_with(self, open_session: Callable[[int], ModelSession]) -> None:
        """Sets the function that opens the session of a cache, with a reservation of positions."""
        self._open_session = open_session
        self._context = PerThread(_Context())
        self._family_loop = FamilyLoop(self, self.transformers_class)

    def generate(self, *args: Any, speculate: Any = AUTO, **kwargs: Any) -> Any:
        """transformers' `generate()`, with its arguments; without a `cache` of the caller, peers free their memory.

        With `return_dict_in_generate`, peers keep the memory of the output's cache until the cache is closed or
        collected. Within `session()`, positions that peers hold from earlier calls are not computed again; a nested
        call, by a stopping criterion or a streamer, does not use the session. Each argument is honoured, or refused by
        name, see docs/parameters.md.

        Args:
            speculate: source of drafts, which peers verify in one step; their number follows from measured times, and
                the text stays the same. "prompt-lookup": copies of the text; "mtp": the checkpoint's blocks for
                multi-token prediction; "eagle=FOLDER": an EAGLE head; or a small causal LM of transformers with the
                same tokenizer. "auto": copies of the text, and "mtp" if it exists, fits the memory and saves time.
                "off", None: no drafts. For single sequences; "auto" makes no drafts for batches.

        Raises:
            UnsupportedParameter: remote blocks cannot honour an argument.
            SplitnetError: without beams, its `generated` holds the tokens of the text up to the error.
        """
        given = {**dict(zip(_POSITIONAL, args, strict=False)), **kwargs}
        if len(given) < len(args) + len(kwargs):
            raise TypeError("generate() got an argument twice, by position and by name")
        for former in ("past_key_values", "cache_params"):
            if (cache := given.pop(former, None)) is not None:
                given.setdefault("cache", cache)
        # Tokenizers return tensors on the CPU.
        given = {name: value.to(self.device) if torch.is_tensor(value) else value for name, value in given.items()}
        request = GenerateCall(given, self.generation_config)
        request.check_parameters()
        length = self._wanted_length(given)
        caches = request.value("use_cache") is not False or given.get("inputs_embeds") is not None
        if not caches and given.get("cache") is not None:
            raise refuse("use_cache", "=False and a cache exclude each other: leave out one of them")
        drafts = None
        if speculate not in (None, OFF):
            refused = self._speculation_refused(speculate, given, request, caches)
            if refused is not None and speculate != AUTO:
                raise refused
            drafts = self.speculator.drafts_by(speculate) if refused is None else None
        head: Any = self.get_output_embeddings()
        for module in () if head is None else head.modules():  # PEFT may have wrapped the head
            if isinstance(module, Head):
                module.expect_changes()
        kept_session = self._context.now.kept_session
        if kept_session is not None and given.get("cache") is kept_session.cache:
            del given["cache"]  # the cache of an output of this session, which crops the cache itself
        if not caches or given.get("cache") is not None:
            kept_session = None
        if isinstance(own := given.get("cache"), RemoteCache):
            self._use_taps(own, drafts)
            if own.remote.bound is None:
                own.remote.reserve(length)
        with self._context.within(drafts=drafts, kept_session=None, resumed=kept_session, prefix=()):
            if not caches or given.get("cache") is not None:
                return self._generate(given)
            for _ in range(MOST_REPEATED):
                try:
                    return self._generate_with_own_cache({**given}, kept_session, length)
                except PeerLied as error:
                    if given.get("streamer") is not None:
                        raise
                    log.warning("the answer is computed again: %s", error)
            return self._generate_with_own_cache(given, kept_session, length)

    def _wanted_length(self, given: Mapping[str, Any]) -> int:
        """Length of the text with all new tokens; 0: unknown.

        Raises ContextTooLong: the text ends beyond the model's context.
        """
        prompt = given["inputs"] if given.get("inputs") is not None else given.get("input_ids")
        new_tokens, most = given.get("max_new_tokens"), self._blocks.max_positions
        # The model does not get the last token.
        if not torch.is_tensor(prompt) or not isinstance(new_tokens, int):
            return 0
        length = prompt.shape[1] + new_tokens
        if most is not None and length - 1 > most:
            if given.get("stopping_criteria"):  # may end the text earlier
                return 0
            raise too_long(length, most)
        return length

    def _generate_with_own_cache(self, given: dict[str, Any], kept_session: CachedSession | None, length: int) -> Any:
        """`generate()` in the cache of the session, or in a cache that lives as long as this call and its output.

        length: final length of the text; 0: unknown.
        """
        cache = kept_session.cache if kept_session else self.new_cache()
        self._use_taps(cache, self._context.now.drafts)
        given["cache"] = cache
        if kept_session and given.get("custom_generate") is not None:
            kept_session.remember(None)  # a custom loop does not use cached positions
            cache.remote.reset()
        prompt = given["inputs"] if given.get("inputs") is not None else given.get("input_ids")
        cache.remote.reserve(length)
        progress = _TokenRecorder()
        given["stopping_criteria"] = [*(given.get("stopping_criteria") or ()), progress]
        tokens: torch.Tensor | None = None
        handed_out = False
        try:
            output = self._generate(given)
            if not kept_session:
                cache.remote.finish_audits()
            tokens = output if isinstance(output, torch.Tensor) else output.sequences
            handed_out = isinstance(output, Mapping) and any(value is cache for value in output.values())
            return output
        except SplitnetError as error:
            if prompt is not None and progress.extends(prompt):
                error.generated = tokens = progress.tokens
            raise
        finally:
            if kept_session:
                kept_session.remember(tokens)
            elif not handed_out:
                cache.close()

    @contextmanager
    def session(self, max_length: int | None = None) -> Iterator[RemoteCache]:
        """Keeps the KV caches on the peers between calls of `generate()` in this thread.

        max_length: positions per row to reserve at the start, so that no later call is refused.
        """
        cache = self.new_cache()
        if max_length is not None:
            cache.remote.reserve(max_length)
        kept_session = CachedSession(cache, self._blocks.adapters, self._blocks.ropes)
        try:
            with self._context.within(kept_session=kept_session):
                yield cache
        finally:
            cache.close()

    @property
    def headless(self) -> bool:
        """Whether the checkpoint has no head: the model only reads texts; generated tokens are meaningless."""
        return isinstance(self.get_output_embeddings(), nn.Identity)

    def new_cache(self, scope: str = "") -> RemoteCache:
        """An empty cache on the peers, for callers that pass `cache=`. scope: name of the group of texts that may share
        stored prefixes."""
        return RemoteCache(self._open_session, scope)

    def can_draft(self, prompt: int, new: int) -> bool:
        """Whether `speculate` works for a prompt and new tokens of these lengths; it does not for some families."""
        return not self._family_loop.differs(prompt, prompt + new)

    def fitting(self, cache: RemoteCache, length: int) -> int:
        """Number of cached positions per row that a prompt of `length` tokens with the same beginning can use.

        Fewer than all if the rotary embedding depends on the length of a text.
        """
        return cache.remote.fitting(length, self._blocks.ropes)

    def pieces_of(self, length: int) -> AbstractContextManager[None]:
        """A context in which this thread calls the model with pieces of a text of `length` tokens; same results."""
        return self._blocks.calling(length=length)

    @torch.no_grad()
    def keys_and_values(self, input_ids: torch.Tensor) -> Prefixes:
        """Keys and values of a text in every block, computed by the peers, as initial values of a trained prefix.

        `[1, positions]` -> per block a pair `[kv heads, positions, head size]`, float32, on the CPU. Raises
        UnsupportedModel: some blocks have no keys and values.
        """
        cache = self.new_cache()
        input_ids = input_ids.to(self.device)
        try:
            self(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), cache=cache, logits_to_keep=1)
            tensors = cache.remote.fetch_kv(0)
        finally:
            cache.close()
        blocks = range(self.swarm.facts.num_blocks)
        try:
            names = [(f"{block}.{PREFIX_KEYS}", f"{block}.{PREFIX_VALUES}") for block in blocks]
            return [(tensors[keys].cpu(), tensors[values].cpu()) for keys, values in names]
        except KeyError as error:
            raise UnsupportedModel(f"not all blocks of {self.name_or_path} have keys and values: {error}") from None

    @torch.no_grad()
    def last_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The output of the last block for whole texts, `[batch, seq]`, before the final norm: `[batch, seq, hidden]`.

        No caches are kept. Raises as a call of the model.
        """
        states: list[torch.Tensor] = []
        with self._context.within(without_side=True), self._blocks.calling(seen=states.append):
            backbone_of(self)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return states[0]

    @torch.no_grad()
    def states_at(
        self, taps: Sequence[int], input_ids: torch.Tensor, mask: torch.Tensor, cache: RemoteCache, keep: int = 0
    ) -> torch.Tensor:
        """Hidden states of whole texts, `[batch, seq]` with padding on the left, at `taps`, then the output of the
        final norm: `[batch, seq, (len(taps) + 1) * hidden]`. Raises as a call of the model.

        taps: boundaries, as numbers of blocks. cache: a new cache. keep: number of last positions to return; 0: all.
        """
        given = {"input_ids": input_ids, "attention_mask": mask, "cache": cache, "use_cache": True}
        if "position_ids" in self._backbone_parameters:  # as `generate()` does
            given["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        with self._context.within(without_side=True):
            return self._seen_by(taps, cache, lambda: backbone_of(self)(**given), keep)[1]

    @torch.no_grad()
    def states_for_head(
        self, input_ids: torch.Tensor, mask: torch.Tensor, cache: RemoteCache, keep: int = 0
    ) -> torch.Tensor:
        """The inputs of the head for whole texts, with the side network's addition: `[batch, seq, hidden]`, or the last
        `keep` positions. Arguments and errors as in `states_at`."""
        if (side := self.side) is None:
            return self.states_at((), input_ids, mask, cache, keep)
        states = self.states_at(side.taps, input_ids, mask, cache)
        added = side(states, None if bool(mask.all()) else mask)
        return (states[..., -side.hidden_size :] + added)[:, -keep:]

    def use_side(self, side: SideNetwork) -> None:
        """Adds the output of a side network to the output of the final norm, from now on."""
        object.__setattr__(self, "side", side.to(self.device))  # hidden from PEFT, which searches the model's modules

    def beside_states(self, side: SideNetwork, states: torch.Tensor) -> AbstractContextManager[None]:
        """A context in which this thread runs a side network on states of `states_at`, and no blocks."""
        return self._context.within(beside=(side, states))

    def _run_backbone(self, forward: Callable[..., Any], given: dict[str, Any]) -> Any:
        if (beside := self._context.now.beside) is not None:
            side, states = beside
            with self._blocks.calling(run=lambda hidden: hidden):  # gives an output of the family's class
                output = super()._run_backbone(forward, given)
            hidden = states[..., -side.hidden_size :] + side(states, given.get("attention_mask"))
            return with_hidden(output, hidden.to(output[0].dtype))
        whole = given.get("cache") is None and not given.get("use_cache") and not torch.is_grad_enabled()
        if whole and per_layer_size(self.config.get_text_config()):  # steps carry the inputs of each block
            cache = self.new_cache()
            cache.remote.whole = True
            try:
                output = self._run_backbone(forward, given | {"cache": cache, "use_cache": True})
                return with_hidden(output, output[0], without=cache)
            finally:
                cache.close()
        if (side := self.side) is None or self._context.now.without_side:
            return super()._run_backbone(forward, given)
        for former in ("past_key_values", "cache_params"):
            if given.get(former) is not None:
                given.setdefault("cache", given.pop(former))
        kept = self._cache_for(given.get("cache"), bool(given.get("use_cache")))
        cache = kept or self.new_cache()
        try:
            if cache.remote.columns and not self._side_fits(cache):
                raise AdapterError("the side network has not seen the cached positions: begin with a new cache")
            run = functools.partial(super()._run_backbone, forward, given | {"cache": cache, "use_cache": True})
            past = cache.remote.columns
            own = cache.remote.side.of_layers(past) if cache.remote.side is not None and past else side.new_cache()
            cache.remote.side = None  # invalid until the step is complete
            output, states = self._seen_by(side.taps, cache, run)
            mask = cache.remote.mask(0).to(states.device)
            hidden = output[0] + side(states, None if bool(mask.all()) else mask.long(), own)
            cache.remote.side = SideCache(side, own, cache.remote.arrangement)
            return with_hidden(output, hidden, without=cache if kept is None else None)
        finally:
            if kept is None:
                cache.close()

    def _side_fits(self, cache: RemoteCache) -> bool:
        """Whether the side network has processed all positions of a cache."""
        held = cache.remote.side
        if held is None or held.network is not self.side or cache.remote.taps != held.network.taps:
            return False
        return held.arrangement == cache.remote.arrangement and held.layers.get_seq_length() >= cache.remote.columns

    def _seen_by(
        self, taps: Sequence[int], cache: RemoteCache, run: Callable[[], Any], keep: int = 0
    ) -> tuple[Any, torch.Tensor]:
        """The backbone's output of a step, and the hidden states of the positions, see `states_at`."""
        seen: list[torch.Tensor] = []
        cache.remote.use_taps(taps)
        with self._blocks.calling(seen=seen.append, keep=keep):
            output = run()
        return output, torch.cat((*(seen if taps else ()), output[0]), dim=-1)

    def step(self, input_ids: torch.Tensor, cache: RemoteCache) -> Outputs:
        """The outputs of new tokens `[1, seq]`."""
        if (ends := self._only_ends(input_ids)) is not None:
            return self._outputs_of(ends, self._blocks.begin_step(cache, ends.embed(input_ids)))
        return self._called(input_ids, cache, lambda hidden: self._blocks.begin_step(cache, hidden))

    def send_tokens(self, input_ids: torch.Tensor, cache: RemoteCache) -> Exchange:
        """Sends new tokens `[1, seq]` to the blocks; `receive_outputs` waits for the outputs. Raises as a call of the
        model."""
        if (ends := self._only_ends(input_ids)) is not None:
            return self._blocks.begin_step(cache, ends.embed(input_ids))
        sent: list[Exchange] = []

        def begin(hidden: torch.Tensor) -> torch.Tensor:
            sent.append(self._blocks.begin_step(cache, hidden))
            return hidden

        # The layers after the blocks also run, without need; the head, which is not in the backbone, does not run.
        with self._blocks.calling(run=begin):
            around: Any = self.base_model if self.sees_images else backbone_of(self)
            around(input_ids=input_ids, cache=cache, use_cache=True)
        return sent[0]

    def receive_outputs(self, exchange: Exchange, input_ids: torch.Tensor, cache: RemoteCache) -> Outputs:
        """The outputs of sent tokens, in the order of sending. Raises as `send_tokens`."""
        if (ends := self._only_ends(input_ids)) is not None:
            return self._outputs_of(ends, exchange)
        with exchange.rewound():
            return self._called(input_ids, cache, lambda hidden: exchange)

    def _outputs_of(self, ends: ClientPart, exchange: Exchange) -> Outputs:
        hidden = exchange.finish()
        return Outputs(ends.logits(hidden, self._context.now.best)[0], exchange.features(hidden)[0])

    def _called(
        self, input_ids: torch.Tensor, cache: RemoteCache, begin: Callable[[torch.Tensor], Exchange]
    ) -> Outputs:
        """The outputs of a call of the model; `begin` sends the hidden states through the blocks."""
        features: list[torch.Tensor] = []

        def run(hidden: torch.Tensor) -> torch.Tensor:
            exchange = begin(hidden)
            output = exchange.finish()
            features.append(exchange.features(output))
            return output

        with self._blocks.calling(run=run):
            logits = self(input_ids=input_ids, cache=cache, use_cache=True).logits[0]
        return Outputs(logits, features[0][0])

    def _only_ends(self, input_ids: torch.Tensor) -> ClientPart | None:
        """The ends, if the model computes nothing else for these tokens and has no hook on its calls; else None."""
        watched = self._forward_hooks or self._forward_pre_hooks or self.side is not None
        special = self.ends.special and not self.ends.special.isdisjoint(input_ids.flatten().tolist())
        return None if watched or special or not self.ends.compute_everything else self.ends

    def _generate(self, given: dict[str, Any]) -> Any:
        wrapper = prompt_wrapper(self)
        if wrapper is None:
            return super().generate(**given)  # pyright: ignore[reportAttributeAccessIssue]
        given, prefix = with_trained_prompt(wrapper, given)
        with self._context.within(prefix=prefix, prefixed=given.get("cache")):
            return super().generate(**given)  # pyright: ignore[reportAttributeAccessIssue]

    def _use_taps(self, cache: RemoteCache, drafts: Drafts | None) -> None:
        """Requests the hidden states that a drafter needs, except the last block's output, which is always returned."""
        if drafts is not None and (taps := drafts.drafter.taps):
            cache.remote.use_taps(() if taps == (self._blocks.num_blocks,) else taps)

    def _speculation_refused(
        self, by: Any, given: Mapping[str, Any], request: GenerateCall, caches: bool
    ) -> UnsupportedParameter | None:
        """The error if `by` makes no drafts, or another argument excludes drafts."""
        if isinstance(by, RemoteModel):
            return refuse(
                "speculate",
                "cannot be a model with remote blocks: use assistant_model=",
            )
        excluded = [name for name in ("custom_generate", "assistant_model", "synced_gpus") if given.get(name)]
        excluded += [name for name in ("return_dict_in_generate", "prompt_lookup_num_tokens") if request.value(name)]
        excluded += [name for name in ("num_beams", "num_return_sequences") if (request.value(name) or 1) > 1]
        excluded += [] if caches else ["use_cache"]
        excluded += ["a trained prompt"] if prompt_wrapper(self) is not None else []
        excluded += ["a side network"] if self.side is not None else []
        text = "does not go together with speculate, which is for one sequence with a cache and plain tokens as output"
        return refuse(excluded[0], f"{text}: leave out one of them") if excluded else None

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Called by transformers' `generate()` for sequences without beams.

        For a single sequence whose output is only tokens, `Decoding` replaces transformers' loop after the prompt,
        because transformers' loop takes longer than all other work of a client per token.
        """
        self._resume(input_ids, model_kwargs)
        cache, mask, drafts = model_kwargs.get("cache"), model_kwargs.get("attention_mask"), self._context.now.drafts
        others = sorted(model_kwargs.keys() - _PLAIN - self.prompt_arguments - {"tokenizer"})
        others += [] if len(input_ids) == 1 else ["a batch"]
        others += [] if mask is None or bool(mask.all()) else ["attention_mask with padding"]
        others += self._family_loop.differs(input_ids.shape[1], generation_config.max_length)
        only_tokens = not synced_gpus and not generation_config.return_dict_in_generate
        unprompted = not self._context.now.prefix and prompt_wrapper(self) is None and self.side is None
        fits = isinstance(cache, RemoteCache) and cache.remote.columns < input_ids.shape[1]
        required = drafts is not None and drafts.required
        if only_tokens and unprompted and not others and (fits or required):
            text = GrowingText(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
            first = not generation_config.is_assistant
            features: list[torch.Tensor] = []
            with self._blocks.calling(seen=features.append):
                prefilled: Any = self._prefill(  # pyright: ignore[reportCallIssue]
                    text.ids(), generation_config, model_kwargs, is_first_iteration=first
                )
            decoding = Decoding(self, model_kwargs["cache"], text, drafts, self._blocks.max_positions)
            with self._context.within(best=text.best):
                return decoding.run(Outputs(prefilled.logits[0], torch.cat(features, dim=1)[0]))
        if required:
            raise refuse([*others, "synced_gpus"][0], "does not go together with speculate: leave out one of them")
        return super()._sample(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )

    def _beam_search(self, input_ids: torch.Tensor, **given: Any) -> Any:
        self._resume(input_ids, given, follows=False)  # a row of the cache is one of the beams
        return super()._beam_search(input_ids, **given)  # pyright: ignore[reportAttributeAccessIssue]

    def _assisted_decoding(self, input_ids: torch.Tensor, **given: Any) -> Any:
        self._resume(input_ids, given)
        return super()._assisted_decoding(input_ids, **given)  # pyright: ignore[reportAttributeAccessIssue]

    def _resume(self, input_ids: torch.Tensor, prepared: dict[str, Any], *, follows: bool = True) -> None:
        """Within a session, crops the cache to its common prefix with the prepared prompt."""
        kept_session = self._context.now.resumed
        if kept_session is not None and prepared.get("cache") is kept_session.cache:
            plain = prepared.keys() <= _PLAIN - {"inputs_embeds"} | {"tokenizer"} and not self._context.now.prefix
            kept_session.resume(input_ids, prepared.get("attention_mask"), follows=follows and plain)
            if self.side is not None and not self._side_fits(kept_session.cache):
                kept_session.cache.remote.reset()

    def _kept_positions(self, given: Mapping[str, Any]) -> int:
        keep = given.get("logits_to_keep", 0)
        if not isinstance(keep, int) or given.get("labels") is not None:
            return 0
        drafts = self._context.now.drafts
        if not keep or drafts is None or not drafts.drafter.taps:
            return keep
        size = self.config.get_text_config().hidden_size * len(drafts.drafter.taps)
        return max(keep, min(PROMPT_FEATURES, PROMPT_FEATURE_VALUES // size))

    def _call_model(self, forward: Callable[..., Any], given: dict[str, Any]) -> Any:
        keep = given.get("logits_to_keep")
        if given.get("labels") is not None and (isinstance(keep, torch.Tensor) or keep):
            return self._call_with_loss(forward, given)
        prefix = self._context.now.prefix
        if not prefix or given.get("cache") is not self._context.now.prefixed:  # not a call of `generate()`
            return super()._call_model(forward, given)
        if given.get("position_ids") is not None:  # the prefix comes before the first position
            given["position_ids"] = given["position_ids"] + prefix[0][0].shape[1]
        with self._blocks.calling(prefix=prefix, keep=self._kept_positions(given)):
            return forward(**given)

    def _call_with_loss(self, forward: Callable[..., Any], given: dict[str, Any]) -> Any:
        """A call with labels that keeps some logits; the family's head and loss run on some positions at a time."""
        if self.loss_function is not ForCausalLMLoss:
            raise refuse("logits_to_keep", "goes with labels only if the loss is that of causal models: leave it out")
        labels, keep = given.pop("labels"), given.pop("logits_to_keep")
        items = given.pop("num_items_in_batch", None)
        outputs: list[Any] = []

        def keep_some(run: Callable[[], Any]) -> Any:
            outputs.append(run())
            hidden = outputs[0][0]
            return with_hidden(outputs[0], hidden[:, slice(-keep, None) if isinstance(keep, int) else keep])

        def score(hidden: torch.Tensor) -> torch.Tensor:
            with self._blocks.calling(backbone=lambda run: with_hidden(outputs[0], hidden[None])):
                return forward(**given)[0][0]

        with self._blocks.calling(backbone=keep_some):
            called = self._call_model(forward, given)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        vocabulary = called[0].shape[-1]
        loss = loss_in_parts(outputs[0][0], labels, score, vocabulary, trained=trained, items=items)
        return (loss, *called) if isinstance(called, tuple) else type(called)(loss=loss, **called)

    def _cache_for(self, given: Any, wanted: bool) -> RemoteCache | None:
        if given is None:
            return self.new_cache() if wanted else None
        if not isinstance(given, RemoteCache):
            raise TypeError(
                f"the blocks are remote, so a {type(given).__name__} cannot hold their keys and values: "
                "leave out `cache`, or use model.new_cache()"
            )
        return given


def _keeping_the_cache(prepare: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A family's `prepare_inputs_for_generation`, whose signature transformers reads."""

    @functools.wraps(prepare)
    def prepared(*args: Any, **kwargs: Any) -> dict[str, Any]:
        cache = kwargs.get("cache")
        inputs = prepare(*args, **kwargs)
        if isinstance(cache, RemoteCache) and inputs.get("cache") is None:
            # The family has dropped the cache to compute the whole text again; the session on the peers stays.
            cache.remote.reset()
            inputs["cache"] = cache
        return inputs

    return prepared


def with_hidden(output: Any, hidden: torch.Tensor, without: RemoteCache | None = None) -> Any:
    """The output of a backbone with other hidden states. without: a cache to leave out of the output."""
    if isinstance(output, tuple):
        return (hidden, *(value for value in output[1:] if without is None or value is not without))
    kept = {name: value for name, value in output.items() if without is None or value is not without}
    return type(output)(**{**kept, "last_hidden_state": hidden})


@dataclass(frozen=True, slots=True)
class _Context:
    """The context of a thread's calls.

    kept_session: the session that the next call of `generate()` uses. resumed: the session that the call under way
    uses. prefix: keys and values that a trained prompt puts before the text that is generated. prefixed: the cache of
    this text; None: there is none. drafts: of the text. without_side: calls run the blocks without the side network.
    beside: see `RemoteCausalLM.beside_states`. best: see `GrowingText.best`.
    """

    kept_session: CachedSession | None = None
    resumed: CachedSession | None = None
    prefix: Prefixes = ()
    prefixed: Any = None
    drafts: Drafts | None = None
    without_side: bool = False
    beside: tuple[SideNetwork, torch.Tensor] | None = None
    best: int = 0


class _TokenRecorder(StoppingCriteria):
    """A criterion that never stops, but keeps the latest tokens."""

    reads_scores = False

    def __init__(self) -> None:
        self.tokens: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        self.tokens = input_ids
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def extends(self, prompt: torch.Tensor) -> bool:
        """Whether the tokens continue the prompt row by row, which beams do not."""
        return self.tokens is not None and self.tokens.shape[0] == prompt.shape[0]


class AutoTokenizer:
    """transformers' `AutoTokenizer`, which takes the path of a GGUF file as well."""

    @staticmethod
    def from_pretrained(model: str | Path, **options: Any) -> Any:
        """Loads the tokenizer of a GGUF file, folder or Hugging Face id, with options of transformers.

        Raises OSError, ValueError, or for a GGUF file ModelNotFound: there is no tokenizer.
        """
        if str(model).endswith(".gguf"):
            return GgufStore(model).tokenizer(**options)
        # By default, transformers asks the user whether code of the checkpoint may run.
        return transformers.AutoTokenizer.from_pretrained(model, **{"trust_remote_code": False} | options)
