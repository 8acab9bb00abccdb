"""Code metrics: files, lines, forwarders, modules with one importer, namesakes, and the path of one token.

    .venv/bin/python -m benchmarks.size [ROOT] [--trace] [--list]

ROOT: another checkout to measure, e.g. from `git worktree add /tmp/before COMMIT`. The measured packages are those in
its pyproject.toml, and the simulator, which has a separate row. The benchmark does not fail for any value.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import io
import os
import statistics
import sys
import tempfile
import threading
import tokenize
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import redirect_stderr
from pathlib import Path
from types import FrameType
from typing import Any, TypeGuard

SIMULATORS = {"simulation", "simulator"}
SHORT_FILE, SHORT_FUNCTION, MANY_FILES = 60, 3, 20
COLUMNS = ["files", "median", "< 60", "lines", "code", "classes", "functions", "<= 3"]
COLUMNS += ["forwarders", "1 importer", "in its folder", "callables"]
NO_CODE = [tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER]
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module:
    """A module of the product; `importers`: modules of the product that import it, including imports in functions."""

    def __init__(self, root: Path, file: Path) -> None:
        self.file, self.path = file, file.relative_to(root)
        self.folder = self.path.parent
        self.name = ".".join(self.folder.parts if file.name == "__init__.py" else self.path.with_suffix("").parts)
        self.text = file.read_text()
        self.importers: set[Module] = set()
        self.nodes = list(ast.walk(ast.parse(self.text)))
        self.functions = [node for node in self.nodes if isinstance(node, Function)]
        self.classes = [node.name for node in self.nodes if isinstance(node, ast.ClassDef)]
        self.forwarders = [function.name for function in self.functions if is_forwarder(function)]
        self.code: set[int] = set()  # numbers of lines, without blank lines, comments, docstrings and imports
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type not in NO_CODE:
                self.code.update(range(token.start[0], token.end[0] + 1))
        for node in self.nodes:
            if is_text(node) or isinstance(node, ast.Import | ast.ImportFrom):
                self.code.difference_update(range(node.lineno, (node.end_lineno or 0) + 1))

    def imports(self) -> Iterable[tuple[str, str]]:
        """The imported names that may be modules. For `from a import b` these are a.b and a: b may be a module, or a
        name in the module a. The product has no relative imports.
        """
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from ((alias.name, "") for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((f"{node.module}.{alias.name}", f"{node.module}") for alias in node.names)

    def lines_of(self, function: Function) -> int:
        return len(self.code.intersection(range(function.body[0].lineno, (function.end_lineno or 0) + 1)))


def is_text(node: ast.AST) -> TypeGuard[ast.Expr]:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def is_forwarder(function: Function) -> bool:
    """Whether a method only forwards: its body, without a docstring, is one statement that returns or calls
    `self.part.name` with only its own parameters (`self` may be among them; some may be left out).
    """
    body = [statement for statement in function.body if not is_text(statement)]
    if len(body) != 1 or not isinstance(body[0], ast.Return | ast.Expr):
        return False
    value = body[0].value.value if isinstance(body[0].value, ast.Await) else body[0].value
    if isinstance(value, ast.Call):
        passed = [*value.args, *(keyword.value for keyword in value.keywords)]
        names = [ast.unparse(each.value if isinstance(each, ast.Starred) else each) for each in passed]
        if not {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)}.issuperset(names):
            return False
        value = value.func
    elif isinstance(body[0], ast.Expr):
        return False
    way = ast.unparse(value).split(".") if isinstance(value, ast.Attribute) else []
    return len(way) == 3 and way[0] in ("self", "cls") and all(map(str.isidentifier, way))


def takes_callables(function: Function) -> bool:
    kinds = [each.annotation for each in (*function.args.args, *function.args.kwonlyargs) if each.annotation]
    return function.name == "__init__" and any("Callable" in ast.unparse(kind) for kind in kinds)


def read(root: Path) -> list[Module]:
    """All modules of the packages, with their importers."""
    included = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    tops = {name.split(".")[0] for name in included} | SIMULATORS
    files = sorted(file for top in tops for file in (root / top).rglob("*.py"))
    modules = {module.name: module for module in (Module(root, file) for file in files)}
    for module in modules.values():
        for name, otherwise in module.imports():
            target = modules.get(name) or modules.get(otherwise)
            if target and target is not module:
                target.importers.add(module)
    return list(modules.values())


def row(modules: list[Module]) -> list[str]:
    lines = [len(module.text.splitlines()) for module in modules]
    sizes = [module.lines_of(function) for module in modules for function in module.functions]
    lonely = [module for module in modules if len(module.importers) == 1]
    figures = [len(lines), int(statistics.median(lines)), sum(count < SHORT_FILE for count in lines), sum(lines)]
    figures += [sum(len(module.code) for module in modules), sum(len(module.classes) for module in modules), len(sizes)]
    rest = [sum(len(module.forwarders) for module in modules), len(lonely)]
    rest += [sum(next(iter(module.importers)).folder == module.folder for module in lonely)]
    rest += [sum(takes_callables(function) for module in modules for function in module.functions)]
    short = f"{sum(size <= SHORT_FUNCTION for size in sizes) / max(1, len(sizes)):.0%}"
    return [*map("{:,}".format, figures), short, *map("{:,}".format, rest)]


def print_table(root: Path, with_list: bool) -> None:
    """Prints Markdown: a row per folder, then sums, then figures of the whole."""
    modules = read(root)
    rows: dict[str, list[Module]] = defaultdict(list)
    for module in modules:
        rows[str(module.folder)].append(module)
    crowded = {name: len(held) for name, held in rows.items() if len(held) > MANY_FILES}
    rows["all but the simulator"] = [module for module in modules if not SIMULATORS & set(module.path.parts)]
    rows["in all"] = modules
    print(f"| {'folder':28} | {' | '.join(COLUMNS)} |\n|---|{'--:|' * len(COLUMNS)}")
    for name, held in rows.items():
        print(f"| {name:28} |", " | ".join(map(str.rjust, row(held), map(len, COLUMNS))), "|")
    stems = [module.file.stem for module in modules if not module.file.stem.startswith("__")]
    classes = [name.lstrip("_") for module in modules for name in module.classes]
    for what, names in (("Module names in several packages", stems), ("Class names defined twice or more", classes)):
        print(f"{what}: {sum(count > 1 for count in Counter(names).values())}")
    print(f"Folders with more than {MANY_FILES} files: {len(crowded)} {crowded or ''}")
    others = [file for top in {module.path.parts[0] for module in modules} for file in (root / top).rglob("*")]
    for kind, ends in (("C", (".c", ".h")), ("The page", (".css", ".html", ".js"))):
        texts = [file.read_text() for file in others if file.suffix in ends]
        print(f"{kind}: {sum(len(text.splitlines()) for text in texts):,} lines in {len(texts)} files")
    for module in modules if with_list else ():
        if module.forwarders or len(module.importers) == 1:
            only = [f"imported by {each.path} alone" for each in module.importers if len(module.importers) == 1]
            print(f"{module.path}:", "; ".join(only + [f"{name} passes on" for name in module.forwarders]))


def print_trace(root: Path) -> None:
    """The product's code that one token of `generate()` runs on the client and three peers, all in this process.

    Of thirty tokens, the one that runs code of the fewest files counts, so that occasional code is left out.
    """
    os.environ |= {"SPLITNET_CONFIG": os.devnull, "SPLITNET_LAN": "false", "SPLITNET_DEVICE": "cpu"}
    os.environ |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    sys.path[0] = str(root)
    tops = tuple(str(root / top) + os.sep for top in {module.path.parts[0] for module in read(root)})
    calls: Counter[tuple[str, int, str]] = Counter()
    tokens: list[Counter[tuple[str, int, str]]] = []

    def on_event(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(tops):
            calls[code.co_filename, code.co_firstlineno, code.co_name] += 1

    threading.setprofile(on_event)
    files = [next((root / "tests").rglob(f"{name}.py")) for name in ("harness", "random_models")]
    tests = [importlib.import_module(".".join(file.relative_to(root).with_suffix("").parts)) for file in files]
    import torch

    def end_token(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens.append(calls.copy())
        calls.clear()
        return scores

    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        made = tests[1].random_checkpoint("llama", Path(folder) / "model")
        with tests[0].local_swarm(made, tests[0].SPANS) as swarm:
            sys.setprofile(on_event)
            ids = torch.arange(5, 13)[None]
            swarm.model().generate(
                ids, max_new_tokens=40, eos_token_id=None, speculate="off", logits_processor=[end_token]
            )
            sys.setprofile(None)
    token = min(tokens[10:], key=lambda each: (len({call[0] for call in each}), each.total()))
    functions = [name for _, _, name in token if name.isidentifier() or name == "<lambda>"]
    passed = f"{len({call[0] for call in token})} files, {len(functions)} functions, {token.total()} calls"
    print(f"A decode token over three peers: {passed}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Counts the house.")
    parser.add_argument("root", type=Path, nargs="?", default=Path(__file__).parents[1], help="of another checkout")
    parser.add_argument("--trace", action="store_true", help="also show the code that one decode token runs")
    parser.add_argument("--list", action="store_true", help="also list modules with forwarders or one importer")
    arguments = parser.parse_args()
    print_table(arguments.root.resolve(), arguments.list)
    if arguments.trace:
        print_trace(arguments.root.resolve())
