"""A command's process imports no unused libraries. For each workaround a test fails once the workaround is needless."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from splitnet.blocks.backbone import _made_on_meta, on_meta
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.families import causal_class
from tests.unit.random_models import random_checkpoint

ROOT = Path(__file__).resolve().parents[2]
UNUSED = {"hivemind.averaging", "scipy", "sympy", "torch._dynamo", "torch._inductor", "torch.distributed.tensor"}
"""Libraries that other libraries import although splitnet does not use them; they cost 3 s and 130 MiB in total."""


def imported(program: str, *arguments: str) -> set[str]:
    """The modules of `UNUSED` that a process has imported after a program."""
    program += f"\nimport json, sys; print(json.dumps(sorted({UNUSED} & sys.modules.keys())))"
    command = [sys.executable, "-c", program, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return set(json.loads(ended.stdout.splitlines()[-1]))


AS_A_COMMAND = "from splitnet import import_shims; import_shims.claim_process(); import_shims.import_models()"
SERVE_AND_ASK = f"""
import sys
{AS_A_COMMAND}
import torch
from peers.running_peer import RunningPeer
from peers.peer_options import PeerOptions
from splitnet.cli.connection import ModelConnection
from splitnet.cli.text_generator import TextGenerator, SamplingOptions
from splitnet.session.options import ConnectionOptions

peer = RunningPeer.start(sys.argv[1], PeerOptions(listen="tcp://127.0.0.1:0", device="cpu"))
connection = ModelConnection(sys.argv[1], ConnectionOptions(initial_peers=peer.directory.addresses, device="cpu"))
checkpoint = connection.checkpoint()
from splitnet.hf.causal_lm import attached
model = attached(checkpoint, connection.swarm(checkpoint), connection.options)
model.generate(torch.arange(3, 9)[None], max_new_tokens=3, do_sample=False)
model.close()
peer.close()
"""


@pytest.mark.default_cases(family=("llama",))
@pytest.mark.swarm
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_peer_and_a_client_import_no_unused_library(tmp_path: Path, family: str) -> None:
    assert imported(SERVE_AND_ASK, str(random_checkpoint(family, tmp_path / "model"))) == set()


@pytest.mark.full
def test_a_program_that_imports_splitnet_gets_unchanged_transformers() -> None:
    program = "from splitnet.import_shims import import_models; import_models(); import sys"
    program += "; assert 'transformers' not in sys.modules; import transformers.modeling_utils"
    assert imported(program) >= {"scipy", "torch._dynamo", "torch.distributed.tensor"}


@pytest.mark.full
def test_late_imports_are_present_when_used() -> None:
    program = f"""
{AS_A_COMMAND}
from splitnet.directory.hivemind_node import import_hivemind
import_hivemind()
import hivemind, torch, transformers
assert hivemind.__version__ and hivemind.DHT and hivemind.averaging.DecentralizedAverager
assert torch._dynamo.allow_in_graph and torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
assert transformers.models.llama.LlamaConfig is transformers.LlamaConfig
assert transformers.masking_utils.TransformGetItemToIndex()
assert torch.distributed.tensor.DTensor and not hasattr(torch.distributed, "tensors")
"""
    assert imported(program) >= {"torch._dynamo", "torch.distributed.tensor"}


@pytest.mark.parametrize("family", ["llama", "jamba"])  # llama: a rotary embedding; jamba: a weight made from a range.
def test_a_model_without_weights_is_entirely_on_the_meta_device(tmp_path: Path, family: str) -> None:
    config = Checkpoint.open(random_checkpoint(family, tmp_path / "model")).config
    model = on_meta(causal_class(config), config)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_a_model_that_mixes_real_and_meta_tensors_is_built() -> None:
    assert _made_on_meta(lambda: torch.arange(3) / 2).device.type == "cpu"
    assert _made_on_meta(lambda: torch.arange(3) * torch.ones(3)).is_meta


@pytest.mark.full
@pytest.mark.parametrize(
    ("module", "brings", "workaround"),
    [
        ("transformers.core_model_loading", "torch.distributed.tensor", "ABSENT[is_torch_distributed_available]"),
        ("transformers.loss.loss_rt_detr", "scipy", "ABSENT[is_scipy_available]"),
        ("transformers.integrations.deepgemm", "torch._dynamo", "_without_compiler"),
        ("hivemind.dht.node", "hivemind.averaging", "late_package('hivemind')"),
    ],
)
def test_a_workaround_is_still_needed(module: str, brings: str, workaround: str) -> None:
    assert brings in imported(f"import {module}"), f"{workaround} in splitnet/import_shims.py is needless now"


@pytest.mark.full
@pytest.mark.parametrize(
    ("program", "brings", "workaround"),
    [
        ("torch.nn.Embedding(2, 2, device='meta')", "torch._dynamo", "_LightMeta in splitnet/blocks/backbone.py"),
        (
            "class Own(torch.Tensor):\n"
            "    @classmethod\n"
            "    def __torch_dispatch__(cls, *_): return torch.empty(())\n"
            "torch.Tensor._make_wrapper_subclass(Own, ()).detach()",
            "torch.distributed.tensor",
            "_forget_dtensors in splitnet/import_shims.py",
        ),
    ],
)
def test_a_workaround_for_torch_is_still_needed(program: str, brings: str, workaround: str) -> None:
    assert brings in imported(f"import torch\n{program}"), f"{workaround} is needless now"
