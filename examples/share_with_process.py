"""A memfd region handed to another process over a socket, and adopted there.

The descriptor is the memory; the runs of plugged blocks go along, for a region's bitmap is its own.
"""

from __future__ import annotations

import json
import os
import socket
import sys

from sparsemem import Memfd, Region

SIZE, BLOCK = "1G", "2M"


def serve(channel: socket.socket) -> None:
    """The first process: makes the region, hands it over, reads the answer, and plugs more."""
    with Region(SIZE, block_size=BLOCK, backend=Memfd()) as region:
        region.plug_runs([(0, 2), (7, 1)])
        with region.view(7) as view:
            view[:5] = b"hello"
        socket.send_fds(channel, [json.dumps(list(region.plugged_runs())).encode()], [region.fileno()])
        assert channel.recv(100) == b"written"
        with region.view(0) as view:
            print(f"process {os.getpid()} reads: {bytes(view[:12]).decode()}")
            assert bytes(view[:12]) == b"hello, too!!"
        # What the other unplugged is gone: the audit sees it, and we follow.
        audit = region.audit()
        print(f"process {os.getpid()} audits: {audit}")
        assert audit.gaps == ((1, 1),)
        region.unplug(1)
        assert region.audit().ok


def adopt(channel: socket.socket) -> None:
    """The second process: adopts what it is handed."""
    text, (fd,), _, _ = socket.recv_fds(channel, 4096, 1)
    with Region(SIZE, block_size=BLOCK, backend=Memfd(fd=fd), plugged=json.loads(text)) as region:
        os.close(fd)  # the region has a duplicate of its own
        with region.view(7) as view:
            print(f"process {os.getpid()} reads: {bytes(view[:5]).decode()}")
            assert bytes(view[:5]) == b"hello"
        with region.view(0) as view:
            view[:12] = b"hello, too!!"
        region.unplug(1)
    channel.send(b"written")


def main() -> None:
    here, there = socket.socketpair()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        here.close()
        try:
            adopt(there)
            sys.stdout.flush()
        except BaseException as error:
            print(f"the child failed: {error!r}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    there.close()
    serve(here)
    here.close()
    _, status = os.waitpid(child, 0)
    assert status == 0
    print("two processes, one memory")


if __name__ == "__main__":
    main()
