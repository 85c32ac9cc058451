import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import functions

REPOSITORY = Path(functions.__file__).resolve().parent
TOP = {path.stem: path for path in REPOSITORY.glob("*.py")}
SUPPORT = {
    f"support.{path.stem}": path
    for path in (REPOSITORY / "support").glob("*.py")
    if path.stem != "__init__"
}
HOUSE = TOP | SUPPORT
TREES = {name: ast.parse(path.read_text()) for name, path in HOUSE.items()}


def imports(tree):
    """What the modules of the house are called in a module, and what it takes out of them.

    Imports within functions count, too.
    """
    modules, names = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {a.asname or a.name: a.name for a in node.names if a.name in HOUSE}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if f"{node.module}.{alias.name}" in HOUSE:
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                elif node.module in HOUSE:
                    names.append((node.module, alias.name))
    return modules, names


def imported(tree):
    modules, names = imports(tree)
    return {*modules.values(), *(module for module, _ in names)}


def defined(tree):
    """The names that a module defines itself, at its top level."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = [part for target in targets for part in ast.walk(target)]
            names |= {part.id for part in found if isinstance(part, ast.Name)}
    return names


def test_the_modules_are_found():
    assert {"simclr", "functions", "rnn"} <= TOP.keys()
    assert {"support.runs", "support.settings"} <= SUPPORT.keys()
    assert {"functions", "support.runs"} <= imported(TREES["simclr"])
    assert "load_images" in defined(TREES["functions"])


def test_support_does_not_import_the_top_level():
    upward = {name: imported(TREES[name]) & TOP.keys() for name in SUPPORT}
    assert not {name: found for name, found in upward.items() if found}


def test_nothing_imports_in_a_circle():
    graph = {name: imported(tree) - {name} for name, tree in TREES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


def attributes(node, modules):
    """The `(module, name)` of each `module.name` in the code."""
    if isinstance(node, ast.FunctionDef | ast.Lambda):
        inside = list(ast.walk(node))
        own = {part.arg for part in inside if isinstance(part, ast.arg)}
        names = [part for part in inside if isinstance(part, ast.Name)]
        own |= {part.id for part in names if isinstance(part.ctx, ast.Store)}
        modules = {name: modules[name] for name in modules.keys() - own}  # others are variables
    if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in modules:
        yield modules[node.value.id], node.attr
    for child in ast.iter_child_nodes(node):
        yield from attributes(child, modules)


def test_a_name_has_one_address():
    for name, tree in TREES.items():
        modules, taken = imports(tree)
        found = {*taken, *attributes(tree, modules)}
        passed_on = [f"{m}.{n}" for m, n in found if n not in defined(TREES[m])]
        assert not passed_on, name


LOOK = """
import importlib, random, signal, sys
import numpy, torch

def state():
    return (
        random.getstate(),
        [part.tobytes() if hasattr(part, "tobytes") else part for part in numpy.random.get_state()],
        torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(),
        [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
    )

before = state()
for name in sys.argv[1:]:
    loaded = set(sys.modules)
    importlib.import_module(name)
    if state() != before:
        sys.exit(f"{name} changes something when it is imported")
    heavy = {"matplotlib", "sklearn", "torchvision", "lightning_fabric", "pytorch_lightning"}
    heavy |= {"optuna", "sqlalchemy", "PIL", "umap", "plotly"}  # some take longer than PyTorch
    slow = heavy & set(sys.modules) - loaded
    if slow:
        sys.exit(f"{name} imports {slow} before they are needed")
"""


def test_importing_does_nothing(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOOK, *HOUSE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert list(tmp_path.iterdir()) == []
