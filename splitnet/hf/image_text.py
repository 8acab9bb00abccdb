"""A transformers model that reads images and texts, whose text blocks are remote.

The family's own code runs here around the blocks: towers, projectors, and the merge of their features into the
embeddings of the prompt.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from splitnet.blocks.block_inputs import PositionInputs
from splitnet.blocks.client_part import backbone_of, load_image_text_part
from splitnet.blocks.stand_ins import HandedStates
from splitnet.checkpoint.checkpoint import Checkpoint, open_store
from splitnet.checkpoint.families import packs_sequences, per_layer_size, sliding_windows
from splitnet.drafts.speculator import AUTO
from splitnet.errors import UnsupportedModel
from splitnet.hf.cache import RemoteCache
from splitnet.hf.causal_lm import RemoteCausalLM, connected
from splitnet.hf.parameters import FORWARD, mask_of, refuse
from splitnet.hf.peft_adapters import prompt_wrapper
from splitnet.hf.remote_blocks import CallArguments
from splitnet.hf.remote_model import joined, remote_blocks
from splitnet.hf.remote_vision import PeerFeatures, is_read_at_peers
from splitnet.session.options import JOINING, READING_IMAGES, ConnectionOptions, takes
from splitnet.swarm.swarm import Swarm
from splitnet.wire.block_inputs import MAX_ROTARY

KEPT_FEATURES = 4  # calls of the tower whose features are kept


class AutoModelForImageTextToText:
    """Loads a model with local towers, embeddings, final norm and head, and remote blocks; use `from_pretrained`."""

    def __init__(self) -> None:
        raise OSError("use splitnet.AutoModelForImageTextToText.from_pretrained(MODEL, initial_peers=[ADDR])")

    @classmethod
    @takes(*JOINING, *READING_IMAGES)
    def from_pretrained(
        cls, model: str | Path, *, initial_peers: Sequence[str], **options: Any
    ) -> RemoteImageTextToText:
        """A model of transformers that reads images and texts, as returned by `transformers.AutoProcessor`.

        Other arguments and errors are those of `AutoModelForCausalLM.from_pretrained`. Also raises UnsupportedModel:
        the model reads no images, or peers do not read those of its family.

        Args:
            vision: where the vision tower runs. "local": in this process; "peer": at peers with `--vision`, which see
                the images, and this process does not load it; "auto": local, unless the tower needs over half of the
                free memory and a peer reads images.
        """
        chosen = ConnectionOptions.of({"initial_peers": initial_peers, **options}, (*JOINING, *READING_IMAGES))
        with joined(model, chosen) as (checkpoint, swarm):
            return attached_with_images(checkpoint, swarm, chosen)


class AutoProcessor:
    """transformers' `AutoProcessor`, which takes a GGUF file with its projector as well."""

    @staticmethod
    def from_pretrained(model: str | Path) -> Any:
        """Loads the processor of texts and images of a GGUF file, folder or Hugging Face id.

        Raises ModelNotFound: it has none; UnsupportedModel: the model reads no images.
        """
        return open_store(model).with_towers().processor()


def attached_with_images(
    checkpoint: Checkpoint, swarm: Swarm, options: ConnectionOptions, speculate: Any = AUTO, kept: int = KEPT_FEATURES
) -> RemoteImageTextToText:
    """As `splitnet.hf.causal_lm.attached`, for the whole multimodal model. kept: calls of the tower whose features are
    kept."""
    checkpoint = checkpoint.with_towers
    blocks, handed = remote_blocks(checkpoint, swarm, options), _handed_states(checkpoint)
    how: dict[str, Any] = {"dtype": options.dtype, "device": options.device, "weights": options.held_as}
    at_peers = is_read_at_peers(checkpoint, swarm, options)
    client_part = load_image_text_part(checkpoint, blocks, handed, towers=not at_peers, **how)
    _keep_deltas_per_thread(client_part)
    model = connected(client_part, RemoteImageTextToText, blocks, checkpoint, swarm, options, speculate)
    at_peers = partial(PeerFeatures, swarm=swarm, codec=options.codec) if at_peers else None
    model.use_handed(handed, packs_sequences(checkpoint.config), kept, at_peers)
    return model


def _handed_states(checkpoint: Checkpoint) -> HandedStates:
    windows = {window for window in sliding_windows(checkpoint.config) if window is not None}
    return HandedStates(checkpoint.num_blocks, min(windows, default=None), per_layer_size(checkpoint.config))


class RemoteImageTextToText(RemoteCausalLM):
    """Methods of a model that reads images, beyond those of a causal LM."""

    sees_images = True

    def use_handed(
        self, handed: HandedStates, packs: bool, kept: int, at_peers: Callable[[nn.Module], Any] | None = None
    ) -> None:
        """Sets the object that receives the values which the model hands to its blocks. packs: see `Family`. kept: see
        `attached_with_images`. at_peers: makes the method that has peers compute features, in place of the module's."""
        self._handed, self._packs = handed, packs
        self._with_deltas = [module for module in self.modules() if isinstance(module, _DeltasPerThread)]
        decoder = backbone_of(self)
        for module in self.modules():
            if hasattr(module, "get_image_features") and any(child is decoder for child in module.children()):
                towers = nn.ModuleList(child for child in module.children() if child is not decoder)
                towers.requires_grad_(False)
                compute: Any = at_peers(module) if at_peers else module.get_image_features
                vars(module)["get_image_features"] = _KeptFeatures(compute, towers, kept)
        rope = getattr(self.config.get_text_config(), "rope_parameters", None) or {}
        self._axes = len(rope.get("mrope_section") or range(3))
        given = inspect.signature(self.transformers_class.forward).parameters
        self.prompt_arguments = frozenset(given) - FORWARD.keys() - {"self", "kwargs"} | {"token_type_ids"}

    def _has_images(self, given: Mapping[str, Any]) -> bool:
        """Whether there are images, and not only their sizes or positions, which are integers."""
        for name in self.prompt_arguments & given.keys():
            values = given[name] if isinstance(given[name], list | tuple) else [given[name]]
            if any(torch.is_tensor(each) and (each.is_floating_point() or "pixel_values" in name) for each in values):
                return True
        return False

    def _set_deltas(self, cache: RemoteCache | None) -> None:
        """Gives the family's code the offsets of rotary positions behind those of the cache: a text continues behind
        the highest axis."""
        offsets = None if cache is None else cache.remote.rotary_offsets
        for module in self._with_deltas:
            module.rope_deltas = None if offsets is None else offsets.amax(1, keepdim=True).to(self.device)

    def _generate(self, given: dict[str, Any]) -> Any:
        cache, ids = given.get("cache"), given.get("input_ids", given.get("inputs"))
        resumed = self._context.now.resumed is not None
        if self._has_images(given):
            self._check_prompt(given, trained=prompt_wrapper(self) is not None)
            if cache is not None:
                cache.remote.reset()  # equal tokens do not mean equal images; hops find stored pages of equal images
            self._set_deltas(None)
            return super()._generate(given)
        self._set_deltas(None if resumed else cache)
        token = getattr(self.config, "image_token_id", None)
        if torch.is_tensor(ids) and token is not None:
            mask = given.get("attention_mask")
            only_new = mask is not None and mask.shape != ids.shape
            held = 0 if cache is None or resumed or only_new else cache.remote.columns
            if bool((ids[:, held:] == token).any()):
                raise refuse("input_ids", "have tokens of an image without the image: give all that the processor gave")
        return super()._generate(given)

    def _call_model(self, forward: Callable[..., Any], given: dict[str, Any]) -> Any:
        if isinstance(given.get("past_key_values"), RemoteCache):  # the former name; PEFT gives a prefix by it
            given["cache"] = given.pop("past_key_values")
        # Some families would make a cache of their own before they call the backbone.
        given["use_cache"] = bool(given.get("use_cache") or given.get("cache"))
        if self._has_images(given) and given.get("position_ids") is None:
            prefix = any(isinstance(value, DynamicCache) and value.get_seq_length() for value in given.values())
            self._check_prompt(given, trained=prefix or given.get("input_ids") is None)
        given["cache"] = self._cache_for(given.get("cache"), given["use_cache"])
        if given.get("position_ids") is None:
            self._set_deltas(given["cache"])
        return super()._call_model(forward, given)

    def _check_prompt(self, given: Mapping[str, Any], *, trained: bool) -> None:
        """Raises UnsupportedParameter: positions or groups follow from tokens, which a trained prompt lacks."""
        counted = any(name.endswith("token_type_ids") and value is not None for name, value in given.items())
        if trained and (counted or self._with_deltas):
            why = "have no known positions behind embeddings or a trained prompt in the family"
            raise refuse("pixel_values", f"{why} {self.config.model_type!r}: train LoRA, or use texts alone")

    def _arguments_to_check(self, given: dict[str, Any]) -> dict[str, Any]:
        # `HandedStates` sees the effect of all other arguments.
        return {name: value for name, value in given.items() if name in FORWARD and name != "token_type_ids"}

    def _call_arguments(self, hidden: torch.Tensor, given: dict[str, Any], past: int) -> CallArguments:
        handed, mask, positions = self._handed, given.get("attention_mask"), given.get("position_ids")
        batch, new = hidden.shape[:2]
        group_mask, windowed = handed.mask()
        handed_mask = None if group_mask is None else group_mask.as_subclass(torch.Tensor)
        if handed_mask is not None:
            mask = handed_mask >= 0
        checked = mask_of(mask, batch, past + new)
        rotary = None
        if positions is not None and positions.ndim == 3:
            positions, rotary = None, _rotary_positions(positions, checked, past, self._axes)
        groups = None if handed_mask is None else handed_mask[:, past:].clamp(min=0)
        if groups is None or not bool(groups.any()):
            groups = None
        if rotary is None and groups is None and not handed.added:
            return CallArguments(mask, positions)
        if not self._packs and (groups is not None or handed.added):
            family = self.config.get_text_config().model_type
            raise UnsupportedModel(
                f"blocks of the family {family!r} read no groups of positions and no added states: use its text alone"
            )
        if any(states.requires_grad for states in handed.added.values()):
            why = "pass a trained tower, and peers give no gradients for the states that it adds between blocks"
            raise refuse("pixel_values", f"{why}: freeze the tower, or train layers of the text model alone")
        states = [hidden, *handed.added.values()]
        inputs = [
            PositionInputs(
                None if rotary is None else rotary[row].cpu(),
                None if groups is None else _numbered(groups[row], torch.cat([each[row] for each in states], dim=1)),
                {block: states[row] for block, states in handed.added.items()},
                windowed,
            )
            for row in range(batch)
        ]
        return CallArguments(checked, positions, inputs)


def _rotary_positions(positions: torch.Tensor, mask: torch.Tensor, past: int, axes: int) -> torch.Tensor | None:
    """`[batch, new, axes]` of positions `[axes, batch or 1, new]`; None: they are the numbers of the positions."""
    if positions.shape[0] > axes:  # the first axis numbers the positions without images
        positions = positions[1:]
    counted = (mask.long().cumsum(dim=1) - 1)[:, past:].to(positions.device)
    new = mask[:, past:].to(positions.device)
    given = positions[..., -new.shape[1] :].expand(-1, len(mask), -1)  # families count the cached positions, too
    sent = given.masked_select(new)
    if bool(((sent < 0) | (sent > MAX_ROTARY)).any()):
        raise refuse("position_ids", f"are not all from 0 to {MAX_ROTARY}: leave them out")
    if bool(((given == counted) | ~new).all()):
        return None
    return given.permute(1, 2, 0)


def _numbered(groups: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """`[new]`: each group's number as a digest of its positions and their states, `[new, values]`."""
    found = torch.zeros_like(groups)
    for group in groups.unique().tolist():
        own = groups == group
        if group:
            content = states[own].detach().float().cpu().numpy().tobytes() + str(int(own.int().argmax())).encode()
            found[own] = int.from_bytes(blake2b(content, digest_size=8).digest(), "little", signed=True) or 1
    return found.cpu()


class _KeptFeatures:
    """A method that computes the features of images, and keeps the last ones: each turn of a chat has all its images.

    compute: the family's method. towers: the modules that it runs; while one of them is trained, or an adapter has
    replaced some of them, nothing is kept. most: calls whose features are kept. Thread-safe.

    A call is known by its arguments, and by the versions and addresses of the towers' parameters and buffers. torch
    counts no version for a change through `.data`, such as `parameter.data.copy_(...)`, so it is not noticed: change
    weights under `torch.no_grad()`, or with `load_state_dict`.
    """

    def __init__(self, compute: Callable[..., Any], towers: nn.Module, most: int) -> None:
        functools.update_wrapper(self, compute)  # transformers reads the signature
        self._compute, self._towers, self._most = compute, towers, most
        self._modules = sum(1 for _ in towers.modules())
        self._kept: OrderedDict[bytes, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self._towers.parameters())
        if trained or sum(1 for _ in self._towers.modules()) != self._modules:
            return self._compute(*args, **kwargs)
        held = chain(self._towers.parameters(), self._towers.buffers())
        state = blake2b(repr([(each._version, each.data_ptr()) for each in held]).encode(), digest_size=32)
        for name, value in (*enumerate(args), *sorted(kwargs.items())):
            if torch.is_tensor(value):
                state.update(repr((name, value.dtype, value.shape)).encode())
                state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            else:
                state.update(repr((name, value)).encode())
        key = state.digest()
        with self._lock:
            found = self._kept.pop(key, None)
        found = self._compute(*args, **kwargs) if found is None else found
        with self._lock:
            self._kept[key] = found
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return copy.copy(found)


class _DeltasPerThread:
    """A module that keeps `rope_deltas` of the last prompt: threads generate at the same time."""

    @property
    def rope_deltas(self) -> Any:
        return getattr(self._of_thread, "value", None)

    @rope_deltas.setter
    def rope_deltas(self, value: Any) -> None:
        self._of_thread.value = value

    _of_thread: threading.local


def _keep_deltas_per_thread(model: PreTrainedModel) -> None:
    for module in model.modules():
        if "rope_deltas" in vars(module):
            del module.__dict__["rope_deltas"]
            own = type(module)
            members = {"_of_thread": threading.local(), "__module__": own.__module__}
            module.__class__ = type(own.__name__, (_DeltasPerThread, own), members)
