"""No file that a user is handed may run code: nothing in the package unpickles without care."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ibq_scale

RUNS_CODE = {
    "torch.load",
    "torch.jit.load",
    "torch.hub.load",
    "torch.hub.load_state_dict_from_url",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.loads",
}


def _loads_without_care(source: str) -> list[str]:
    """Every mention of what may run code from a file, but for calls of torch.load with weights_only=True."""
    nodes = list(ast.walk(ast.parse(source)))
    names: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            names |= {(alias.asname or alias.name): f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}

    def full_name(node: ast.AST) -> str:
        head, dot, tail = ast.unparse(node).partition(".")
        return names.get(head, head) + dot + tail

    careful, found = set(), []
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        given = {k.arg: ast.unparse(k.value) for k in call.keywords}
        if full_name(call.func) == "torch.load" and given.get("weights_only") == "True":
            careful.add(id(call.func))
        if given.get("allow_pickle", "False") != "False":
            found.append(ast.unparse(call))
    for node in nodes:
        if isinstance(node, ast.Attribute | ast.Name) and full_name(node) in RUNS_CODE and id(node) not in careful:
            found.append(ast.unparse(node))
    return found


@pytest.mark.slow
def test_nothing_in_the_package_unpickles_without_care() -> None:
    files = sorted(Path(ibq_scale.__file__).parent.rglob("*.py"))
    assert len(files) > 100
    assert {str(f): found for f in files if (found := _loads_without_care(f.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f)",
        "import torch as t\nt.load(f, weights_only=False)",
        "from torch import load as get\nget(f, weights_only=flag)",
        "import torch\nload = torch.load\nload(f, weights_only=True)",
        "import torch\nlist(map(torch.load, files))",
        "import pickle\npickle.load(f)",
        "from pickle import loads\nloads(b)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import torch.hub\ntorch.hub.load_state_dict_from_url(u)",
    ],
)
def test_that_check_sees(source: str) -> None:
    assert _loads_without_care(source)
    assert not _loads_without_care("import torch\ntorch.load(f, weights_only=True)\njson.load(f)")
