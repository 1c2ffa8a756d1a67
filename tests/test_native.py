"""The C engine under the compiler's sanitizers, and without a warning."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import typing

import pytest

from .helpers import REPOSITORY, WATCHDOG_S

COMPILER = shutil.which("gcc") or shutil.which("clang")
WARNINGS = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-g")

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C compiler"),
    pytest.mark.once,
]


def run(*command: str, **options: typing.Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def build_extension(target: str, *flags: str) -> subprocess.CompletedProcess[str]:
    assert COMPILER is not None
    include = sysconfig.get_paths()["include"]
    if not os.path.exists(f"{include}/Python.h"):
        pytest.skip("no Python headers")
    return run(
        COMPILER, *WARNINGS, "-fPIC", "-shared", "-DPy_LIMITED_API=0x030B0000", f"-I{include}",
        *flags, f"{REPOSITORY}/shmsock/_engine.c", "-o", target, "-lpthread",
    )  # fmt: skip


@pytest.mark.parametrize("optimised", ["-O0", "-O2", "-O3"])
def test_c_engine_compiles_without_a_warning(optimised: str, tmp_path: typing.Any) -> None:
    done = build_extension(str(tmp_path / "_engine.abi3.so"), optimised)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_stripes_and_transitions_do_not_race(sanitizer: str, tmp_path: typing.Any) -> None:
    assert COMPILER is not None
    program = str(tmp_path / "race")
    source = f"{REPOSITORY}/tests/native/stripes_race.c"
    done = run(
        COMPILER, *WARNINGS, "-O1", "-D_GNU_SOURCE", f"-fsanitize={sanitizer}", source,
        "-o", program, "-lpthread",
    )  # fmt: skip
    if done.returncode and "cannot find" in done.stderr:
        pytest.skip(f"this compiler has no -fsanitize={sanitizer}")
    assert (done.returncode, done.stderr) == (0, "")
    # Without address space randomisation: ThreadSanitizer of older compilers wants it off.
    prefix = ["setarch", "-R"] if shutil.which("setarch") else []
    done = run(*prefix, program, timeout=WATCHDOG_S)
    assert done.stdout.startswith("ok "), done.stdout + done.stderr
    assert int(done.stdout.split()[1]) > 1000


@pytest.mark.slow
def test_table_tests_pass_under_the_address_and_undefined_behaviour_sanitizers(
    tmp_path: typing.Any,
) -> None:
    """A copy of the package with a sanitized engine, in an interpreter that preloads libasan."""
    assert COMPILER is not None
    library = run(COMPILER, "-print-file-name=libasan.so").stdout.strip()
    if not os.path.isabs(library):
        pytest.skip("this compiler has no libasan")
    for package in ("shmsock", "workers", "tests"):
        shutil.copytree(
            f"{REPOSITORY}/{package}",
            tmp_path / package,
            ignore=shutil.ignore_patterns("*.so", "__pycache__"),
        )
    shutil.copy(f"{REPOSITORY}/pyproject.toml", tmp_path)
    done = build_extension(
        str(tmp_path / "shmsock" / "_engine.abi3.so"), "-O1", "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    environment = {
        **os.environ,
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0",  # CPython's own, at exit
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(tmp_path),
        "SHMSOCK_ENGINE": "c",
    }
    # Without faulthandler's thread: libasan does not take its allocator's locks around fork, and a
    # child that finds one held, by a thread it has not got, waits for ever.
    done = run(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
        "-o", "faulthandler_timeout=0",
        "tests/test_table.py", "tests/test_engine_c.py", "tests/test_writing_turns.py", "-k",
        "not without_a_compiler and not missing and not starves", "-x",
        cwd=tmp_path, env=environment, timeout=10 * WATCHDOG_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "AddressSanitizer" not in done.stdout + done.stderr
