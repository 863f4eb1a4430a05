"""A network that really takes its time, in a network namespace of its own: a TUN device that sends packets back later.

What goes to ``FAR`` comes back as from there to ``NEAR``, after ``delay_s``: addresses are exchanged, which leaves the
checksums as they are. So who listens at ``NEAR`` is reached at ``FAR``, each way late, and TCP knows no better.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import queue
import struct
import subprocess
import threading
import time
from collections.abc import Iterator

NEAR, FAR = "10.77.0.1", "10.77.0.2"
CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
DEVICE = "far0"
PACKET_MAX = 65_536


@contextlib.contextmanager
def far_network(delay_s: float) -> Iterator[None]:
    """Give this process a network namespace with a loopback interface, and with ``FAR`` that long away one way."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    for command in ("link set lo up", f"addr add {NEAR}/24 dev {DEVICE}", f"link set {DEVICE} up"):
        subprocess.run(["ip", *command.split()], check=True)
    under_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

    def take() -> None:
        while packet := os.read(device, PACKET_MAX):
            if packet[0] >> 4 == 4:
                under_way.put((time.monotonic() + delay_s, packet))

    def give() -> None:
        while True:
            due_s, packet = under_way.get()
            time.sleep(max(0.0, due_s - time.monotonic()))
            os.write(device, packet[:12] + packet[16:20] + packet[12:16] + packet[20:])

    for target in (take, give):
        threading.Thread(target=target, daemon=True).start()  # they end with the process, as the namespace does
    yield
