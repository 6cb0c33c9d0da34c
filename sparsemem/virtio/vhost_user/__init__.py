"""vhost-user: devices served to a VMM over Unix sockets.

`messages` are bytes and types, `channel` the socket they come through; `vring` is one
queue as the frontend set it up, `session` the protocol with one frontend, `backend` what
outlives it, `state` what outlives the process; `server` gives each device its thread, and
`service` puts devices, their control socket and their figures together.
"""

import sys

if sys.byteorder != "little":
    # Rings and devices of VIRTIO 1 are little endian everywhere; the messages have the machine's order.
    raise ImportError("sparsemem serves virtio devices on little-endian machines only")

from sparsemem.virtio.vhost_user.backend import Backend, BackendStats
from sparsemem.virtio.vhost_user.control import ControlError, ControlServer, ask
from sparsemem.virtio.vhost_user.messages import ProtocolError
from sparsemem.virtio.vhost_user.server import Server
from sparsemem.virtio.vhost_user.service import Service
from sparsemem.virtio.vhost_user.state import Journal, StateError

__all__ = [
    "Backend",
    "BackendStats",
    "ControlError",
    "ControlServer",
    "Journal",
    "ProtocolError",
    "Server",
    "Service",
    "StateError",
    "ask",
]
