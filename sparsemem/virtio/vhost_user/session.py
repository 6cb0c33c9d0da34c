"""The protocol with one frontend: each request's meaning for the device's rings and memory.

What is malformed ends the connection (ProtocolError).  What is well formed and cannot be
done is answered with a failure where an answer was asked for; else the device needs a
reset and says why, for the frontend would go on as if it had been done.
"""

from __future__ import annotations

import logging
import socket
import stat
from collections.abc import Callable
from typing import Any

from attrs import define, field

from sparsemem._sys import calls
from sparsemem._sys.descriptor import Descriptor
from sparsemem.errors import SparseMemError
from sparsemem.virtio.guest_memory import FileRange
from sparsemem.virtio.queue import MAX_SIZE, Rings
from sparsemem.virtio.vhost_user import messages
from sparsemem.virtio.vhost_user.backend import NEEDS_RESET, PROTOCOL_FEATURES, Backend
from sparsemem.virtio.vhost_user.channel import Channel, Message
from sparsemem.virtio.vhost_user.messages import (
    Config,
    MemoryRegion,
    Protocol,
    ProtocolError,
    Request,
    VringAddress,
    VringDescriptor,
    VringState,
)
from sparsemem.virtio.vhost_user.vring import Vring, check_event, replace

_log = logging.getLogger("sparsemem")

PROTOCOL = (
    Protocol.MQ
    | Protocol.REPLY_ACK
    | Protocol.BACKEND_REQ
    | Protocol.CONFIG
    | Protocol.CONFIGURE_MEM_SLOTS
    | Protocol.STATUS
)

MAX_SLOTS = 64
"""Regions of guest memory: more than a machine with DIMMs and a few devices has."""


@define(eq=False)
class Session:
    """One connection, from accept to its end.  Not thread-safe."""

    _backend: Backend
    _channel: Channel
    _protocol: int = field(init=False, default=0)
    _slots: list[MemoryRegion] = field(init=False, factory=list)
    _notices: socket.socket | None = field(init=False, default=None)

    def __attrs_post_init__(self) -> None:
        self._backend.connect()

    @property
    def channel(self) -> Channel:
        """Its socket."""
        return self._channel

    def close(self) -> None:
        """Ends the connection; the device keeps its own state."""
        self._channel.close()
        self._set_notices(None)
        self._backend.disconnect()

    def receive(self) -> bool:
        """Handles the next message, if it is all there; whether it was.

        Raises:
            ProtocolError: The connection is to be ended.
            Disconnected: It has ended.
        """
        message = self._channel.receive()
        if message is None:
            return False
        try:
            self._handle(message)
        finally:
            # What a handler keeps it has taken out; the rest is closed, whatever happened.
            for descriptor in message.descriptors:
                if not self._keeps(descriptor):
                    descriptor.close()
        return True

    def _keeps(self, descriptor: Descriptor) -> bool:
        return any(descriptor in (vring.kick, vring.call, vring.err) for vring in self._backend.vrings)

    def _handle(self, message: Message) -> None:
        _log.debug("%s: %s %s", self._backend.name, message.request.name, message.payload)
        answers = _ANSWERS.get(message.request)
        if answers is not None:
            self._channel.send(messages.reply(message.request, answers(self, message.payload)))
            return
        failure = ""
        try:
            _ACTIONS[message.request](self, message)
        except ProtocolError:
            raise
        except (SparseMemError, OSError, ValueError) as error:
            failure = f"{message.request.name}: {error}"
        wants_reply = message.need_reply and self._protocol & Protocol.REPLY_ACK
        if failure and wants_reply:
            _log.warning("%s: %s", self._backend.name, failure)
        elif failure:
            self._backend.fail(failure)
        if wants_reply:
            self._channel.send(messages.reply(message.request, messages.numeric(bool(failure))))

    # ---- requests that are answered -------------------------------------------------------

    def _get_features(self, _: None) -> bytes:
        return messages.numeric(self._backend.offered)

    def _get_protocol_features(self, _: None) -> bytes:
        return messages.numeric(PROTOCOL)

    def _get_queue_num(self, _: None) -> bytes:
        return messages.numeric(len(self._backend.vrings))

    def _get_max_mem_slots(self, _: None) -> bytes:
        return messages.numeric(MAX_SLOTS)

    def _get_status(self, _: None) -> bytes:
        backend = self._backend
        return messages.numeric(backend.status | (NEEDS_RESET if backend.needs_reset else 0))

    def _get_vring_base(self, state: VringState) -> bytes:
        vring = self._vring(state.index)
        return messages.vring_state(VringState(state.index, self._backend.stop(vring)))

    def _get_config(self, asked: Config) -> bytes:
        # Where it is out of range the answer has no data, which says so.
        data = self._backend.device.read_config()
        fits = asked.offset + asked.size <= len(data)
        return messages.config(asked, data[asked.offset : asked.offset + asked.size] if fits else b"")

    # ---- requests that are done -----------------------------------------------------------

    def _set_owner(self, message: Message) -> None:
        """Nothing to do: whoever is connected is the owner."""

    def _reset_owner(self, message: Message) -> None:
        for vring in self._backend.vrings:
            vring.enabled = False

    def _set_features(self, message: Message) -> None:
        features: int = message.payload
        self._backend.negotiate(features)
        if not features & PROTOCOL_FEATURES:
            # Such a frontend has no request to enable a ring with.
            for vring in self._backend.vrings:
                vring.enabled = True

    def _set_protocol_features(self, message: Message) -> None:
        if message.payload & ~PROTOCOL:
            raise ProtocolError(f"protocol features {message.payload & ~PROTOCOL:#x}, which were not offered")
        self._protocol = message.payload

    def _set_status(self, message: Message) -> None:
        status: int = message.payload
        if status > 0xFF:
            raise ProtocolError(f"a status of {status:#x}")
        self._backend.status = status
        if not status:
            for vring in self._backend.vrings:
                self._backend.stop(vring)

    def _set_config(self, message: Message) -> None:
        config: Config = message.payload
        if config.migration:
            raise ValueError("migration of the configuration is not offered")
        if not self._backend.running:
            self._backend.new_driver()
        self._backend.device.write_config(config.offset, config.data)

    def _set_backend_req_fd(self, message: Message) -> None:
        (descriptor,) = message.descriptors
        if not stat.S_ISSOCK(calls.kernel.fstat(descriptor.fd).st_mode):
            raise ProtocolError("a channel for the backend's requests that is no socket")
        # A duplicate, because a socket object closes its own; the message's is closed with the message.
        notices = socket.socket(fileno=calls.kernel.duplicate(descriptor.fd))
        notices.setblocking(False)
        self._set_notices(notices)

    # ---- memory ---------------------------------------------------------------------------

    def _set_mem_table(self, message: Message) -> None:
        regions: tuple[MemoryRegion, ...] = message.payload
        pairs = zip(regions, message.descriptors, strict=True)
        self._backend.memory.replace([_range(region, descriptor) for region, descriptor in pairs])
        self._slots = list(regions)

    def _add_mem_reg(self, message: Message) -> None:
        region: MemoryRegion = message.payload
        if len(self._slots) >= MAX_SLOTS:
            raise ValueError(f"more than {MAX_SLOTS} regions of memory")
        self._backend.memory.add(_range(region, message.descriptors[0]))
        self._slots.append(region)

    def _rem_mem_reg(self, message: Message) -> None:
        region: MemoryRegion = message.payload
        key = (region.guest, region.user, region.size)
        kept = [slot for slot in self._slots if (slot.guest, slot.user, slot.size) != key]
        if len(kept) == len(self._slots):
            raise ValueError(f"there is no region of {region.size} bytes at {region.guest:#x}")
        self._backend.memory.remove(region.guest, region.size)
        self._slots = kept

    def _guest_physical(self, user: int) -> int:
        for slot in self._slots:
            if 0 <= user - slot.user < slot.size:
                return slot.guest + user - slot.user
        raise ValueError(f"{user:#x} is in no region of memory")

    # ---- rings ----------------------------------------------------------------------------

    def _vring(self, index: int) -> Vring:
        if index >= len(self._backend.vrings):
            raise ProtocolError(f"ring {index} of a device with {len(self._backend.vrings)}")
        return self._backend.vrings[index]

    def _stopped(self, index: int) -> Vring:
        vring = self._vring(index)
        if vring.running:
            raise ValueError(f"ring {index} is running")
        return vring

    def _set_vring_num(self, message: Message) -> None:
        state: VringState = message.payload
        vring = self._stopped(state.index)
        if not 0 < state.number <= MAX_SIZE or state.number & (state.number - 1):
            raise ValueError(f"{state.number} entries, where a power of two up to {MAX_SIZE} is right")
        vring.size, vring.rings = state.number, None

    def _set_vring_addr(self, message: Message) -> None:
        where: VringAddress = message.payload
        vring = self._vring(where.index)
        if where.flags:
            raise ValueError(f"flags {where.flags:#x}: logging is not offered")
        if not vring.size:
            raise ValueError(f"ring {where.index} has no size yet")
        rings = Rings(
            vring.size,
            self._guest_physical(where.descriptors),
            self._guest_physical(where.available),
            self._guest_physical(where.used),
        )
        if vring.running and rings != vring.rings:
            raise ValueError(f"ring {where.index} is running")
        rings.check(self._backend.memory)
        vring.rings = rings

    def _set_vring_base(self, message: Message) -> None:
        state: VringState = message.payload
        vring = self._stopped(state.index)
        if state.number > 0xFFFF:
            raise ValueError(f"a base of {state.number}, where 65535 is the most")
        vring.base = state.number
        if not state.number and vring.stopped_at != 0:
            self._backend.new_driver()

    def _set_vring_kick(self, message: Message) -> None:
        about: VringDescriptor = message.payload
        vring = self._vring(about.index)
        if not about.given:
            raise ValueError(f"ring {about.index} without a descriptor: it would have to be polled")
        replace(vring, "kick", check_event(message.descriptors[0]))
        self._backend.check_place()

    def _set_vring_call(self, message: Message) -> None:
        self._set_event("call", message)

    def _set_vring_err(self, message: Message) -> None:
        self._set_event("err", message)

    def _set_event(self, name: str, message: Message) -> None:
        about: VringDescriptor = message.payload
        vring = self._vring(about.index)
        replace(vring, name, check_event(message.descriptors[0]) if about.given else None)

    def _set_vring_enable(self, message: Message) -> None:
        state: VringState = message.payload
        if state.number > 1:
            raise ValueError(f"ring {state.index} enabled {state.number} times")
        self._vring(state.index).enabled = bool(state.number)

    # ---- what the backend has to say --------------------------------------------------------

    def _set_notices(self, notices: socket.socket | None) -> None:
        old, self._notices = self._notices, notices
        if old is not None:
            old.close()

    @property
    def notices(self) -> socket.socket | None:
        """Where the frontend can be told of a changed configuration, while there is something to tell.

        And while a driver is at work: it reads the configuration before that, and QEMU 10.0 crashes
        when it is told of a change while it still makes the device.
        """
        wanted = self._backend.config_pending and self._backend.running and self._protocol & Protocol.CONFIG
        return self._notices if wanted else None

    def notify(self) -> None:
        """Tells the frontend that the configuration has changed, if it wants to know and is reading."""
        notices = self.notices
        if notices is None:
            return
        self._backend.config_pending = False  # before it is sent: a change that comes now is told again
        data = messages.config_change()
        try:
            whole = notices.send(data, socket.MSG_NOSIGNAL) == len(data)
        except BlockingIOError:
            self._backend.config_pending = True
            return
        except (BrokenPipeError, ConnectionResetError):
            whole = False  # it is about to go, or wants to hear no more: no trouble of ours
        except OSError as error:
            _log.warning("%s: cannot tell the frontend of the configuration: %s", self._backend.name, error)
            whole = False
        if not whole:
            self._set_notices(None)


def _range(region: MemoryRegion, descriptor: Descriptor) -> FileRange:
    return FileRange(region.guest, region.size, descriptor.fd, region.offset)


_ANSWERS: dict[Request, Callable[[Session, Any], bytes]] = {
    Request.GET_FEATURES: Session._get_features,
    Request.GET_PROTOCOL_FEATURES: Session._get_protocol_features,
    Request.GET_QUEUE_NUM: Session._get_queue_num,
    Request.GET_MAX_MEM_SLOTS: Session._get_max_mem_slots,
    Request.GET_STATUS: Session._get_status,
    Request.GET_VRING_BASE: Session._get_vring_base,
    Request.GET_CONFIG: Session._get_config,
}

_ACTIONS: dict[Request, Callable[[Session, Message], None]] = {
    Request.SET_FEATURES: Session._set_features,
    Request.SET_OWNER: Session._set_owner,
    Request.RESET_OWNER: Session._reset_owner,
    Request.SET_MEM_TABLE: Session._set_mem_table,
    Request.SET_VRING_NUM: Session._set_vring_num,
    Request.SET_VRING_ADDR: Session._set_vring_addr,
    Request.SET_VRING_BASE: Session._set_vring_base,
    Request.SET_VRING_KICK: Session._set_vring_kick,
    Request.SET_VRING_CALL: Session._set_vring_call,
    Request.SET_VRING_ERR: Session._set_vring_err,
    Request.SET_PROTOCOL_FEATURES: Session._set_protocol_features,
    Request.SET_VRING_ENABLE: Session._set_vring_enable,
    Request.SET_BACKEND_REQ_FD: Session._set_backend_req_fd,
    Request.SET_CONFIG: Session._set_config,
    Request.ADD_MEM_REG: Session._add_mem_reg,
    Request.REM_MEM_REG: Session._rem_mem_reg,
    Request.SET_STATUS: Session._set_status,
}
