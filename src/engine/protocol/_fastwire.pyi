def read_operate(message: bytes) -> tuple[int, int, bytes, int, bytes, bytes, bytes, bytes, bytes, bool] | None: ...
def write_operate(
    version: int,
    number: int,
    verb: bytes,
    timeout_ms: int,
    key: bytes,
    key_id: bytes,
    data: bytes,
    associated_data: bytes,
    proof: bytes,
    digested: bool,
) -> bytes | None: ...
def read_result(message: bytes) -> tuple[int, int, bytes, int, int, bool] | None: ...
def write_result(version: int, number: int, data: bytes, queue: int, service_us: int, loaded: bool) -> bytes: ...
