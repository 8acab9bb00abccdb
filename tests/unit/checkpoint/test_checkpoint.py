"""Reading checkpoints: which bytes are read, from where, and how checkpoints are distinguished."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from splitnet.blocks.span import RowChunk, Span, block_bytes
from splitnet.checkpoint import safetensors
from splitnet.checkpoint.checkpoint import Checkpoint, open_store
from splitnet.errors import ModelNotFound, UnsupportedModel
from tests.unit.random_models import random_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("llama", tmp_path_factory.mktemp("models") / "tiny")


class FakeHub:
    """A hub with one repository, which has the files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.downloaded: list[str] = []
        self.opened: list[str] = []

    def hf_hub_download(self, repo: str, file: str, revision: str | None = None) -> str:
        assert (repo, revision) == ("someone/tiny", "v1")
        if not (self.folder / file).exists():
            raise EntryNotFoundError(f"no {file}")
        self.downloaded.append(file)
        return str(self.folder / file)

    def get_hf_file_metadata(self, url: str) -> None:
        assert url.endswith("/someone/tiny/resolve/v1/config.json")

    def try_to_load_from_cache(self, repo: str, file: str, revision: str | None = None) -> str | None:
        return str(self.folder / file) if file in self.downloaded else None

    def open(self, path: str, mode: str, revision: str | None = None, block_size: int | None = None) -> Any:
        file = path.removeprefix("someone/tiny/")
        self.opened.append(file)
        return (self.folder / file).open("rb")


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    hub = FakeHub(folder)
    monkeypatch.setattr(safetensors, "hf_hub_download", hub.hf_hub_download)
    monkeypatch.setattr(safetensors, "get_hf_file_metadata", hub.get_hf_file_metadata)
    monkeypatch.setattr(safetensors, "try_to_load_from_cache", hub.try_to_load_from_cache)
    monkeypatch.setattr(safetensors, "HfFileSystem", lambda: hub)
    return hub


def test_facts_of_a_folder(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.name == "tiny"
    assert (checkpoint.num_blocks, checkpoint.hidden_size, checkpoint.model_type) == (6, 64, "llama")
    assert checkpoint.max_positions == 256
    assert checkpoint.dtype == torch.float32
    assert checkpoint.container == "model.layers"
    assert set(checkpoint.client_part_names_of) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    model = AutoModelForCausalLM.from_pretrained(folder)
    block = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    assert block_bytes(checkpoint, None) == block
    assert block_bytes(checkpoint, torch.bfloat16) == block // 2
    assert checkpoint.generation_config().eos_token_id == 2


def test_only_needed_shards_are_downloaded_from_the_hub(folder: Path, hub: FakeHub) -> None:
    checkpoint = Checkpoint.open("someone/tiny", revision="v1")
    assert hub.downloaded == ["config.json", "model.safetensors.index.json"]
    assert checkpoint.name == "someone/tiny"
    local = Checkpoint.open(folder)
    assert checkpoint.fingerprint == local.fingerprint
    assert not [file for file in hub.downloaded if file.endswith(".safetensors")]
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(hub.opened) == set(weight_map.values())
    # The header of each of these small shards, and its tensors in order.
    assert len(hub.opened) == 2 * len(set(weight_map.values()))

    span = Span.load(checkpoint, 4, 5)
    needed = {weight_map[tensor.name] for tensor in local.block_tensors[4]}
    assert {file for file in hub.downloaded if file.endswith(".safetensors")} == needed
    assert needed < set(weight_map.values())
    hidden, same = torch.randn(2, 64), Span.load(local, 4, 5)
    assert torch.equal(
        span.forward(hidden, [RowChunk(span.new_row(), 0, 2)]), same.forward(hidden, [RowChunk(same.new_row(), 0, 2)])
    )


LINEAR = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


def _resharded(folder: Path, target: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(target)  # one shard
    return target


def _other_weights(folder: Path, target: Path) -> Path:
    return random_checkpoint("llama", target, seed=1)


def _one_other_tensor(name: str) -> Callable[[Path, Path], Path]:
    def change(folder: Path, target: Path) -> Path:
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            model.get_parameter(name).mul_(1.01)
        model.save_pretrained(target, max_shard_size="200KB")
        return target

    return change


def _other_precision(folder: Path, target: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(target)
    return target


def _other_rope(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    (target / "config.json").write_text(json.dumps(config))
    return target


def _other_notes(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config |= {"transformers_version": "5.0.0", "_name_or_path": "elsewhere", "use_cache": False}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("change", "equal"),
    [
        (_resharded, True),
        (_other_notes, True),
        (_other_weights, False),
        *((_one_other_tensor(f"model.layers.{i}.{rest}.weight"), False) for i, rest in enumerate(LINEAR)),
        (_one_other_tensor("model.norm.weight"), False),
        (_other_precision, False),
        (_other_rope, False),
    ],
)
def test_fingerprint(change: Callable[[Path, Path], Path], equal: bool, folder: Path, tmp_path: Path) -> None:
    changed = Checkpoint.open(change(folder, tmp_path / "changed")).fingerprint
    assert (changed == Checkpoint.open(folder).fingerprint) is equal
    assert len(bytes.fromhex(changed)) == 32


def test_a_shard_that_ends_too_early_has_no_fingerprint(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    shard = max((tmp_path / "copy").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ModelNotFound, match="not complete"):
        _ = Checkpoint.open(tmp_path / "copy").fingerprint


def test_missing_models_are_errors_with_a_fix(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no folder"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        Checkpoint.open(tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(ModelNotFound, match=r"no safetensors.*save_pretrained"):
        Checkpoint.open(tmp_path)
    with pytest.raises(ModelNotFound, match="tokenizer"):
        Checkpoint.open(folder).tokenizer()


class EmptyHub(BaseHTTPRequestHandler):
    """An HTTP server of a hub without any repository."""

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def empty_hub() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), EmptyHub) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server
        server.shutdown()


@pytest.fixture
def use_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], None]:
    """Makes the hub client ask a port of this machine, with an empty cache in `tmp_path`."""

    def use(port: int) -> None:
        endpoint = f"http://127.0.0.1:{port}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    return use


@pytest.mark.parametrize(("listens", "said"), [(True, "check the name, or log in"), (False, "cannot be reached")])
def test_an_unavailable_id_is_an_error_at_once(
    listens: bool, said: str, empty_hub: ThreadingHTTPServer, use_hub: Callable[[int], None]
) -> None:
    use_hub(empty_hub.server_port if listens else 1)
    began = time.monotonic()
    with pytest.raises(ModelNotFound, match=said):
        Checkpoint.open("no/such-model")
    assert time.monotonic() - began < 10  # the hub client would try for 23 s


def test_a_model_in_the_cache_needs_no_network(folder: Path, use_hub: Callable[[int], None], tmp_path: Path) -> None:
    use_hub(1)
    cache = tmp_path / "models--someone--tiny"
    _resharded(folder, cache / "snapshots" / "abc")  # the cache knows that there is no index
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    (cache / ".no_exist" / "abc").mkdir(parents=True)
    (cache / ".no_exist" / "abc" / safetensors.INDEX_FILE).touch()
    began = time.monotonic()
    assert Checkpoint.open("someone/tiny").fingerprint == Checkpoint.open(folder).fingerprint
    assert time.monotonic() - began < 10


def test_a_shard_that_is_missing_or_damaged(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    checkpoint = Checkpoint.open(copy)
    weight_map = json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"]
    shard = copy / weight_map[checkpoint.block_tensors[5][0].name]
    shard.write_bytes(b"\xff" * 100)
    with pytest.raises(UnsupportedModel, match="not a safetensors file"):
        Span.load(checkpoint, 5, 6)
    shard.unlink()
    with pytest.raises(ModelNotFound, match=f"lacks {shard.name}"):
        Span.load(Checkpoint.open(copy), 5, 6)


def test_a_shard_that_ends_early(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for shard in copy.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ModelNotFound, match=r"safetensors of copy is not complete.*download it again"):
        Span.load(Checkpoint.open(copy), 5, 6)


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"model.layers.0.mlp.up_proj.weight": 1}}']
)
def test_an_invalid_index(index: str, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelNotFound, match=r"index\.json of copy does not name, .*download it again"):
        Checkpoint.open(copy)


def test_an_index_of_other_shards(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    index = copy / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    name = Checkpoint.open(folder).block_tensors[5][0].name
    other = next(shard for shard in weight_map.values() if shard != weight_map[name])
    index.write_text(json.dumps({"weight_map": weight_map | {name: other}}))
    checkpoint = Checkpoint.open(copy)
    for read in (lambda: checkpoint.store.tensor_facts([name]), lambda: Span.load(checkpoint, 5, 6)):
        with pytest.raises(ModelNotFound, match=f"{other} of copy lacks {name}"):
            read()


def test_a_config_that_its_family_cannot_have(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_attention_heads": 7}))
    with pytest.raises(UnsupportedModel, match="values that its family cannot have"):
        Checkpoint.open(copy)


def test_a_checkpoint_that_does_not_fit_its_config(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
    with pytest.raises(UnsupportedModel, match="9 numbered blocks"):
        Span.load(Checkpoint.open(copy), 0, 1)
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(UnsupportedModel, match="another shape"):
        Span.load(Checkpoint.open(copy), 0, 1)
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "no-such-family"}))
    with pytest.raises(UnsupportedModel, match="update transformers"):
        Checkpoint.open(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelNotFound, match="cannot be read"):
        Checkpoint.open(copy)


def test_tables_of_single_rows_stay_in_the_file(tmp_path: Path) -> None:
    names = "model.embed_tokens_per_layer.weight", "model.embed_tokens.weight"
    save_file({name: torch.randn(64, 16) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with open_store(tmp_path).load_tensors({name: name for name in names}, torch.float32) as tensors:
        kept, copied = ([tensors[name][...], tensors[name][...]] for name in names)
    assert kept[0].data_ptr() == kept[1].data_ptr()
    assert copied[0].data_ptr() != copied[1].data_ptr()
    assert torch.equal(kept[0], load_file(tmp_path / "model.safetensors")[names[0]])
