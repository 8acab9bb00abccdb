"""The rules of the architecture: one-way imports, no import cycles, no pickle, documents that name existing code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("scheduler", "splitnet", "peers", "simulator")
MAY_IMPORT_PEERS = "splitnet.cli.peer"
UNSAFE_SERIALIZERS = {"_pickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


def source_files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in source_files(*PACKAGES)}


@cache
def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def targets(node: ast.Import | ast.ImportFrom, importer: str) -> Iterator[str]:
    """The modules that one import statement names, e.g. `a.b` for `from a import b` if b is a module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        package = importer.split(".") if MODULES[importer].name == "__init__.py" else importer.split(".")[:-1]
        base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
    for alias in node.names:
        submodule = f"{base}.{alias.name}"
        yield submodule if submodule in MODULES else base


@cache
def imports(module: str) -> set[str]:
    """The modules that a module imports, including imports within functions and imports only for annotations."""
    return {
        name
        for node in ast.walk(parse(MODULES[module]))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in targets(node, module)
    }


def importers_of(packages: set[str], within: str) -> set[str]:
    """Modules of the package `within` that import one of `packages`, including imports within functions."""
    return {
        module
        for module in MODULES
        if module.split(".")[0] == within and any(name.split(".")[0] in packages for name in imports(module))
    }


def test_every_package_is_found() -> None:
    assert {module.split(".")[0] for module in MODULES} == set(PACKAGES)


def test_the_scheduler_stands_alone() -> None:
    allowed = sys.stdlib_module_names | {"numpy", "scheduler"}
    foreign = {
        (module, name)
        for module in MODULES
        if module.split(".")[0] == "scheduler"
        for name in imports(module)
        if name.split(".")[0] not in allowed
    }
    assert not foreign


def test_one_file_of_splitnet_imports_the_peers() -> None:
    assert importers_of({"peers"}, within="splitnet") == {MAY_IMPORT_PEERS}


def test_no_product_module_imports_the_simulator() -> None:
    """`splitnet/cli/main.py` only names the module of the simulate command, and works without the simulator."""
    for package in ("scheduler", "splitnet", "peers"):
        assert importers_of({"simulator"}, within=package) == set()
    assert importers_of({"peers"}, within="simulator") == set()
    named = [file for file in source_files("scheduler", "splitnet", "peers") if "simulator." in file.read_text()]
    assert [module_name(file) for file in named] == ["splitnet.cli.main"]


def test_only_the_serve_command_imports_the_server() -> None:
    """The module with the formats of tool calls is an exception: chat templates of training data use this module, too,
    and it needs no optional dependency."""
    forms = "splitnet.serve.answers.call_forms"
    importers = {
        module
        for module in MODULES
        if not module.startswith("splitnet.serve")
        and any(name.startswith("splitnet.serve") and name != forms for name in imports(module))
    }
    assert importers == {"splitnet.cli.serve"}


def test_one_file_of_the_server_calls_the_model() -> None:
    calls = {
        file.name
        for file in source_files("splitnet/serve")
        for node in ast.walk(parse(file))
        # Names of keyword arguments are skipped, because the function may belong to a library.
        if not isinstance(node, ast.keyword)
        if isinstance(node, ast.Call) and re.search(r"(^|\.)(generate|model|new_cache)$", ast.unparse(node.func))
    }
    assert calls == {"generation.py"}


def package(module: str) -> str:
    """The subfolder of splitnet/ that holds a module, or the module's name if it is directly in splitnet/."""
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("place", [str, package])
def test_modules_and_packages_have_no_import_cycles(place: Callable[[str], str]) -> None:
    graph: dict[str, set[str]] = {place(module): set() for module in MODULES}
    for module in MODULES:
        graph[place(module)] |= {place(name) for name in imports(module) & MODULES.keys()} - {place(module)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' <- '.join(error.args[1])}", pytrace=False)


def test_no_module_uses_pickle() -> None:
    offenders: list[str] = []
    for file in source_files(*PACKAGES, "benchmarks", "examples"):
        for node in ast.walk(parse(file)):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
                names = ["pickle"]  # Both functions use pickle internally.
            if UNSAFE_SERIALIZERS & {name.split(".")[0] for name in names}:
                offenders.append(f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}")
    assert not offenders


PART_OWNERS = {
    "route_state": {"peers.hop_outputs", "peers.next_hop", "peers.service"},
    "row_state": {"peers.rows"},
    "queue_state": {"peers.queue"},
    "training_state": {"peers.training_service"},
}


def test_each_part_of_a_session_is_for_its_owner_and_each_field_has_one_writer() -> None:
    """Only its owner may read or write a part; all modules may read the other fields of
    `peers/sessions.py:HopSession`."""
    touched: dict[str, set[str]] = {part: set() for part in PART_OWNERS}
    writers: dict[str, set[str]] = {}
    for module in MODULES.keys() - {"peers.sessions"}:
        for node in ast.walk(parse(MODULES[module])) if module.startswith("peers.") else ():
            if not isinstance(node, ast.Attribute):
                continue
            if node.attr in touched or (node.attr.endswith("_state") and ast.unparse(node.value).endswith("session")):
                touched.setdefault(node.attr, set()).add(module)
            elif isinstance(node.ctx, ast.Store) and ast.unparse(node.value).endswith("session"):
                writers.setdefault(node.attr, set()).add(module)
    assert touched == PART_OWNERS
    assert writers and {field: modules for field, modules in writers.items() if len(modules) > 1} == {}


def defines(body: list[ast.stmt], path: list[str]) -> bool:
    """Whether statements define the name `path`, e.g. ["Session", "step"]."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == path[0]:
            if len(path) == 1 or (isinstance(node, ast.ClassDef) and defines(node.body, path[1:])):
                return True
        elif isinstance(node, ast.Assign | ast.AnnAssign) and len(path) == 1:
            assigned = node.targets if isinstance(node, ast.Assign) else [node.target]
            if path[0] in {name.id for name in assigned if isinstance(name, ast.Name)}:
                return True
        elif isinstance(node, ast.If) and defines([*node.body, *node.orelse], path):
            return True
    return False


def wrong_mentions(text: str) -> tuple[int, list[str]]:
    """The number of `path/file.py` or `path/file.py:Name.part` in a text, and the list of missing ones."""
    mentions = re.findall(r"(?<![\w/.-])([\w./-]+\.py)(?::([A-Za-z_][\w.]*\w))?(?!\w)", text)
    wrong: list[str] = []
    for path, name in mentions:
        file = ROOT / path
        if "/" not in path and not file.is_file():
            namesakes = [candidate for candidate in source_files(*PACKAGES, "tests") if candidate.name == path]
            file = namesakes[0] if len(namesakes) == 1 else file
        if not file.is_file() or (name and not defines(parse(file).body, name.split("."))):
            wrong.append(f"{path}:{name}" if name else path)
    return len(mentions), wrong


def test_mentions_of_missing_code_are_found() -> None:
    here = "tests/unit/test_architecture.py"
    text = f"`{here}:defines`, `{here}:nothing`, {here}:defines. scheduler/absent.py, `test_architecture.py:ROOT`"
    assert wrong_mentions(text) == (5, [f"{here}:nothing", "scheduler/absent.py"])


@pytest.mark.parametrize("document", ["ARCHITECTURE.md", "CONTRIBUTING.md", "docs/scheduling.md"])
def test_a_document_names_existing_code(document: str) -> None:
    mentioned, wrong = wrong_mentions((ROOT / document).read_text())
    assert mentioned > 0
    assert not wrong


OTHER_SENSES = {"Adopted", "budget", "carried", "consumption", "ends", "form", "helper", "kind", "lift"}
OTHER_SENSES |= {"path", "piece", "place", "quota", "recovery", "repair", "stage"}
"""Words that the glossary forbids in one sense, and that names use in another sense or in public interfaces."""


def glossary() -> Iterator[tuple[str, set[str]]]:
    """Yields each entry, with the single words that must not be used in its place."""
    for line in (ROOT / "docs" / "concepts.md").read_text().partition("## Glossary")[2].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0] not in ("word", "---") and " for " not in cells[2]:
            yield cells[0], set(re.findall(r"(?:^|[,;] )`?(\w+)`?(?=$|[,;])", cells[2]))


def test_names_keep_to_the_glossary() -> None:
    unused = set[str]().union(*(words for _, words in glossary()))
    assert unused >= OTHER_SENSES and len(unused) > len(OTHER_SENSES)
    forms = {word + end: word for word in unused - OTHER_SENSES for end in ("", "s", "ed")}
    found = {
        f"{name} ({word})"
        for file in MODULES.values()
        for node in ast.walk(parse(file))
        # Names of keyword arguments are skipped, because the function may belong to a library.
        if not isinstance(node, ast.keyword)
        for name in (getattr(node, field, None) for field in ("name", "attr", "arg", "id"))
        if isinstance(name, str)
        for word in map(str.lower, re.findall("[A-Z]+(?![a-z])|[A-Z][a-z]+|[a-z]+", name))
        if word in forms
    }
    assert not found


def test_protocol_document_has_the_version_of_the_code() -> None:
    from splitnet.wire.messages import PROTOCOL_VERSION

    text = (ROOT / "docs" / "protocol.md").read_text()
    assert re.findall(r"^Protocol version: (\d+)$", text, re.MULTILINE) == [str(PROTOCOL_VERSION)]


def test_help_does_not_wait_for_heavy_libraries() -> None:
    heavy = {"torch", "transformers", "hivemind", "fastapi", "uvicorn", "peers"}
    program = f"import sys, splitnet.cli.main; print(sorted({heavy} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert told.returncode == 0, told.stderr
    assert told.stdout.strip() == "[]"
