from typing import Any, final

import zmq

__pyx_capi__: dict[str, Any]

DONE: int
NOT_SENT: int
LATE: int
OTHER: int
BROKEN: int

@final
class Line:
    data: bytes | None
    frame: bytes | None
    queue: int
    service_us: int
    loaded: bool
    elapsed_s: float
    def __new__(cls, socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> Line: ...
    @property
    def spins(self) -> bool: ...
    def operate(
        self,
        number: int,
        verb: bytes,
        key: bytes,
        key_id: bytes,
        data: bytes,
        associated_data: bytes,
        proof: bytes,
        digested: bool,
        timeout_ms: int,
        patience_s: float,
    ) -> int: ...
    def resume(self) -> int: ...
