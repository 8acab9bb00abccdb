"""The client's part of a model: embeddings, final norm and head, without its blocks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from splitnet.blocks.attention import PACKED
from splitnet.blocks.backbone import find_container, keep_configs, load_cut, loaded_as, on_meta, parent_of, slice_config
from splitnet.blocks.head import hold_head
from splitnet.blocks.stand_in import AllBlocks, BlockList, blocks_return_tuple, outline_of
from splitnet.checkpoint.checkpoint import OTHER_TOWERS, Checkpoint, check_no_unexpected, ignored
from splitnet.checkpoint.families import causal_class, classifier_class, packs_sequences
from splitnet.quant.choose import choose_weights
from splitnet.quant.gpu import use_device_kernels
from splitnet.quant.weight_form import as_dtype


@torch.inference_mode(False)  # what is loaded is used outside of it, too
def load_client_part(
    checkpoint: Checkpoint,
    blocks: nn.Module,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    weights: str | None = None,
) -> PreTrainedModel:
    """The causal language model of a checkpoint with `blocks` in place of its own; only the rest is read.

    transformers' code sees one block, with one layer of cache; `model.config` is that of the whole model. In the list
    of blocks stands an outline of their linear layers, see `splitnet.blocks.stand_in`.

    Args:
        blocks: its `forward` takes and gives `[batch, sequence, hidden]`. It stays where it is.
        dtype: of the weights, such as "bfloat16"; None: as the checkpoint stores them.
        weights: what the head holds its weight as, see `splitnet.quant.choose`; None: as `dtype`, or in the codes of
            the checkpoint. Embeddings keep their codes in any case.

    Raises:
        UnsupportedModel: the family cannot be cut, or the checkpoint does not fit it.
        WeightsError: a weight cannot be held so.
    """
    computes = as_dtype(dtype) or checkpoint.dtype
    if weights == "bfloat16" and computes == torch.float32:
        dtype = computes  # or bfloat16 would be what all computes in
    chosen = choose_weights(weights, dtype, checkpoint.dtype, torch.device(device))
    model = _load(checkpoint, checkpoint.config, causal_class(checkpoint.config), blocks, dtype, device)
    hold_head(model, chosen)
    use_device_kernels(model, computes)
    return model


@torch.inference_mode(False)
def load_classifier_part(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    blocks: nn.Module,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """The same for the model that classifies sequences; a head that the checkpoint does not have is a new, random one.

    Args:
        config: that of the checkpoint, with the labels that are wanted.
        blocks, dtype: as for `load_client_part`.

    Raises:
        UnsupportedModel: transformers has no such model of this family, or as for `load_client_part`.
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
        keep_configs(parent)
        owners: list[Any] = [model, parent]  # some classes give their backbone a config of its own
        for own in {id(owner.config): owner.config for owner in owners}.values():
            # The rotary embedding of some backbones knows only the kinds that there were.
            types = getattr(own, "layer_types", None) or ()
            index = types.index("full_attention") if "full_attention" in types else 0
            slice_config(own, index, index + 1)

    # Nothing attends here: the packed attention's name only tells transformers to make no masks, where it can.
    attention = PACKED if packs_sequences(config) else None
    names = client_part_names(checkpoint, model_class, container)
    with checkpoint.store.load_tensors(names, wanted) as tensors:
        model = load_cut(
            model_class,
            config,
            cut,
            tensors,
            wanted,
            attention,
            names=names,
            new_head=new_head,
            codes_on=torch.device(device),
        )
    nn.Module.to(model, device)
    parent, name = parent_of(model, container)
    setattr(parent, name, BlockList(AllBlocks(blocks, blocks_return_tuple(model, container)), outlines))
    model.config = copy.deepcopy(whole_config)
    if model.can_generate():
        model.generation_config = checkpoint.generation_config()
    return model


def check_all_is_taken(checkpoint: Checkpoint) -> None:
    """Reads the headers of a whole checkpoint, and no weights.

    Raises:
        UnsupportedModel: it holds tensors that no part of the model takes, or that are not what their format says.
    """
    model_class = causal_class(checkpoint.config)
    container = find_container(model_class, checkpoint.config)
    names = client_part_names(checkpoint, model_class, container)
    for index, block in enumerate(checkpoint.block_tensors):
        names |= {f"{container}.{index}.{tensor.rest}": tensor.name for tensor in block}
    facts = checkpoint.store.facts(names.values())
    model = on_meta(model_class, checkpoint.config)
    parameters = model.state_dict()
    loaded = loaded_as(model, names)
    unknown = {name for name, parameter in loaded.items() if not {name, parameter} & parameters.keys()}
    left = {names[name] for name in unknown - ignored(unknown, model)}
    # Biases of layers in codes may be zero, for which what loads them looks.
    weights = {name: facts.get(name.removesuffix("bias") + "weight") for name in left if name.endswith(".bias")}
    left -= {name for name, weight in weights.items() if weight is not None and weight.layout is not None}
    check_no_unexpected(left, checkpoint.model_type)


def backbone_of(model: nn.Module) -> nn.Module:
    """The module of a shell whose `forward` loops over the blocks: it receives `attention_mask`, `cache` and so on."""
    for module in model.modules():
        if any(isinstance(child, BlockList) for child in module.children()):
            return module
    raise ValueError("this model has no place where its blocks were: load it with load_client_part")


def outline_in(model: nn.Module) -> BlockList:
    """The outline of a shell's blocks."""
    return next(child for child in backbone_of(model).children() if isinstance(child, BlockList))


def client_part_names(checkpoint: Checkpoint, model_class: type[PreTrainedModel], container: str) -> dict[str, str]:
    """Name in the model -> name in the checkpoint, of what is outside the blocks and meant for the model.

    They differ where the checkpoint is of a multimodal model, whose text model has a prefix of its own. What belongs to
    other parts of that is left, and so is what models of the family leave out on purpose.

    Raises:
        UnsupportedModel: a multimodal checkpoint has tensors that belong to none of its parts.
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
        elif head := next((head for head in _HEADS if name.endswith(head)), None):
            names[head] = name
        else:
            others.append(name)
    check_no_unexpected(set(others) - ignored(others, model_class), checkpoint.model_type)
    left_out = ignored(names, model_class)
    return {name: stored for name, stored in names.items() if name not in left_out}


_HEADS = ("lm_head.weight", "score.weight")


class Ends:
    """Embeddings, final norm and head.

    Args:
        model: whose they are; they are looked up at every call, as adapters may be put on them.
        backbone: has the norm.
    """

    def __init__(self, model: PreTrainedModel, backbone: nn.Module) -> None:
        self._model: Any = model
        self._backbone: Any = backbone

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """`[batch, seq]` -> `[batch, seq, hidden]`."""
        return self._model.get_input_embeddings()(ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[batch, seq, hidden]` -> `[batch, seq, vocabulary]`."""
        return self._model.get_output_embeddings()(self._backbone.norm(hidden))


@torch.no_grad()
def ends_of(model: PreTrainedModel) -> Ends | None:
    """The ends of a shell; None if it does more than they do, besides its blocks.

    Found by trying, with blocks that give what they are given: some families scale embeddings or logits, or add
    something for each position.
    """
    backbone = backbone_of(model)
    if getattr(backbone, "norm", None) is None or model.get_output_embeddings() is None:
        return None
    ends = Ends(model, backbone)
    ids = torch.arange(1, 4, device=model.device)[None]
    stand_in = outline_in(model)[0]
    blocks, stand_in.blocks = stand_in.blocks, nn.Identity()
    try:
        expected = model(input_ids=ids, use_cache=False).logits
    finally:
        stand_in.blocks = blocks
    return ends if torch.equal(ends.logits(ends.embed(ids)), expected) else None
