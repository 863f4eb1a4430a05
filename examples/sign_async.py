"""Sign many messages at once from an asyncio program, and verify them with the exported public key alone.

Run it with ``python examples/sign_async.py``; it starts a cluster of its own and ends it.
"""

import asyncio
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

import engine

MESSAGES = [f"message {number}".encode() for number in range(100)]


async def sign(client_config: Path) -> tuple[str, list[bytes]]:
    """The public key in PEM and a signature for each message."""
    async with engine.aio.connect(client_config) as kq:
        await kq.create_key("mail", "ed25519", threshold=2, shares=3)
        signatures = await asyncio.gather(*(kq.sign("mail", message) for message in MESSAGES))
        return await kq.public_key("mail"), list(signatures)


def main() -> None:
    """Start a cluster, sign on it, and verify without it."""
    with engine.LocalCluster(nodes=3, threshold=2) as local:
        pem, signatures = asyncio.run(sign(local.client_config))
    public = load_pem_public_key(pem.encode())
    assert isinstance(public, Ed25519PublicKey)  # noqa: S101 # for the reader and the type checker
    for message, signature in zip(MESSAGES, signatures, strict=True):
        public.verify(signature, message)
    print(f"{len(signatures)} signatures verified without the cluster")


if __name__ == "__main__":
    main()
