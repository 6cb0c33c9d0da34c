"""Functions run in a forked child: for what would kill, limit or change the identity of the test process."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import pickle
import pwd
import resource
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

DEFAULT_TIMEOUT = 60.0


@dataclass(frozen=True)
class Outcome:
    """How a child ended. Exactly one of: a value, an error, a signal, a plain exit status."""

    value: Any = None
    error: BaseException | None = None
    signal: signal.Signals | None = None
    exit_status: int | None = None
    """Set only if the child left without handing back a result (os._exit in the function)."""

    def result(self) -> Any:
        """The function's value.

        Raises:
            BaseException: What the function raised.
            AssertionError: The child was killed by a signal or left by itself.
        """
        if self.error is not None:
            raise self.error
        if self.signal is not None:
            raise AssertionError(f"the child was killed by {self.signal.name}")
        if self.exit_status is not None:
            raise AssertionError(f"the child left with exit status {self.exit_status} and no result")
        return self.value


def run_child(
    function: Callable[..., Any],
    *args: Any,
    timeout: float = DEFAULT_TIMEOUT,
    limits: dict[int, int] | None = None,
    **kwargs: Any,
) -> Outcome:
    """Fork, call `function(*args, **kwargs)` in the child, and say how it ended.

    The child sees the parent's memory as it was (nothing is pickled on the way in, so closures work), writes no core
    dump, prints no traceback when it crashes, and runs no exit handlers.

    Args:
        function: What to call.
        *args: Its arguments.
        timeout: Seconds; then the child is killed and TimeoutError raised.
        limits: Resource limits (soft and hard) by `resource.RLIMIT_*`, set in the child before the call.
        **kwargs: Its named arguments.

    Returns:
        The outcome. Values and errors that cannot be pickled come back as a RuntimeError with their repr.

    Raises:
        TimeoutError: The child took too long.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    # A pipe, not a file: RLIMIT_FSIZE must not touch the answer.
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # 3.12 warns of forks beside threads; the child here calls one function and leaves.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os.close(reader)
        _be_child(writer, function, args, kwargs, limits or {})
    os.close(writer)
    try:
        answer, status = _collect(pid, reader, timeout)
    finally:
        os.close(reader)
    if os.WIFSIGNALED(status):
        return Outcome(signal=signal.Signals(os.WTERMSIG(status)))
    if not answer:
        return Outcome(exit_status=os.WEXITSTATUS(status))
    outcome = pickle.loads(answer)
    assert isinstance(outcome, Outcome)
    return outcome


def unprivileged(
    function: Callable[..., Any], *args: Any, user: str = "nobody", timeout: float = DEFAULT_TIMEOUT, **kwargs: Any
) -> Outcome:
    """`run_child()` as a user without privileges; without root the child simply stays who it is.

    Modules that the function needs must be imported beforehand: an interpreter that lives in somebody's home folder
    may be unreadable for `nobody`.
    """

    def drop_and_call() -> Any:
        if os.geteuid() == 0:
            entry = pwd.getpwnam(user)
            os.setgroups([])
            os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
            os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
            # A changed identity makes the process undumpable, and /proc/self then belongs to root.
            _set_dumpable()
        return function(*args, **kwargs)

    return run_child(drop_and_call, timeout=timeout)


def _set_dumpable() -> None:
    import ctypes

    pr_set_dumpable = 4
    ctypes.CDLL(None).prctl(pr_set_dumpable, 1, 0, 0, 0)


def _be_child(
    writer: int, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], limits: dict[int, int]
) -> NoReturn:
    # Whatever happens, the child must not return into pytest.
    try:
        faulthandler.disable()
        # (its timer needs no cancelling: that thread is not in the child, and cancelling would wait for it for ever)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            for limit, number in limits.items():
                resource.setrlimit(limit, (number, number))
            outcome = Outcome(value=function(*args, **kwargs))
        except BaseException as error:  # KeyboardInterrupt and SystemExit are results like any other
            outcome = Outcome(error=error)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        gc.disable()
        with os.fdopen(writer, "wb", closefd=False) as pipe:
            pipe.write(_pickled(outcome))
    finally:
        os._exit(0)


def _pickled(outcome: Outcome) -> bytes:
    try:
        answer = pickle.dumps(outcome)
        pickle.loads(answer)  # an exception may pickle well and refuse to be made again
    except Exception:
        told = outcome.value if outcome.error is None else outcome.error
        return pickle.dumps(Outcome(error=RuntimeError(f"the child's result cannot be pickled: {told!r}")))
    return answer


def _collect(pid: int, reader: int, timeout: float) -> tuple[bytes, int]:
    """Read the pipe until the child has ended (its own children may hold the pipe open for longer)."""
    deadline = time.monotonic() + timeout
    chunks: list[bytes] = []
    os.set_blocking(reader, False)
    pidfd = os.pidfd_open(pid)
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    poller.register(reader, select.POLLIN)
    reaped = False
    try:
        while True:
            ready = {descriptor for descriptor, _ in poller.poll(max(0.0, deadline - time.monotonic()) * 1000)}
            if not ready:
                raise TimeoutError(f"the child did not end within {timeout:g} s")
            if reader in ready and _drain(reader, chunks):
                poller.unregister(reader)
            elif pidfd in ready:
                _drain(reader, chunks)
                _, status = os.waitpid(pid, 0)
                reaped = True
                return b"".join(chunks), status
    finally:
        os.close(pidfd)
        if not reaped:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _drain(reader: int, chunks: list[bytes]) -> bool:
    """Read what is there; True at the end of the file."""
    try:
        while chunk := os.read(reader, 1 << 16):
            chunks.append(chunk)
    except BlockingIOError:
        return False
    return True
