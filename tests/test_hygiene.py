"""What a region leaves in the process, the logs and the import system: nothing that it need not."""

from __future__ import annotations

import ast
import copy
import fcntl
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import sparsemem
from sparsemem import Anonymous, Cause, File, Memfd, Region, Simulated, SparseMemError, errors
from sparsemem._sys import calls, probe
from sparsemem.backends import Backend
from tests.support import accounting

PACKAGE = Path(sparsemem.__file__).parent


@pytest.mark.parametrize("backend", [Anonymous(), Anonymous(shared=True), Memfd(), Memfd(shared=False)], ids=str)
def test_memory_is_left_out_of_core_dumps_unless_asked(backend: Backend) -> None:
    with Region("1G", backend=backend) as region:
        assert all("dd" in flags for flags in accounting.smaps(region.address, region.size).flags)
    with Region("1G", backend=backend, dump=True) as region:
        assert not any("dd" in flags for flags in accounting.smaps(region.address, region.size).flags)


@pytest.mark.promise("reserve-costs-nothing")
def test_one_mapping_however_much_is_plugged() -> None:
    with Region("1T", block_size="64K") as region:
        region.plug_runs([(i * 2, 1) for i in range(200)])
        assert len(accounting.vmas(region.address, region.size)) == 1


def test_anonymous_memory_has_a_name_where_the_kernel_can() -> None:
    if not probe.names_mappings(calls.kernel):
        pytest.skip("needs a kernel with CONFIG_ANON_VMA_NAME")
    with Region("1G", name="my guest") as region:
        assert accounting.vmas(region.address, region.size)[0].name == "[anon:my guest]"


@pytest.mark.promise("private-to-its-user")
def test_a_memfd_has_the_regions_name_and_is_sealed_and_closed_on_exec() -> None:
    with Region("1G", backend=Memfd(), name="my guest") as region:
        assert "/memfd:my guest" in accounting.vmas(region.address, region.size)[0].name
        assert fcntl.fcntl(region.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        with pytest.raises(PermissionError):
            os.ftruncate(region.fileno(), 4096)
    with Region("1G", backend=Memfd(seal=False)) as region:
        os.ftruncate(region.fileno(), 1 << 30)


@pytest.mark.promise("private-to-its-user")
def test_a_file_is_private_to_its_user_and_stays_unless_told(tmp_path: Path) -> None:
    with Region("1G", backend=File(tmp_path / "stays")) as region:
        assert fcntl.fcntl(region.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert (tmp_path / "stays").stat().st_mode & 0o777 == 0o600
    Region("1G", backend=File(tmp_path / "goes", delete=True)).close()
    assert not (tmp_path / "goes").exists()


@pytest.mark.promise("no-leaks")
def test_many_regions_leave_no_descriptor_and_no_mapping() -> None:
    Region("1G").close()
    before = len(accounting.open_descriptors()), accounting.vma_count()
    for backend in (Anonymous(), Memfd(), Memfd(shared=False), Simulated()):
        for _ in range(50):
            with Region("1G", block_size="64K", backend=backend) as region:
                region.plug(0, 2)
                region.discard(0, 4096)
    assert len(accounting.open_descriptors()) == before[0]
    # The interpreter's own arenas come and go; a leak would be one for each region.
    assert accounting.vma_count() - before[1] < 50


def test_the_logger_is_one_and_silent(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Region("1G") as region:
        region.plug(0)
    assert not [record for record in caplog.records if record.name.startswith("sparsemem")]
    names = {name for name in logging.root.manager.loggerDict if name.startswith("sparsemem")}
    assert names == {"sparsemem"}


def test_repr_shows_the_options_as_they_were_resolved() -> None:
    with Region("1G", backend=Memfd()) as region:
        text = repr(region)
        for part in ("'1G'", "block_size='2M'", "Memfd(", "headroom='check'", "fork='refuse'", "0 plugged", "thp=True"):
            assert part in text
        assert f"{region.address:#x}" in text


def _errors() -> list[BaseException]:
    made: list[BaseException] = []
    for name in dir(errors):
        cls = getattr(errors, name)
        if isinstance(cls, type) and issubclass(cls, SparseMemError):
            made.append(cls(5, "text") if issubclass(cls, OSError) and cls is not errors.DeadlineError else cls("text"))
    made.append(
        errors.BackendExhaustedError(12, "text", offset=3, populated=4, rolled_back=False, cause=Cause.TMPFS_FULL)
    )
    made.append(errors.DiscardError(5, "text", discarded=((0, 1),), remaining=((2, 1),), tainted=((1, 1),)))
    made.append(errors.BlockStateError("text", block=7))
    return made


@pytest.mark.parametrize("error", _errors(), ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("through", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_errors_survive_copying_and_pickling(error: BaseException, through: object) -> None:
    again = through(error)  # type: ignore[operator]
    assert type(again) is type(error)
    assert again.args == error.args
    assert str(again) == str(error)
    assert vars(again) == vars(error)
    assert getattr(again, "errno", None) == getattr(error, "errno", None)


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ReserveError", OSError),
        ("PopulateError", OSError),
        ("BackendExhaustedError", MemoryError),
        ("DiscardError", OSError),
        ("AdviceError", OSError),
        ("BlockStateError", ValueError),
        ("BlockRangeError", ValueError),
        ("RegionClosedError", ValueError),
        ("ForkedRegionError", errors.RegionClosedError),
        ("ViewsAliveError", BufferError),
        ("ListenerVetoError", RuntimeError),
        ("SnapshotError", ValueError),
        ("SnapshotIOError", OSError),
        ("SnapshotIOError", errors.SnapshotError),
        ("DeadlineError", TimeoutError),
        ("UnsupportedError", NotImplementedError),
    ],
)
def test_errors_are_the_builtin_that_fits_too(name: str, builtin: type[BaseException]) -> None:
    assert issubclass(getattr(sparsemem, name), builtin)
    assert issubclass(getattr(sparsemem, name), SparseMemError)


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)


def test_importing_the_package_loads_no_devices() -> None:
    done = _python("import sys, sparsemem; print(*sys.modules)")
    assert not [name for name in done.stdout.split() if name.startswith("sparsemem.virtio")]


@pytest.mark.parametrize("module", ["sparsemem", "sparsemem.cli.main", "sparsemem.virtio"])
def test_importing_is_light(module: str) -> None:
    done = _python(f"import sys, {module}; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    # What the two dependencies load by themselves is theirs (attrs loads subprocess on Python 3.10).
    theirs = set(_python("import sys, attrs, _cffi_backend; print(*sys.modules)").stdout.split())
    ours = set(done.stdout.split()) - theirs
    assert not {"numpy", "rich", "matplotlib", "subprocess", "bitarray", "asyncio", "zstandard"} & ours


def test_importing_on_another_system_says_so() -> None:
    done = _python("import sys; sys.platform = 'darwin'; import sparsemem")
    assert done.returncode == 1
    assert "ImportError: sparsemem manages memory with Linux system calls" in done.stderr
    assert "darwin" in done.stderr


# ---- architecture -----------------------------------------------------------------------

# From the top down: a module may import from the lines below its own, and from its own line.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"bench"},
    {"demonstration"},
    {"virtio"},
    {"survey"},
    {"region"},
    {"snapshot"},
    {"advice"},
    {"operations", "fork"},
    {"quick", "warm"},
    {"audit", "views", "listeners", "headroom", "engine", "statistics", "deferral", "stray"},
    {"blocks", "geometry", "workers"},
    {"budget", "backends"},
    {"recipes", "bitmap", "runs"},
    {"errors", "units"},
    {"_sys"},
]
VIRTIO_LAYERS = [
    {"vhost_user"},
    {"queue"},
    {"mem", "balloon"},
    {"guest_memory"},
    {"wire"},
    {"device", "watched"},
]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "_build.py")


def _layer(module: str, layers: list[set[str]] = LAYERS) -> int | None:
    return next((i for i, names in enumerate(layers) if module in names), None)


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "sparsemem":
                found |= {f"sparsemem.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward_only(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    assert _layer(own) is not None, f"{own} has no layer: add it to LAYERS"
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "sparsemem" and len(parts) > 1 and (layer := _layer(parts[1])) is not None:
            if path.name == "fork.py" and parts[1] == "operations":
                continue  # for the type checker only
            assert layer >= _layer(own), f"{path.name} imports {name} from above"


@pytest.mark.parametrize("path", sorted((PACKAGE / "virtio").glob("[a-z]*.py")), ids=lambda path: path.name)
def test_the_layers_of_virtio_do_not_reach_up(path: Path) -> None:
    own = _layer(path.stem, VIRTIO_LAYERS)
    assert own is not None, f"{path.stem} has no layer: add it to VIRTIO_LAYERS"
    for name in _imports(path):
        if name.startswith("sparsemem.virtio."):
            layer = _layer(name.split(".")[2], VIRTIO_LAYERS)
            assert layer is not None, f"{name} has no layer"
            assert layer > own, f"{path.name} imports {name} from above or beside"


SYSTEM = {"ctypes", "fcntl", "mmap", "resource", "signal", "socket", "subprocess", "select"}
SYSTEM_CALLS = {"open", "pread", "read", "write", "ftruncate", "statvfs", "lseek", "unlink", "mmap", "posix_fallocate"}
# Preparing files to try things on, and the demonstration's comparison, are a user's work and not the library's.
# Removing a socket's file is the work of whoever made the socket.
MAY_CALL = {
    "survey.py": {"open", "write"},
    "demonstration.py": {"pread"},
    "main.py": {"open"},
    "listener.py": {"unlink"},
}
# The transport owns its sockets, and a command that runs until it is told to end hears of that by a signal.
MAY_IMPORT = {"cli/vhost_user.py": {"signal"}, "virtio/vhost_user": {"socket", "select"}}


def _folder(path: Path) -> str:
    return str(path.parent.relative_to(PACKAGE))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_sys_makes_system_calls(path: Path) -> None:
    # The benchmark compares with bare system calls: there they are the point.
    if path.relative_to(PACKAGE).parts[0] in ("_sys", "bench"):
        return
    allowed = [names for place, names in MAY_IMPORT.items() if place in (str(path.relative_to(PACKAGE)), _folder(path))]
    assert not _imports(path) & SYSTEM - set().union(*allowed)
    text = path.read_text()
    assert '"/proc' not in text or path.name in ("survey.py",), "reads /proc"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "os":
            assert node.attr not in SYSTEM_CALLS - MAY_CALL.get(path.name, set()), f"os.{node.attr}"
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "lib":
            assert not node.attr.startswith(("sm_madvise", "sm_fallocate", "sm_reserve", "sm_pagemap", "sm_mincore"))
