"""Imports only go down the layers; the library never prints, parses argv or forks by itself."""

from __future__ import annotations

import ast
import collections.abc
import os

import pytest

import shmsock

from .helpers import REPOSITORY

# Each module may import from those of lower rank only.
RANK = {
    "_version": 0,
    "errors": 0,
    "layout": 0,
    "segment": 1,
    "semaphores": 2,
    "processes": 2,
    "names": 3,
    "view": 3,
    "audit": 3,
    "wishes": 2,
    "_engine_common": 3,
    "_stripes_py": 4,
    "_table_py": 5,
    "_engine_py": 6,
    "_engine": 5,  # C
    "_engine_c": 6,
    "engine": 7,
    "peers": 4,
    "recovery": 8,
    "mending": 9,
    "inspection": 10,
    "channel": 1,
    "service": 1,
    "store": 8,
    "cache": 9,
    "descriptors": 10,
    "collecting": 11,
    "writing": 12,
    "socket": 13,
    "dispatcher": 14,
    "handover": 14,
    "globs": 0,
    "group_store": 1,
    "groups": 14,
    "participant": 15,
    "runtime": 16,
    "__init__": 17,
    "abort_window": 17,
    "abort": 18,
    "pool_child": 19,
    "pool_jobs": 20,
    "pool_manager": 21,
    "pool_results": 21,
    "pool": 22,
}

PUBLIC_SUBMODULES = {"groups", "pool"}


def modules(package: str) -> dict[str, ast.Module]:
    directory = os.path.join(REPOSITORY, package)
    found = {}
    for entry in sorted(os.listdir(directory)):
        if entry.endswith(".py"):
            with open(os.path.join(directory, entry), encoding="utf-8") as file:
                found[entry.removesuffix(".py")] = ast.parse(file.read(), entry)
    return found


def for_types_only(tree: ast.Module) -> set[ast.AST]:
    """What stands under ``if typing.TYPE_CHECKING``."""
    return {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }


Import = ast.Import | ast.ImportFrom


def imports_of(tree: ast.Module, package: str) -> collections.abc.Iterator[tuple[str, Import]]:
    """What a module imports from shmsock, wherever in it: modules, or names of the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            path = ["shmsock"] if node.level == 1 and package == "shmsock" else []
            path += (node.module or "").split(".") if node.module else []
            if path[:1] != ["shmsock"] or (node.level == 1 and package != "shmsock"):
                continue
            if len(path) > 1:
                yield path[1], node
            else:
                yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("shmsock."):
                    yield alias.name.split(".")[1], node


LIBRARY = modules("shmsock")


def test_every_module_of_the_library_has_a_rank() -> None:
    assert set(LIBRARY) | {"_engine"} == set(RANK)


@pytest.mark.parametrize("module", LIBRARY)
def test_imports_only_go_down(module: str) -> None:
    tree = LIBRARY[module]
    types_only = for_types_only(tree)
    for imported, node in imports_of(tree, "shmsock"):
        assert imported in RANK, f"{module} line {node.lineno} imports {imported}"
        if RANK[imported] >= RANK[module]:
            where = f"shmsock/{module}.py line {node.lineno}"
            assert node in types_only, f"{where} imports {imported}"


def test_only_recovery_and_the_engines_name_the_transitions_of_a_slot() -> None:
    """``settle`` and ``recycle`` are the two stores of the formula: nobody else may have it."""
    for module, tree in LIBRARY.items():
        names = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        if names & {"settle", "recycle"}:
            assert module in ("_engine_py", "engine", "recovery")


def test_nothing_imports_the_server_or_an_extra_at_import_time() -> None:
    """numpy and posix_ipc are required; what else there is must be imported where it is used."""
    for module, tree in LIBRARY.items():
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in top:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                root = name.split(".")[0]
                assert root not in ("workers", "hiredis", "httptools", "lmdb", "redis"), module


def test_workers_use_only_what_is_public() -> None:
    public = {*shmsock.__all__, "__version__", *PUBLIC_SUBMODULES}
    for module, tree in modules("workers").items():
        for imported, node in imports_of(tree, "workers"):
            whole = isinstance(node, ast.ImportFrom) and node.module == "shmsock"
            allowed = public if whole else PUBLIC_SUBMODULES
            assert imported in allowed, f"workers/{module}.py line {node.lineno}: {imported}"
        for use in ast.walk(tree):
            if isinstance(use, ast.Attribute) and ast.unparse(use.value) == "shmsock":
                assert use.attr in public, f"workers/{module}.py line {use.lineno}: {use.attr}"


FORBIDDEN_CALLS = {"print", "input", "os.fork", "os.system", "sys.exit", "os._exit"}


@pytest.mark.parametrize("module", LIBRARY)
def test_library_never_prints_forks_exits_or_parses_argv(module: str) -> None:
    for node in ast.walk(LIBRARY[module]):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, f"{module} line {node.lineno}"
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("sys.argv", "sys.stdout"), f"{module}: {node.lineno}"


@pytest.mark.parametrize("module", LIBRARY)
def test_loggers_have_only_the_two_names(module: str) -> None:
    for node in ast.walk(LIBRARY[module]):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "logging.getLogger":
            assert ast.unparse(node.args[0]) in ("'shmsock'", "'shmsock.access'")


@pytest.mark.parametrize("module", LIBRARY)
def test_shared_words_are_never_stored_byte_by_byte(module: str) -> None:
    for node in ast.walk(LIBRARY[module]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr != "pack_into", f"{module} line {node.lineno}"


def test_shared_names_are_made_and_removed_in_few_places_and_shared_memory_is_posix_ipcs() -> None:
    for module, tree in LIBRARY.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                text = ast.unparse(node)
                assert "shared_memory" not in text, module
                if "posix_ipc" in text:
                    assert module in ("segment", "semaphores", "names", "_stripes_py"), module
