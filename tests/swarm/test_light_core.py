"""The base installation is enough for peers and clients; features that need an extra name it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest

from splitnet.cli import arguments
from splitnet.cli.arguments import EXTRAS, has, require
from splitnet.errors import SplitnetError
from tests.unit.random_models import random_checkpoint

ROOT = Path(__file__).resolve().parents[2]
ABSENT = {*(module for modules in EXTRAS.values() for module in modules), "accelerate", "starlette"} - {"h11"}
"""Packages of the extras, and packages that only these depend on; the library of the hub imports h11, too."""

WITHOUT_EXTRAS = f"""
import sys
from importlib.machinery import PathFinder

class WithoutExtras(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutExtras
"""

EVERY_MODULE = """
import importlib, importlib.util, pathlib
from typer.testing import CliRunner
from splitnet.cli.main import app
assert importlib.util.find_spec("peft") is None
for command in ([], ["peer"], ["generate"], ["serve"], ["tune"]):
    assert CliRunner().invoke(app, [*command, "--help"]).exit_code == 0
folders = ("scheduler", "splitnet", "peers", "simulator")
files = [file for folder in folders for file in pathlib.Path(folder).rglob("*.py")]
for file in files:
    name = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
    if not name.startswith("splitnet.serve.") and not name.endswith("__main__"):
        importlib.import_module(name)
"""

GENERATE = """
import torch
from transformers import AutoModelForCausalLM
from tests.swarm.harness import local_swarm

folder = pathlib.Path(sys.argv[1])
ids = torch.arange(3, 12)[None]
with local_swarm(folder, [(0, 3), (3, 6)]) as swarm:
    remote = swarm.model().generate(ids, max_new_tokens=8, do_sample=False)
whole = AutoModelForCausalLM.from_pretrained(folder).generate(ids, max_new_tokens=8, do_sample=False)
assert torch.equal(remote, whole), (remote, whole)
"""


@pytest.mark.swarm
def test_without_extras_all_modules_but_the_servers_import_and_a_swarm_generates(tmp_path: Path) -> None:
    folder = random_checkpoint("llama", tmp_path / "model")
    command = [sys.executable, "-c", WITHOUT_EXTRAS + EVERY_MODULE + GENERATE, str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=90)
    assert ended.returncode == 0, ended.stderr


def test_the_table_of_extras_equals_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w-]", requirement)[0] for requirement in requirements}

    brought = {extra: names(project["optional-dependencies"][extra]) for extra in EXTRAS}
    package_of = {"PIL": "pillow"}
    assert all(
        {package_of.get(module, module) for module in modules} <= brought[extra] for extra, modules in EXTRAS.items()
    )
    assert not names(project["dependencies"]) & set().union(*brought.values())
    assert project["optional-dependencies"]["all"] == [f"splitnet[{','.join(sorted(EXTRAS))}]"]


def test_the_error_of_a_missing_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(module: str) -> Any:
        return None if module == "llguidance" else PathFinder.find_spec(module)

    monkeypatch.setattr(arguments, "find_spec", find_spec)
    require("tune", "splitnet tune")
    assert has("plot") and not has("serve")
    with pytest.raises(SplitnetError, match=r"^splitnet serve needs .*`pip install 'splitnet\[serve\]'`$"):
        require("serve", "splitnet serve")
