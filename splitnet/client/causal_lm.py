"""A transformers causal LM whose blocks are remote."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria

from splitnet.client.cache import ModelSession, RemoteCache
from splitnet.client.local_adapters import Prefixes
from splitnet.client.local_blocks import Blocks
from splitnet.client.mixed_session import MixedSession
from splitnet.client.plain_decoding import generate_plainly
from splitnet.client.remote import Exchange
from splitnet.client.remote_model import RemoteModel, joined, local_part, made_remote, remote_blocks
from splitnet.client.session import Preference, Session
from splitnet.client.session_driver import RECOVERY_TIMEOUT_S
from splitnet.client.speculation.speculator import Speculator
from splitnet.client.swarm import Swarm
from splitnet.client.text import Text
from splitnet.client.trained_prompts import prompt_wrapper, with_trained_prompt
from splitnet.errors import SplitnetError, UnsupportedModel
from splitnet.model.adapters import PREFIX_KEYS, PREFIX_VALUES
from splitnet.model.checkpoint import Checkpoint
from splitnet.model.ends import Ends, ends_of
from splitnet.model.shell import load_shell
from splitnet.net.identity import Identity

_PLAIN = frozenset({"attention_mask", "cache", "use_cache", "position_ids", "logits_to_keep"})
"""What `generate()` may hand to the model without its loop having to."""


class AutoModelForCausalLM:
    """Loads a model of which only embeddings, final norm and head are here; use `from_pretrained`."""

    def __init__(self) -> None:
        raise OSError("use splitnet.AutoModelForCausalLM.from_pretrained(MODEL, initial_peers=[ADDR])")

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        initial_peers: Sequence[str],
        codec: str = "auto",
        identity: Identity | None = None,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: str = "cpu",
        recovery_timeout_s: float = RECOVERY_TIMEOUT_S,
        prefer: Preference = "latency",
        gradient_codec: str = "auto",
        local_blocks: str | None = None,
        local_weights: str | None = None,
    ) -> RemoteCausalLM:
        """A causal LM of transformers, with `generate()` and all, whose blocks run on the peers of a swarm.

        `peft.get_peft_model` puts adapters on it, and `loss.backward()` trains them; see docs/tuning.md.

        Args:
            model: hub id or checkpoint folder; only the tensors outside the blocks are read.
            initial_peers: multiaddrs of the swarm.
            codec: how activations travel: "auto", or a name from `splitnet.net.codecs.CODECS`.
            identity: the key that private swarms must know; None: the user's own (see `splitnet key`).
            revision: of the model on the hub.
            dtype, device: of the local part.
            recovery_timeout_s: how long to wait for other peers when blocks are suddenly served by nobody.
            prefer: "latency": the next token soonest; "throughput": the most tokens per second, for batches.
            gradient_codec: how gradients travel; "auto": exact where the activations are, else "bf16".
            local_blocks: blocks that this process runs itself, such as "0:10" or "0:2,28:30"; "auto": as many of the
                first as make tokens come soonest, in half of the free memory at most; None: none.
            local_weights: what the weights of those and of the head are held as, such as "float16"; None: as stored.

        Raises:
            ModelNotFound, UnsupportedModel: the model cannot be used.
            DirectoryError: no initial peer answers.
        """
        with joined(model, initial_peers=initial_peers, identity=identity, revision=revision) as (checkpoint, swarm):
            return attach(
                checkpoint,
                swarm,
                codec=codec,
                dtype=dtype,
                device=device,
                recovery_timeout_s=recovery_timeout_s,
                prefer=prefer,
                gradient_codec=gradient_codec,
                local_blocks=local_blocks,
                local_weights=local_weights,
            )


def attach(
    checkpoint: Checkpoint,
    swarm: Swarm,
    *,
    codec: str = "auto",
    dtype: torch.dtype | str | None = None,
    device: str = "cpu",
    recovery_timeout_s: float = RECOVERY_TIMEOUT_S,
    prefer: Preference = "latency",
    gradient_codec: str = "auto",
    local_blocks: str | None = None,
    local_weights: str | None = None,
) -> RemoteCausalLM:
    """The causal LM of `checkpoint` with its blocks on `swarm`; see `AutoModelForCausalLM.from_pretrained`."""

    local = local_part(checkpoint, swarm, codec=codec, blocks=local_blocks, device=device, weights=local_weights)

    def open_part(budget: int, part: Blocks) -> Session:
        return Session(
            swarm,
            budget=budget,
            codec=codec,
            blocks=part,
            prefer=prefer,
            recovery_timeout_s=recovery_timeout_s,
        )

    def open_session(budget: int) -> ModelSession:
        if not local.ranges:
            return open_part(budget, (0, checkpoint.num_blocks))
        return MixedSession(local, open_part, budget)

    blocks = remote_blocks(
        checkpoint, swarm, local, codec=codec, gradient_codec=gradient_codec, recovery_timeout_s=recovery_timeout_s
    )
    shell = load_shell(checkpoint, blocks, dtype=dtype, device=device, weights=local_weights)
    model = made_remote(shell, RemoteCausalLM, checkpoint.source)
    model.open_sessions_with(open_session)
    model.ends = ends_of(model)
    model.connect_blocks(blocks, swarm)
    return model


class RemoteCausalLM(RemoteModel):
    """What a causal LM with remote blocks has beyond its transformers class: sessions, and a cache of its own."""

    ends: Ends | None = None
    """What stands before and after the blocks, if that is all there is."""

    def open_sessions_with(self, open_session: Callable[[int], ModelSession]) -> None:
        """Sets what makes the session of a cache, for a budget of positions."""
        self._open_session = open_session
        self._conversation: _Conversation | None = None
        self._standing_prefix: Prefixes = ()
        self._speculator = Speculator(self.config.get_text_config().vocab_size)

    @property
    def drafts(self) -> tuple[int, int]:
        """Tokens that were drafted so far, and how many of them were accepted; see `speculate` of `generate`."""
        return self._speculator.drafts

    def generate(self, inputs: torch.Tensor | None = None, *, speculate: Any = None, **kwargs: Any) -> Any:
        """transformers' `generate()`; without a `cache` of the caller, peers free their memory at the end.

        Within `session()`, positions that the peers hold from calls before are not computed again.

        Args:
            speculate: "prompt-lookup" drafts tokens from the text itself, a small causal LM of transformers with the
                same tokenizer drafts them here; the peers verify several together, as many as pays, and the text stays
                the same. For one sequence at a time.

        Raises:
            SplitnetError: without beams, its `generated` holds the tokens so far, to go on from.
        """
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        if kwargs.get("cache") is not None or kwargs.get("use_cache") is False:
            return self._generate(inputs, kwargs, speculate)
        cache = self._conversation.cache if self._conversation else self.new_cache()
        kwargs["cache"] = cache
        new_tokens = kwargs.get("max_new_tokens")
        if prompt is not None and isinstance(new_tokens, int):
            cache.remote.reserve(prompt.shape[1] + new_tokens)
        progress = _Progress()
        kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or ()), progress]
        try:
            if self._conversation and prompt is not None:
                self._conversation.rewind_to(prompt)
            output = self._generate(inputs, kwargs, speculate)
            if self._conversation:
                self._conversation.remember(output)
            return output
        except BaseException as error:
            if isinstance(error, SplitnetError) and prompt is not None and progress.extends(prompt):
                error.generated = progress.tokens
            if self._conversation:
                self._conversation.remember_or_forget(getattr(error, "generated", None))
            raise
        finally:
            if not self._conversation:
                cache.close()

    @contextmanager
    def session(self, max_length: int | None = None) -> Iterator[RemoteCache]:
        """Keeps the KV caches on the peers between calls of `generate()`.

        Args:
            max_length: positions per row to reserve from the start, so that a later call cannot be refused.
        """
        cache = self.new_cache()
        if max_length is not None:
            cache.remote.reserve(max_length)
        outer, self._conversation = self._conversation, _Conversation(cache)
        try:
            yield cache
        finally:
            self._conversation = outer
            cache.close()

    def new_cache(self) -> RemoteCache:
        """An empty cache on the peers, for callers that pass `cache=` themselves."""
        return RemoteCache(self._open_session)

    @torch.no_grad()
    def keys_and_values(self, input_ids: torch.Tensor) -> Prefixes:
        """Keys and values of a text in every block, as the peers compute them: what a trained prefix can begin as.

        Args:
            input_ids: `[1, positions]`.

        Returns:
            Per block a pair `[kv heads, positions, head size]`, float32.

        Raises:
            UnsupportedModel: some blocks have none of their own.
        """
        cache = self.new_cache()
        try:
            self(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), cache=cache, logits_to_keep=1)
            tensors = cache.remote.recall(0)
        finally:
            cache.close()
        blocks = range(self.swarm.facts.num_blocks)
        try:
            return [(tensors[f"{block}.{PREFIX_KEYS}"], tensors[f"{block}.{PREFIX_VALUES}"]) for block in blocks]
        except KeyError as error:
            raise UnsupportedModel(f"not all blocks of {self.name_or_path} have keys and values: {error}") from None

    def prefill(self, input_ids: torch.Tensor, cache: RemoteCache) -> torch.Tensor:
        """The logits after `[1, seq]` new tokens, `[vocabulary]`."""
        return self(input_ids=input_ids, cache=cache, use_cache=True, logits_to_keep=1).logits[0, -1]

    def step(self, input_ids: torch.Tensor, cache: RemoteCache) -> torch.Tensor:
        """The logits after one new token, `[1, 1]`: `[vocabulary]`."""
        return self._run(input_ids, cache)[-1]

    def send(self, input_ids: torch.Tensor, cache: RemoteCache) -> Exchange:
        """Sends `[batch, seq]` new tokens through the blocks; `receive` waits for them.

        Raises:
            SplitnetError: as a call of the model.
        """
        with self._blocks.sending() as sent:
            self._run(input_ids, cache)
        return sent[0]

    def receive(self, exchange: Exchange, input_ids: torch.Tensor, cache: RemoteCache) -> torch.Tensor:
        """The logits of tokens that were sent, in the order of sending: `[seq, vocabulary]` of one row.

        Raises:
            SplitnetError: as a call of the model.
        """
        with self._blocks.receiving(exchange):
            return self._run(input_ids, cache)

    def _run(self, input_ids: torch.Tensor, cache: RemoteCache) -> torch.Tensor:
        """The logits of `[1, seq]` new tokens: `[seq, vocabulary]`."""
        if self.ends is None or not self._is_as_made:
            return self(input_ids=input_ids, cache=cache, use_cache=True).logits[0]
        with self._blocks.generating(cache):
            return self.ends.logits(self._blocks(self.ends.embed(input_ids)))[0]

    def _generate(self, inputs: torch.Tensor | None, kwargs: dict[str, Any], speculate: Any) -> Any:
        wrapper = prompt_wrapper(self)
        if speculate is not None:
            if wrapper is not None:
                raise SplitnetError("speculation does not go together with a trained prompt: leave out `speculate`")
            kwargs["custom_generate"] = self._speculator.loop(speculate, kwargs)
        if wrapper is None:
            return super().generate(inputs, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if self._conversation:
            self._conversation.forget()  # its tokens do not tell of a prompt that was trained
        inputs, kwargs, self._standing_prefix = with_trained_prompt(wrapper, inputs, kwargs)
        try:
            return super().generate(inputs, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            self._standing_prefix = ()

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
        """What transformers' `generate()` calls for one sequence or more without beams.

        For a single one, of which only tokens are wanted, its own loop takes longer than all else that a client does
        for a token.
        """
        cache, mask = model_kwargs.get("cache"), model_kwargs.get("attention_mask")
        only_tokens = not synced_gpus and not generation_config.return_dict_in_generate
        unpadded = len(input_ids) == 1 and (mask is None or bool(mask.all()))
        unprompted = not self._standing_prefix and prompt_wrapper(self) is None
        is_plain = only_tokens and unpadded and unprompted and model_kwargs.keys() <= _PLAIN
        if is_plain and isinstance(cache, RemoteCache) and cache.remote.columns < input_ids.shape[1]:
            text = Text(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
            return generate_plainly(self, text, cache)
        return super()._sample(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )

    @property
    def _is_as_made(self) -> bool:
        """Whether nobody has hooked onto calls of the model."""
        return len(self._forward_hooks) == len(self._forward_pre_hooks) == 1

    def _before_model(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        args, kwargs = super()._before_model(module, args, kwargs)
        keep = kwargs.get("logits_to_keep", 0)
        call = self._blocks.call
        call.keep = keep if isinstance(keep, int) and kwargs.get("labels") is None else 0
        if self._standing_prefix:
            call.prefix = self._standing_prefix
            if kwargs.get("position_ids") is not None:  # the prefix comes before the first
                kwargs["position_ids"] = kwargs["position_ids"] + self._standing_prefix[0][0].shape[1]
        return args, kwargs

    def _cache_for(self, given: Any, wanted: bool) -> RemoteCache | None:
        if given is None:
            return self.new_cache() if wanted else None
        if not isinstance(given, RemoteCache):
            raise TypeError(
                f"the blocks are remote, so a {type(given).__name__} cannot hold their keys and values: "
                "leave out `cache`, or use model.new_cache()"
            )
        return given


class _Progress(StoppingCriteria):
    """Stops nothing: remembers the tokens so far."""

    def __init__(self) -> None:
        self.tokens: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        self.tokens = input_ids
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def extends(self, prompt: torch.Tensor) -> bool:
        """Whether they begin with the prompt, row by row; beams do not."""
        return self.tokens is not None and self.tokens.shape[0] == prompt.shape[0]


class _Conversation:
    """A cache that outlives a call of `generate()`, and the tokens whose keys and values it holds."""

    def __init__(self, cache: RemoteCache) -> None:
        self.cache = cache
        self._tokens: torch.Tensor | None = None

    def rewind_to(self, prompt: torch.Tensor) -> None:
        """Crops the cache to what it shares with the next prompt, `[batch, seq]`, less one token to go on from."""
        held, layer = self._tokens, self.cache.remote
        if held is None or held.shape[0] != prompt.shape[0] or layer.batch != prompt.shape[0]:
            self.forget()
            return
        length = min(held.shape[1], prompt.shape[1] - 1, layer.columns)
        same = (held[:, :length] == prompt[:, :length]).all(dim=0)
        shared = length if bool(same.all()) else int(same.int().argmin())
        layer.crop(min(0, shared - layer.columns))

    def remember(self, output: Any) -> None:
        self._tokens = output if isinstance(output, torch.Tensor) else output.sequences

    def remember_or_forget(self, tokens: torch.Tensor | None) -> None:
        """After an error: what was generated before it, if that can be gone on from."""
        if tokens is None:
            self.forget()
        else:
            self._tokens = tokens

    def forget(self) -> None:
        self._tokens = None
        self.cache.reset()
