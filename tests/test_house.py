"""The house: what may import what, what travels, and that tests stand where the code does."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_kernel_ffn

PACKAGE = Path(hf_kernel_ffn.__file__).parent
TESTS = Path(__file__).parent
TRAVELS = PACKAGE / "checkpoint_code"
FILES_AT_THE_TOP = 8


def module_name(file):
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def runs_only_for_type_checkers(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def import_statements(node):
    """Every import below ``node``, those inside functions too, those of type checkers aside."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif not runs_only_for_type_checkers(child):
            yield from import_statements(child)


def imported_modules(name):
    """Modules of this package that the module ``name`` imports."""
    file = MODULES[name]
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in import_statements(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        above = package.split(".")[: len(package.split(".")) - (node.level - 1)]
        target = ".".join([*above, *(node.module.split(".") if node.module else [])])
        for alias in node.names:
            full = f"{target}.{alias.name}"
            found.add(full if full in MODULES else target)
    return found - {name}


def find_circle(arrows):
    """The nodes of a circle in ``arrows`` (targets by source), or None."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return path[path.index(node) :]
        if node in done:
            return None
        path.append(node)
        for target in sorted(arrows.get(node, ())):
            circle = visit(target)
            if circle:
                return circle
        done.add(path.pop())
        return None

    for node in sorted(arrows):
        circle = visit(node)
        if circle:
            return circle
    return None


def test_a_circle_would_be_found():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert find_circle({"a": {"b"}, "b": {"c"}}) is None


def test_no_module_imports_itself_by_others():
    assert find_circle({name: imported_modules(name) for name in MODULES}) is None


def test_no_folder_imports_itself_by_others():
    def folder(name):
        parts = name.split(".")
        return parts[1] if len(parts) > 2 or (PACKAGE / parts[-1]).is_dir() else name

    arrows = {}
    for name in MODULES:
        targets = {folder(target) for target in imported_modules(name) if target != PACKAGE.name}
        arrows.setdefault(folder(name), set()).update(targets - {folder(name)})
    arrows.pop(PACKAGE.name)
    assert find_circle(arrows) is None, arrows


def test_few_files_lie_at_the_top():
    names = [file.name for file in PACKAGE.iterdir() if file.is_file()]
    assert len(names) <= FILES_AT_THE_TOP, names


def test_what_travels_is_flat_and_imports_torch_and_transformers_only():
    assert [path.name for path in TRAVELS.iterdir() if path.is_dir()] in ([], ["__pycache__"])
    for file in TRAVELS.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module).partition(".")[0]]
            elif isinstance(node, ast.ImportFrom):
                beside = (
                    node.level == 1 and node.module and (TRAVELS / f"{node.module}.py").is_file()
                )
                assert beside, f"{file.name}:{node.lineno}"
                continue
            else:
                continue
            for name in names:
                allowed = name in ("torch", "transformers") or name in sys.stdlib_module_names
                assert allowed, f"{name} in {file.name}"


def test_all_that_lies_in_the_travelling_folder_is_reached_from_a_modelling_file():
    reached, waiting = set(), ["config_mixin", "modeling"]
    while waiting:
        name = waiting.pop()
        reached.add(f"{name}.py")
        source = (TRAVELS / f"{name}.py").read_text(encoding="utf-8")
        imported = re.findall(r"^from \.(\w+) import", source, flags=re.MULTILINE)
        waiting += [other for other in imported if f"{other}.py" not in reached]
    assert reached == {file.name for file in TRAVELS.glob("*.py")} - {"__init__.py"}


def test_tests_stand_where_the_code_does():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    tested = {path.name for path in TESTS.iterdir() if any(path.glob("test_*.py"))}
    assert folders <= tested


@pytest.mark.parametrize("name", sorted(hf_kernel_ffn.__all__))
def test_every_public_name_is_there_and_says_what_it_is(name):
    thing = getattr(hf_kernel_ffn, name)
    assert name == "__version__" or thing.__doc__


def test_type_checkers_see_the_public_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if runs_only_for_type_checkers(node))
    seen = {alias.name for node in block.body for alias in node.names}
    assert seen | {"__version__"} == {*hf_kernel_ffn.__all__}
    assert (PACKAGE / "py.typed").is_file()


def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = "import sys, hf_kernel_ffn; sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
