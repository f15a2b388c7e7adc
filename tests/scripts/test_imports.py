"""What scripts import from each other and from the package exists, also inside functions."""

import ast
import importlib

import pytest
from teachers import RECIPES

SCRIPTS = sorted((RECIPES.parent / "scripts").rglob("*.py"))
OWN = {file.stem for file in SCRIPTS} | {"hf_kernel_ffn"}


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_imported_names_exist(file):
    found = 0
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in OWN:
            module = importlib.import_module(node.module)
            for name in node.names:
                found += 1
                has_it = hasattr(module, name.name)
                assert has_it or importlib.import_module(f"{node.module}.{name.name}"), name.name
    uses_package = "import hf_kernel_ffn" in (text := file.read_text()) or "from hf_" in text
    assert found > 0 or not uses_package
