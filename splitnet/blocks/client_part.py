"""The client part of a model: embeddings, final norm and head, with one module in place of all blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Never

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from splitnet.blocks.attention import PACKED
from splitnet.blocks.backbone import (
    find_container,
    keep_configs,
    list_of_blocks,
    load_cut,
    loaded_as,
    on_meta,
    parent_of,
    slice_config,
)
from splitnet.blocks.head import Head, hold_head
from splitnet.blocks.stand_ins import HANDED, AllBlocks, BlockList, BlockStandIn, HandedStates
from splitnet.checkpoint.checkpoint import OTHER_TOWERS, Checkpoint, check_no_unexpected, ignored
from splitnet.checkpoint.families import (
    ALL_POSITIONS,
    NEUTRAL_ATTRIBUTES,
    causal_class,
    classifier_class,
    image_text_class,
    packs_sequences,
    per_layer_size,
)
from splitnet.errors import AdapterError, UnsupportedModel
from splitnet.quant.choose import choose_weights
from splitnet.quant.gpu import use_device_kernels
from splitnet.quant.packed_tensor import as_dtype


@torch.inference_mode(False)  # the model is also used outside inference mode
def load_client_part(
    checkpoint: Checkpoint,
    blocks: nn.Module,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    weights: str | None = None,
    headless: bool = False,
) -> PreTrainedModel:
    """Loads the causal language model of a checkpoint with `blocks` in place of its blocks, whose weights are not read.

    transformers' code sees one block, with one layer of cache; `model.config` is the config of the whole model. The
    list of blocks holds an outline of their linear layers, see `BlockList`.

    Args:
        blocks: its `forward` maps `[batch, sequence, hidden]` to the same shape. It stays on its device.
        dtype: type of the weights, such as "bfloat16"; None: as the checkpoint stores them.
        weights: the format of the head's weight, see `splitnet.quant.choose`; None: as `dtype`, or in the codes of the
            checkpoint. Embeddings always keep their codes.
        headless: accepts a checkpoint without a head; the output of the final norm is then returned as the logits.

    Raises UnsupportedModel if the family cannot be cut, or the checkpoint does not fit it, and WeightsError if a weight
    cannot be held in that format.
    """
    computes = as_dtype(dtype) or checkpoint.dtype
    if weights == "bfloat16" and computes == torch.float32:
        dtype = computes  # else the whole client part would compute in bfloat16
    chosen = choose_weights(weights, dtype, checkpoint.dtype, torch.device(device))
    config, model_class = copy.deepcopy(checkpoint.config), causal_class(checkpoint.config)
    lacks_head = headless and not config.tie_word_embeddings and not _has_head(checkpoint, model_class)
    config.tie_word_embeddings |= lacks_head  # so that transformers looks for no head
    model = _load(checkpoint, config, model_class, blocks, dtype, device)
    if lacks_head:
        model.set_output_embeddings(nn.Identity())
    else:
        hold_head(model, chosen)
    use_device_kernels(model, computes)
    return model


def _has_head(checkpoint: Checkpoint, model_class: type[PreTrainedModel]) -> bool:
    heads: Any = model_class._tied_weights_keys
    names = client_part_names(checkpoint, model_class, find_container(model_class, checkpoint.config))
    loaded = loaded_as(on_meta(model_class, checkpoint.config), names)
    return not heads or any(name in heads for name in loaded.values())


@torch.inference_mode(False)
def load_classifier_part(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    blocks: nn.Module,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """As `load_client_part`, for the model that classifies sequences; a head that the checkpoint lacks is initialised
    randomly.

    `config`: the checkpoint's config, with the wanted labels. Raises UnsupportedModel if transformers has no such model
    of this family, or as `load_client_part` does.
    """
    return _load(checkpoint, config, classifier_class(config), blocks, dtype, device, new_head=True)


def _load(
    checkpoint: Checkpoint,
    whole_config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    blocks: nn.Module,
    dtype: torch.dtype | str | None,
    device: str | torch.device,
    *,
    new_head: bool = False,
) -> PreTrainedModel:
    config = copy.deepcopy(whole_config)
    container = find_container(model_class, config)
    wanted = as_dtype(dtype) or checkpoint.dtype
    outlines: list[nn.Module] = []

    def cut(model: PreTrainedModel) -> None:
        parent, name = parent_of(model, container)
        outlines[:] = [outline_of(block, wanted) for block in getattr(parent, name)]
        setattr(parent, name, nn.ModuleList())
        if per_layer_size(config):  # each block reads an input of its own, so the model sees all blocks
            return
        keep_configs(parent)
        owners: list[Any] = [model, parent]  # some classes give their backbone a separate config
        for own in {id(owner.config): owner.config for owner in owners}.values():
            # The rotary embeddings of some backbones know only the layer types of the original blocks.
            types = getattr(own, "layer_types", None) or ()
            index = types.index("full_attention") if "full_attention" in types else 0
            slice_config(own, index, index + 1)

    # No attention runs here: with this name transformers makes no masks, where it allows that.
    attention = PACKED if packs_sequences(config) else None
    names = client_part_names(checkpoint, model_class, container)
    with checkpoint.store.load_tensors(names, wanted) as tensors:
        kept = {"names": names, "new_head": new_head, "codes_on": torch.device(device)}
        model = load_cut(model_class, config, cut, tensors, wanted, attention, **kept)
    nn.Module.to(model, device)
    parent, name = parent_of(model, container)
    returns_tuple = blocks_return_tuple(model, container)
    if size := per_layer_size(config):
        handed = HandedStates(checkpoint.num_blocks, per_layer_size=size)
        _check_between(model, _put_stand_ins(model, container, blocks, returns_tuple, handed, outlines), handed)
    else:
        setattr(parent, name, BlockList([AllBlocks(blocks, returns_tuple)], outlines))
    model.config = copy.deepcopy(whole_config)
    if model.can_generate():
        model.generation_config = checkpoint.generation_config()
    return model


@dataclass(frozen=True)
class ImageTextLayout:
    """Where a multimodal model has its parts.

    config: of the whole model. skeleton: the model without weights. decoder: name of the text backbone in it. blocks:
    name of the list of blocks in the backbone. towers: names in the checkpoint of the tensors of towers and projectors.
    """

    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    skeleton: PreTrainedModel
    decoder: str
    blocks: str
    names: frozenset[str]
    towers: frozenset[str]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> ImageTextLayout:
        """Raises UnsupportedModel: the model reads no images, or its family cannot be cut."""
        whole = copy.deepcopy(checkpoint.store.config)
        whole.tie_word_embeddings = whole.get_text_config().tie_word_embeddings = checkpoint.config.tie_word_embeddings
        model_class = image_text_class(whole)
        skeleton: Any = on_meta(model_class, whole)
        backbone = skeleton.get_decoder()
        decoder = next(name for name, module in skeleton.named_modules() if module is backbone)
        blocks = list_of_blocks(backbone, checkpoint.num_blocks, checkpoint.model_type)
        names = frozenset(checkpoint.client_part_names_of) - ignored(checkpoint.client_part_names_of, model_class)
        beside = decoder.rpartition(".")[0] + "."
        loaded = loaded_as(skeleton, names).items()
        towers = frozenset(
            name for name, place in loaded if place.startswith(beside) and not place.startswith(decoder + ".")
        )
        return cls(whole, model_class, skeleton, decoder, blocks, names, towers)

    @property
    def holder(self) -> nn.Module:
        """The module, in the skeleton, that has the backbone and the towers."""
        return parent_of(self.skeleton, self.decoder)[0]

    def load(
        self,
        checkpoint: Checkpoint,
        cut: Callable[[PreTrainedModel], None],
        dtype: torch.dtype,
        device: torch.device,
        without: frozenset[str],
    ) -> PreTrainedModel:
        """Loads what `cut` has left of the model. without: names of tensors that are not read."""
        names = {name: name for name in checkpoint.client_part_names_of if name in self.names - without}
        with checkpoint.store.load_tensors(names, dtype) as tensors:
            return load_cut(self.model_class, self.config, cut, tensors, dtype, None, names=names, codes_on=device)


@torch.inference_mode(False)
def load_tower(
    checkpoint: Checkpoint, *, dtype: torch.dtype | str | None = None, device: str | torch.device = "cpu"
) -> nn.Module:
    """The module with the family's `get_image_features`, with its towers and without the text backbone. Raises
    UnsupportedModel as `ImageTextLayout.of` does."""
    layout = ImageTextLayout.of(checkpoint)
    layout.config.tie_word_embeddings = layout.config.get_text_config().tie_word_embeddings = False

    def cut(model: PreTrainedModel) -> None:
        holder, name = parent_of(model, layout.decoder)
        setattr(holder, name, nn.Module())
        for other, _ in list(model.named_children()) if holder is not model else ():
            if not layout.decoder.startswith(other + "."):
                setattr(model, other, nn.Module())

    others = layout.names - layout.towers
    model = layout.load(checkpoint, cut, as_dtype(dtype) or checkpoint.dtype, torch.device(device), without=others)
    return nn.Module.to(parent_of(model, layout.decoder)[0], device).eval()


@torch.inference_mode(False)
def load_image_text_part(
    checkpoint: Checkpoint,
    blocks: nn.Module,
    handed: HandedStates,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    weights: str | None = None,
    towers: bool = True,
) -> PreTrainedModel:
    """As `load_client_part`, for the whole multimodal model: its towers and projectors run here.

    handed: receives the values that the model hands to its blocks besides hidden states. towers: whether towers are
    loaded; else empty modules replace them.
    """
    computes = as_dtype(dtype) or checkpoint.dtype
    layout = ImageTextLayout.of(checkpoint)
    container = f"{layout.decoder}.{layout.blocks}"
    outlines: list[nn.Module] = []

    def cut(model: PreTrainedModel) -> None:
        parent, name = parent_of(model, container)
        outlines[:] = [outline_of(block, computes) for block in getattr(parent, name)]
        setattr(parent, name, nn.ModuleList())
        if not towers:
            holder, decoder = parent_of(model, layout.decoder)
            for each in [each for each, _ in holder.named_children() if each != decoder]:
                setattr(holder, each, nn.Module())

    model = layout.load(
        checkpoint, cut, computes, torch.device(device), without=frozenset() if towers else layout.towers
    )
    nn.Module.to(model, device)
    parent: Any = parent_of(model, container)[0]
    returns_tuple = blocks_return_tuple(model, container)
    stand_ins = _put_stand_ins(model, container, blocks, returns_tuple, handed, outlines)
    configs: list[Any] = [parent.config, model.config.get_text_config()]
    for config in configs:
        config._attn_implementation_internal = HANDED
    hold_head(model, choose_weights(weights, dtype, checkpoint.dtype, torch.device(device)))
    use_device_kernels(model, computes)
    model.generation_config = checkpoint.generation_config()
    _check_between(model, stand_ins, handed)
    return model


def _put_stand_ins(
    model: PreTrainedModel,
    container: str,
    blocks: nn.Module,
    returns_tuple: bool,
    handed: HandedStates,
    outlines: Sequence[nn.Module],
) -> list[BlockStandIn]:
    parent, name = parent_of(model, container)
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"] * handed.num_blocks
    stand_ins = [BlockStandIn(blocks, returns_tuple, handed, index, kind) for index, kind in enumerate(kinds)]
    setattr(parent, name, BlockList(stand_ins, outlines))
    if hasattr(parent, ALL_POSITIONS):
        setattr(parent, ALL_POSITIONS, NEUTRAL_ATTRIBUTES[ALL_POSITIONS])
    return stand_ins


@torch.no_grad()
def _check_between(model: Any, stand_ins: Sequence[BlockStandIn], handed: HandedStates) -> None:
    """Raises UnsupportedModel: the model changes hidden states between its blocks, also in a text without images."""
    ids = torch.arange(1, 4, device=model.device)[None]
    noise = torch.randn(1, 3, model.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(0))
    noise = noise.to(model.device, model.dtype)
    blocks, stand_ins[-1].blocks = stand_ins[-1].blocks, nn.Identity()
    for each in stand_ins:
        each.output = noise
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        stand_ins[-1].blocks = blocks
        for each in stand_ins:
            each.output = None
    if not all(torch.equal(handed.added[index], noise) for index in range(1, len(stand_ins))):
        raise UnsupportedModel(f"the family {model.config.model_type!r} changes hidden states between its blocks")


def check_all_is_taken(checkpoint: Checkpoint) -> None:
    """Checks a whole checkpoint by the headers of its files, without reading weights.

    Raises UnsupportedModel if it has tensors that no part of the model takes, or tensors that contradict their format.
    """
    model_class = causal_class(checkpoint.config)
    container = find_container(model_class, checkpoint.config)
    names = client_part_names(checkpoint, model_class, container)
    for index, block in enumerate(checkpoint.block_tensors):
        names |= {f"{container}.{index}.{tensor.rest}": tensor.name for tensor in block}
    facts = checkpoint.store.tensor_facts(names.values())
    model = on_meta(model_class, checkpoint.config)
    parameters = model.state_dict()
    loaded = loaded_as(model, names)
    unknown = {name for name, parameter in loaded.items() if not {name, parameter} & parameters.keys()}
    left = {names[name] for name in unknown - ignored(unknown, model)}
    # Biases of layers in codes may be zero; `load_cut` checks this when it loads them.
    weights = {name: facts.get(name.removesuffix("bias") + "weight") for name in left if name.endswith(".bias")}
    left -= {name for name, weight in weights.items() if weight is not None and weight.layout is not None}
    check_no_unexpected(left, checkpoint.model_type)


def backbone_of(model: nn.Module) -> nn.Module:
    """The module of a client part whose `forward` loops over the blocks; it receives `attention_mask`, `cache` and so
    on."""
    for module in model.modules():
        if any(isinstance(child, BlockList) for child in module.children()):
            return module
    raise ValueError("this model is not a client part: load it with load_client_part")


def outline_in(model: nn.Module) -> BlockList:
    """The outline of the blocks of a client part."""
    return next(child for child in backbone_of(model).children() if isinstance(child, BlockList))


def client_part_names(checkpoint: Checkpoint, model_class: type[PreTrainedModel], container: str) -> dict[str, str]:
    """Name in the model -> name in the checkpoint, for the model's tensors outside the blocks.

    The names differ if the checkpoint belongs to a multimodal model, where names of the text model have another prefix.
    Tensors of that model's other parts are left out, and so are tensors that models of the family ignore on purpose.
    Raises UnsupportedModel if a multimodal checkpoint has tensors that belong to none of its parts.
    """
    if not checkpoint.multimodal:
        left_out = ignored(checkpoint.client_part_names_of, model_class)
        return {name: name for name in checkpoint.client_part_names_of if name not in left_out}
    own, stored = container.rpartition(".")[0], checkpoint.container.rpartition(".")[0]
    names: dict[str, str] = {}
    others: list[str] = []
    for name in checkpoint.client_part_names_of:
        if name.startswith(stored + "."):
            names[own + name.removeprefix(stored)] = name
        elif OTHER_TOWERS.search(name):
            continue
        elif head := next((head for head in ("lm_head.weight", "score.weight") if name.endswith(head)), None):
            names[head] = name
        else:
            others.append(name)
    check_no_unexpected(set(others) - ignored(others, model_class), checkpoint.model_type)
    left_out = ignored(names, model_class)
    return {name: stored for name, stored in names.items() if name not in left_out}


class ClientPart:
    """Embeddings, final norm and head of a client part. Each use looks the module up, because adapters may replace it.

    norm: the name of the final norm in the backbone, "" if unknown.
    compute_everything: besides its blocks, the model computes only these three modules.
    special: tokens for which the model computes more.
    """

    def __init__(self, model: Any, backbone: Any, norm: str) -> None:
        self.model = model
        self._backbone = backbone
        self._norm = norm
        self.compute_everything = False
        self.special: frozenset[int] = frozenset()
        config = model.config.get_text_config()
        self.hidden_size: int = config.hidden_size
        self.num_blocks: int = config.num_hidden_layers
        self.vocabulary: int = config.vocab_size

    @property
    def embed(self) -> Any:
        """`[...]` -> `[..., hidden]`."""
        return self.model.get_input_embeddings()

    @property
    def norm(self) -> Any:
        """The final norm: `[..., hidden]` -> the same shape; None if it is unknown."""
        return getattr(self._backbone, self._norm, None)

    @property
    def head(self) -> Any:
        """`[..., hidden]`, after the final norm -> `[..., vocabulary]`; None: the head cannot be called alone."""
        return self.model.get_output_embeddings()

    def logits(self, hidden: Tensor, best: int = 0) -> Tensor:
        """`[..., hidden]`, before the final norm -> `[..., vocabulary]`. best: how many of the largest logits are read,
        see `Head.best_logits`; 0: all."""
        head, states = self.head, self.norm(hidden)
        return head.best_logits(states, best) if best and isinstance(head, Head) else head(states)


@torch.no_grad()
def client_part_of(model: PreTrainedModel) -> ClientPart:
    """The ends of a client part. `compute_everything` is found by a trial with blocks that return their input; it is
    false for
    families that scale embeddings or logits."""
    backbone = backbone_of(model)
    known = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f")
    client_part = ClientPart(
        model, backbone, next((name for name in known if getattr(backbone, name, None) is not None), "")
    )
    if client_part.norm is None or client_part.head is None:
        return client_part
    named = {value for name, value in vars(model.config).items() if name.endswith(("token_id", "token_index"))}
    known_tokens = sorted(one for one in named if isinstance(one, int) and 3 < one < client_part.vocabulary)
    tokens = [1, 2, 3, *known_tokens]
    ids = torch.tensor([tokens], device=model.device)
    stand_in = outline_in(model)[-1]
    blocks, stand_in.blocks = stand_in.blocks, nn.Identity()
    try:
        expected = model(input_ids=ids, use_cache=False).logits
    finally:
        stand_in.blocks = blocks
    same = (client_part.logits(client_part.embed(ids)) == expected)[0].all(-1).tolist()
    client_part.compute_everything = all(same[:3]) and not per_layer_size(model.config.get_text_config())
    client_part.special = frozenset(token for token, as_others in zip(tokens, same, strict=True) if not as_others)
    return client_part


def blocks_return_tuple(model: PreTrainedModel, container: str) -> bool:
    """Whether a family's backbone takes `output[0]` of the value that a block returns: found by trying both return
    types.

    Taking `[0]` of a tensor would drop the batch dimension, often without an error. Raises UnsupportedModel if the
    backbone takes neither a tensor nor a tuple. `container`: the name of the list of blocks in `model`; it may be
    empty.
    """
    backbone = parent_of(model, container)[0]
    inputs = {"input_ids": torch.zeros(2, 3, dtype=torch.long, device=model.device)}
    for returns_tuple in (False, True):
        output = _run_without_blocks(model, container, returns_tuple, backbone, inputs)
        if output is not None and output.shape[:2] == (2, 3):
            return returns_tuple
    raise UnsupportedModel(f"the client part of the family {model.config.model_type!r} does not run without its blocks")


def check_neutral(backbone: PreTrainedModel, container: str, dtype: torch.dtype) -> None:
    """Raises UnsupportedModel if a backbone computes more than its blocks: without blocks, it must return its input."""
    size = backbone.config.hidden_size
    hidden = torch.linspace(-1, 1, 6 * size, device=backbone.device).reshape(2, 3, size).to(dtype)
    inputs = {"inputs_embeds": hidden, "position_ids": torch.arange(4, 7, device=backbone.device)[None].expand(2, -1)}
    for returns_tuple in (False, True):
        output = _run_without_blocks(backbone, container, returns_tuple, backbone, inputs)
        if output is not None and output.shape == hidden.shape and torch.equal(output, hidden):
            return
    raise UnsupportedModel(
        f"models of the family {backbone.config.model_type!r} cannot be cut into spans: they change the hidden state "
        "outside their blocks in an unknown way"
    )


def _run_without_blocks(
    model: PreTrainedModel, container: str, returns_tuple: bool, backbone: Any, inputs: dict[str, Tensor]
) -> Tensor | None:
    """The output of `backbone`, a part of `model`, with a block that does nothing in place of the blocks; None: this
    does not run."""
    parent, name = parent_of(model, container)
    config: Any = parent.config
    blocks, count = getattr(parent, name), config.num_hidden_layers
    seen = count if per_layer_size(config) else 1
    setattr(parent, name, nn.ModuleList([AllBlocks(nn.Identity(), returns_tuple) for _ in range(seen)]))
    config.num_hidden_layers = seen
    try:
        with torch.inference_mode():
            output = backbone(**inputs, use_cache=False)[0]
    except (IndexError, AttributeError, TypeError, ValueError, RuntimeError):
        return None
    finally:
        setattr(parent, name, blocks)
        config.num_hidden_layers = count
    return output if isinstance(output, Tensor) else None


class AbsentWeight(Tensor):
    """Shape and type of a weight that is on a peer; code that needs its numbers raises AdapterError. The device is the
    CPU, because code that adds to a layer uses the device of the layer's weight."""

    @staticmethod
    def __new__(cls, rows: int, columns: int, dtype: torch.dtype) -> AbsentWeight:
        make: Any = Tensor._make_wrapper_subclass
        return make(cls, (rows, columns), dtype=dtype, device="cpu")

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: Any = (), kwargs: Any = None) -> Never:
        raise _absent()

    def __deepcopy__(self, memo: object) -> AbsentWeight:
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"AbsentWeight{tuple(self.shape)}"


class RemotePart(nn.Module):
    """A module without weights on this machine; its submodules have no weights either, except an adapter's modules."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Raises AdapterError if there are no parameters, because code that asks for parameters needs some."""
        first = next(found := super().parameters(recurse), None)
        if first is None:
            raise _absent()
        yield first
        yield from found


class RemoteLinear(nn.Linear):
    """A linear layer whose weight is on a peer; running it raises AdapterError."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.weight = AbsentWeight(out_features, in_features, dtype)  # type: ignore[assignment]
        self.bias = None  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        raise _absent()


class RemoteConv1D(Conv1D):
    """As `RemoteLinear`, for the layers of GPT-2, whose weight is `[inputs, outputs]`."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.nx, self.nf = in_features, out_features
        self.weight = AbsentWeight(in_features, out_features, dtype)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        raise _absent()


def outline_of(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The modules of a block, by their names."""
    if isinstance(block, nn.Linear):
        return RemoteLinear(block.in_features, block.out_features, dtype)
    if isinstance(block, Conv1D):
        conv: Any = block
        return RemoteConv1D(conv.nx, conv.nf, dtype)
    outline = RemotePart()
    for name, part in block.named_children():
        outline.add_module(name, outline_of(part, dtype))
    return outline


def _absent() -> AdapterError:
    return AdapterError(
        "PiSSA, OLoRA, DoRA, AdaptionPrompt, modules_to_save and merging need the weights of the blocks, and "
        "these are on the peers: use LoRA that starts without them (init_lora_weights=True), a prompt or a prefix, and "
        "load the model again"
    )
