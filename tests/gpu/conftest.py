"""The devices of the GPU tests: each GPU that torch finds, or a stand-in for a GPU.

The stand-in changes torch for the whole process. It is therefore used only on request, in a separate process:
`GPU_TESTS_ON=stand-in pytest -n0 tests/gpu`. `tests/unit/blocks/test_span_devices.py` runs this command.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch

import peers.running_peer
from splitnet.blocks import chosen_device as device_choice
from splitnet.blocks.chosen_device import ChosenDevice, find_device
from splitnet.blocks.fast import graph_step
from splitnet.quant import experts
from splitnet.session import options
from tests.unit.recorded_operations import OperationRecorder

STAND_IN = os.environ.get("GPU_TESTS_ON") == "stand-in"
KINDS = ("stand-in",) if STAND_IN else ("cuda", "mps", "xpu")


@pytest.fixture(scope="session", params=KINDS)
def device(request: pytest.FixtureRequest) -> Any:
    """The name, in torch, of a device other than the CPU."""
    if request.param != "stand-in":
        if not device_choice.find_present(tried=False).names[request.param]:
            pytest.skip(f"torch {torch.__version__} finds no device {request.param!r} here")
        yield str(find_device(request.param).device)
        return
    from tests.gpu.other_device import OTHER, add_other_device

    falling = itertools.count(0.0, -1.0)
    name = str(add_other_device())

    def found(asked: str) -> ChosenDevice:
        return ChosenDevice(name, "the stand-in") if asked == name else find_device(asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers.running_peer, "find_device", found)
        patch.setattr(options, "find_device", found)
        patch.setattr(torch.accelerator, "synchronize", lambda device: None)
        # Graphs and the grouped product are always used, so that no decision depends on timing.
        patch.setattr(graph_step, "recorder_for", lambda device: OperationRecorder() if device == OTHER else None)
        patch.setattr(graph_step, "SIZES", (1, 4))
        for module in (graph_step, experts):
            patch.setattr(module, "milliseconds", lambda device, work, times: next(falling))
        yield name


@pytest.fixture
def gpu(device: str) -> str:
    """The name of a real GPU; tests with the stand-in, which has neither kernels nor separate memory, are skipped."""
    if STAND_IN:
        pytest.skip("the stand-in computes on the CPU")
    return device
