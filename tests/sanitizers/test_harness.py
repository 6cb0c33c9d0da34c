"""The shim, without Python, in many threads under the sanitizers of the compiler; see `harness.c`."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.evidence import Cases

HERE = Path(__file__).parent
SHIM = HERE.parents[1] / "sparsemem" / "_sys" / "shim"
PARTS = ("map", "close", "quick", "crew", "warm", "fork", "bits", "calls")
SECONDS = float(os.environ.get("SPARSEMEM_SANITIZER_SECONDS", "1.5"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The program built with a sanitizer, once for each."""
    folder = tmp_path_factory.mktemp("sanitizers")

    def build(sanitizer: str) -> Path:
        program = folder / sanitizer
        if not program.exists():
            if shutil.which("gcc") is None:
                pytest.skip("needs gcc")
            sources = [HERE / "harness.c", *sorted(SHIM.glob("*.c"))]
            flags = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=undefined", "-std=gnu11", "-g", "-O1"]
            # ThreadSanitizer knows no fences, and gcc warns of the one in shared.c, which no part works with.
            command = ["gcc", *flags, "-Wall", "-Wextra", "-Werror", "-Wno-tsan", "-I", SHIM, *sources, "-lpthread"]
            done = subprocess.run([*command, "-o", program], capture_output=True, text=True, check=False)
            if "cannot find" in done.stderr:
                pytest.skip(f"needs the compiler's sanitizer libraries (-fsanitize={sanitizer})")
            assert done.returncode == 0, done.stderr
        return program

    return build


@pytest.mark.promise("memory-safe", found="a map that died looked at the list of all maps without the list's mutex")
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_the_shim_under(sanitizer: str, part: str, harness: Callable[[str], Path], cases: Cases) -> None:
    command: list[object] = [harness(sanitizer), part, SECONDS, int.from_bytes(os.urandom(3), "little")]
    if sanitizer == "thread":
        # ThreadSanitizer wants its shadow at fixed addresses, which the kernel may have given to a library.
        command[:0] = ["setarch", "-R"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert not done.stderr, done.stderr
    cases.add(int(done.stdout.split()[0]))
