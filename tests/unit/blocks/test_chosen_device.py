"""The choice of a device, the requested one or the best that works, and its reason."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import typer

from splitnet.blocks import chosen_device as device_choice
from splitnet.blocks.chosen_device import DEVICE_NAME, TorchDevices, choose_device, find_device
from splitnet.cli.main import app
from splitnet.errors import SplitnetError
from splitnet.session.options import ConnectionOptions

TWO = TorchDevices({"cuda": ("NVIDIA A", "NVIDIA B"), "xpu": ("Arc",)})
ALL = TorchDevices({"xpu": ("Arc",), "mps": ("Metal",), "cuda": ("Instinct",)})


def without(present: TorchDevices, *devices: str) -> TorchDevices:
    return TorchDevices(present.names, dict.fromkeys(devices, "driver too old"))


@pytest.mark.parametrize(
    ("asked", "present", "device", "why"),
    [
        ("auto", ALL, "cuda:0", "Instinct"),
        ("auto", without(ALL, "cuda:0"), "mps", "Metal; cuda:0 cannot be used: driver too old"),
        ("auto", without(ALL, "cuda:0", "mps"), "xpu:0", "Arc; cuda:0 cannot be used: driver too old; mps cannot"),
        ("auto", without(ALL, "cuda:0", "mps", "xpu:0"), "cpu", "cuda:0 cannot be used: driver too old; mps"),
        ("auto", TWO, "cuda:0", "NVIDIA A, the first of 2"),
        ("auto", without(TWO, "cuda:0"), "cuda:1", "NVIDIA B"),
        ("auto", TorchDevices(), "cpu", "torch finds no GPU"),
        ("cpu", TWO, "cpu", "as asked for"),
        ("cuda", TWO, "cuda:0", "NVIDIA A, as asked for"),
        ("cuda:1", TWO, "cuda:1", "NVIDIA B, as asked for"),
        ("mps", ALL, "mps", "Metal, as asked for"),
        ("xpu", TWO, "xpu:0", "Arc, as asked for"),
    ],
)
def test_the_device(asked: str, present: TorchDevices, device: str, why: str) -> None:
    choice = choose_device(asked, present)
    assert choice.device == device
    assert choice.why.startswith(why)


@pytest.mark.parametrize(
    ("asked", "present", "sentence"),
    [
        ("cuda", TorchDevices(), "this machine has no device 'cuda' for torch, only cpu: use --device auto or cpu"),
        ("cuda:2", TWO, "no device 'cuda:2' for torch, only cpu, cuda:0, cuda:1, xpu:0: use --device auto or cpu"),
        ("mps", TWO, "no device 'mps'"),
        ("mps:0", ALL, "no device 'mps:0'"),
        ("warp", ALL, "no device 'warp'"),
        ("cuda:1", without(TWO, "cuda:1"), r"cuda:1 \(NVIDIA B\) cannot be used \(driver too old\): use --device auto"),
    ],
)
def test_an_absent_device_is_refused_by_name(asked: str, present: TorchDevices, sentence: str) -> None:
    with pytest.raises(SplitnetError, match=sentence):
        choose_device(asked, present)


def test_every_device_that_is_offered_may_be_asked_for() -> None:
    for device in (*ALL.devices, *TWO.devices, "auto", "cpu", "cuda", "xpu"):
        assert DEVICE_NAME.fullmatch(device)
    assert not any(DEVICE_NAME.fullmatch(text) for text in ("", "CUDA", "cuda:", "cuda:x", "mps:1", "cpu:0", "meta"))


def test_a_gpu_that_fails_is_passed_over_and_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(device_choice, "find_present", lambda *, tried=True: without(TWO, "cuda:0", "cuda:1"))
    with caplog.at_level(logging.INFO, device_choice.__name__):
        assert find_device("auto").device == "xpu:0"
    assert "computes on xpu:0 (Arc; cuda:0 cannot be used: driver too old" in caplog.text


def test_a_driver_that_does_not_start_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old(index: int) -> str:
        raise RuntimeError("The NVIDIA driver on your system is too old")

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device, so that its driver would start")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", too_old)
    assert device_choice.find_present(tried=False).devices == {"cuda:0": "a GPU"}
    with pytest.raises(SplitnetError, match=r"cuda:0 \(a GPU\) cannot be used"):
        find_device("cuda")


def test_a_named_device_is_tried_before_anything_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_choice, "find_present", lambda *, tried=True: TorchDevices({"cuda": ("Ghost",)}))
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device, so that it would not fail")
    with pytest.raises(SplitnetError, match=r"cuda:0 \(Ghost\) cannot be used \(.+\): use --device auto or cpu"):
        find_device("cuda")


def test_the_options_of_a_client_hold_the_device_that_was_found() -> None:
    assert ConnectionOptions.of({}).device == "cpu"
    with pytest.raises(SplitnetError, match="no device 'cuda:99'"):
        ConnectionOptions.of({"device": "cuda:99"})


def test_all_commands_that_compute_take_a_device() -> None:
    group: Any = typer.main.get_command(app)
    offered = {
        name: parameter
        for name, command in group.commands.items()
        for parameter in command.params
        if parameter.name == "device"
    }
    assert set(offered) == {"peer", "generate", "chat", "serve", "tune", "bench", "demo", "doctor", "run"}
    for parameter in offered.values():
        assert parameter.opts == ["--device"] and parameter.default == "auto"
        assert "CUDA" in parameter.help and "SPLITNET_DEVICE" in parameter.envvar
