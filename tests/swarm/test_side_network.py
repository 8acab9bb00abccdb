"""A side network: trained on hidden states that are received once, it adds the same with remote blocks as on the whole
model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaModel
from transformers.modeling_outputs import CausalLMOutput

from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import AdapterError, SplitnetError, UnsupportedParameter
from splitnet.hf.causal_lm import RemoteCausalLM
from splitnet.hf.peft_adapters import load_adapter
from splitnet.hf.side_network import SideNetwork
from splitnet.tools.tune.folder import TuningFolder
from splitnet.tools.tune.run import Encoded
from splitnet.tools.tune.side_tuner import SideTuner
from splitnet.tools.tune.states import States
from tests.swarm.adapters import batch, padded
from tests.swarm.generation import GREEDY, prompt
from tests.swarm.harness import LocalSwarm, shared_swarm
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(request.param, tmp_path_factory.mktemp("model") / request.param)


@pytest.fixture(scope="module")
def swarm(folder: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    with shared_swarm(folder, [(0, 2), (2, 4), (4, 6)], node=node) as started:
        yield started


@pytest.fixture(scope="module")
def whole(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def adapter(whole: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a side network that changes the model's tokens."""
    saved = tmp_path_factory.mktemp("side")
    torch.manual_seed(5)
    config = whole.config.get_text_config()
    side = SideNetwork.beside(config.hidden_size, config.num_hidden_layers, width=32)
    nn.init.normal_(side.write.weight, std=0.5)
    side.save(saved / "adapter_config.json", saved / "adapter_model.safetensors", None)
    return saved


def beside(model: Any, folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Logits of a whole model with a side network, in plain transformers: the code of docs/tuning.md."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    width = config["width"]
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": width // 32}
    layers = LlamaModel(LlamaConfig(vocab_size=1, num_hidden_layers=config["layers"], **sizes))
    own = {name.removeprefix("layers."): tensor for name, tensor in tensors.items() if name.startswith("layers.")}
    layers.load_state_dict(own, strict=False)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        states = model(ids, output_hidden_states=True).hidden_states
        read = [states[tap] for tap in config["taps"]] + [states[-1]]
        normed = torch.cat([functional.rms_norm(one, one.shape[-1:]) for one in read], dim=-1)
        inner = layers(inputs_embeds=normed @ tensors["read.weight"].T).last_hidden_state
        return model.lm_head(states[-1] + inner @ tensors["write.weight"].T)

    return logits


@torch.no_grad()
def continued(logits: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy continuation of one row, one token at a time."""
    for _ in range(count):
        ids = torch.cat((ids, logits(ids)[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    return ids


@pytest.mark.default_cases(folder=("llama",))
def test_a_side_network_adds_the_same_as_on_the_whole_model(swarm: LocalSwarm, whole: Any, adapter: Path) -> None:
    """Token by token, in a session that continues, and in a batch with padding on the left."""
    logits = beside(whole, adapter)
    expected = continued(logits, prompt()["input_ids"], 12)
    assert not expected.equal(whole.generate(**prompt(), **{**GREEDY, "max_new_tokens": 12}))
    options = {**GREEDY, "max_new_tokens": 6}
    with swarm.visit() as visit:
        model = load_adapter(visit.model(), adapter)
        assert model.generate(**prompt(), **{**GREEDY, "max_new_tokens": 12}).equal(expected)
        with model.session():
            first = model.generate(**prompt(), **options)
            assert model.generate(input_ids=first, attention_mask=torch.ones_like(first), **options).equal(expected)
            # A prompt that shares only its beginning with the held text.
            assert model.generate(**prompt(), **options).equal(first)
        rows = padded(side="left")
        found = model.generate(**rows, **options)
        for row, mask, whole_row in zip(rows["input_ids"], rows["attention_mask"], found, strict=True):
            alone = continued(logits, row[mask.bool()][None], 6)
            assert whole_row[int((mask == 0).sum()) :].equal(alone[0])


@pytest.mark.default_cases(folder=("llama",))
def test_the_cache_of_a_side_network_matches_that_of_the_peers(swarm: LocalSwarm, whole: Any, adapter: Path) -> None:
    logits = beside(whole, adapter)
    options = {**GREEDY, "max_new_tokens": 4}
    ids = prompt()["input_ids"]
    expected = continued(logits, ids, 4)
    with swarm.visit() as visit:
        model: RemoteCausalLM = load_adapter(visit.model(), adapter)
        assert model.generate(**prompt(), **options, use_cache=False).equal(expected)
        assert model(ids, use_cache=False).get("cache") is None
        with model.session():
            left = {name: torch.nn.functional.pad(tensor, (2, 0)) for name, tensor in prompt().items()}
            first = model.generate(**left, **options)
            assert first[:, 2:].equal(expected)
            longer = torch.cat((first[:, 2:], ids[:, :2]), dim=1)  # Without the padding.
            found = model.generate(input_ids=longer, attention_mask=torch.ones_like(longer), **options)
            assert found.equal(continued(logits, longer, 4))
            two = longer.repeat(2, 1)
            assert model.generate(input_ids=two, attention_mask=torch.ones_like(two), **options)[1].equal(found[0])
            torch.manual_seed(9)
            other = SideNetwork.beside(model.ends.hidden_size, model.ends.num_blocks, width=64)
            nn.init.normal_(other.write.weight, std=0.5)
            model.use_side(other.eval())
            alone = model.generate(input_ids=longer, attention_mask=torch.ones_like(longer), **options)
        assert model.generate(input_ids=longer, attention_mask=torch.ones_like(longer), **options).equal(alone)
        cache = model.new_cache()
        model(ids, cache=cache)
        model.use_side(SideNetwork.beside(model.ends.hidden_size, model.ends.num_blocks, width=64))
        with pytest.raises(AdapterError, match="begin with a new cache"):
            model(ids[:, :1], cache=cache)
        cache.close()


@pytest.mark.default_cases(folder=("llama",))
def test_the_cache_of_a_side_network_follows_repeated_and_reordered_rows(
    swarm: LocalSwarm, whole: Any, adapter: Path
) -> None:
    """As for `n` answers to one prompt, and for beams."""
    logits, ids = beside(whole, adapter), prompt()["input_ids"]

    def forward(input_ids: torch.Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=logits(input_ids))

    with swarm.visit() as visit:
        model: RemoteCausalLM = load_adapter(visit.model(), adapter)
        cache = model.new_cache()
        with torch.no_grad():
            model(ids[:, :-1], cache=cache)
            cache.remote.batch_repeat_interleave(2)
            two = torch.stack((ids[0, -1:], ids[0, :1]))
            found = model(two, cache=cache).logits
            expected = logits(torch.cat((ids[:, :-1].repeat(2, 1), two), dim=1))[:, -1:]
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
        cache.close()
        beams = {**GREEDY, "max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 3}
        found = model.generate(**prompt(), **beams)
        tuned = copy.copy(whole)
        tuned.forward = forward
        assert found.equal(tuned.generate(**prompt(), **beams, use_cache=False))
        assert not found.equal(whole.generate(**prompt(), **beams))


@pytest.mark.default_cases(folder=("llama",))
def test_the_loss_of_a_side_network_equals_that_on_the_whole_model(
    swarm: LocalSwarm, whole: Any, adapter: Path, tmp_path: Path
) -> None:
    """Trained on states on the disk, in 16 bits, without any peer; the loss decreases."""
    rows = batch()
    encoded = [
        Encoded(ids[mask.bool()].tolist(), labels[mask.bool()].tolist())
        for ids, mask, labels in zip(*rows.values(), strict=True)
    ]
    folder = TuningFolder(tmp_path)
    folder.claim({})
    told: list[str] = []
    with swarm.visit() as visit:
        model = visit.model()
        with pytest.raises(SplitnetError, match="--states-limit"):
            SideTuner(model, 32, States(folder), encoded, 1000)
        tuner = SideTuner(model, 32, States(folder), encoded, 1 << 20)
        tuner.compute_states(0, told.append, [])
        SideTuner(model, 32, States(folder), encoded, 1 << 20).compute_states(0, told.append, [])
        assert len(told) == 2, "what is there is not computed again"
    with torch.no_grad():
        assert float(tuner(**rows).loss) == pytest.approx(float(whole(**rows).loss), rel=1e-3)
    tuner.side.load_state_dict(load_file(adapter / "adapter_model.safetensors"))
    logits = beside(whole, adapter)
    alone = [logits(torch.tensor([row.ids]))[0, :-1] for row in encoded]
    targets = torch.tensor([target for row in encoded for target in row.targets[1:]])
    expected = functional.cross_entropy(torch.cat(alone), targets)
    with torch.no_grad():
        found = tuner(**rows, logits_to_keep=1)
    assert float(found.loss) == pytest.approx(float(expected.detach()), rel=1e-2) and found.logits.shape[1] == 1
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    loss = found.loss
    for _ in range(20):
        optimizer.zero_grad()
        loss = tuner(**rows, logits_to_keep=1).loss
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < float(found.loss) / 2


@pytest.mark.default_cases(folder=("llama",))
def test_options_that_conflict_with_a_side_network_are_refused(
    swarm: LocalSwarm, adapter: Path, tmp_path: Path
) -> None:
    with swarm.visit() as visit:
        model: RemoteCausalLM = load_adapter(visit.model(), adapter)
        with pytest.raises(UnsupportedParameter, match="side network"):
            model.generate(**prompt(), **GREEDY, speculate="prompt-lookup")
        config = json.loads((adapter / "adapter_config.json").read_text())
        (tmp_path / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
        wrong = [{"taps": [1, 99]}, {"taps": "1"}, {"width": 33}, {"width": 64}, {"layers": 10**6}, {"hidden_size": 7}]
        for changed in wrong:
            (tmp_path / "adapter_config.json").write_text(json.dumps(config | changed))
            with pytest.raises(AdapterError, match=str(tmp_path)):
                load_adapter(visit.model(), tmp_path)
