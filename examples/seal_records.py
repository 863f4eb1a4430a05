"""Encrypt records in batches with the tenant's name authenticated, and see tampering refused.

Run it with ``python examples/seal_records.py``; it starts a cluster of its own and ends it.
"""

import engine

RECORDS = [f"record {number}".encode() for number in range(200)]


def main() -> None:
    """Seal, open and tamper."""
    with engine.LocalCluster(nodes=3, threshold=2) as local, engine.connect(local.client_config) as kq:
        kq.create_key("records", "aes-256-gcm", threshold=2, shares=3)
        sealed = kq.encrypt_many("records", RECORDS, associated_data=b"tenant-7")
        opened = kq.decrypt_many("records", sealed, associated_data=b"tenant-7")
        print(f"{len(sealed)} records sealed and opened: {opened == RECORDS}")
        try:
            kq.decrypt("records", sealed[0], associated_data=b"tenant-8")
        except engine.InvalidTag as error:
            print(f"another tenant is refused: {error}")


if __name__ == "__main__":
    main()
