"""Reading a chain of cluster manifests that may not be signed by enough operators yet. It trusts nothing it shows.

``engine.protocol.manifest.open_chain`` is what members use; it takes complete chains alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import ManifestError, ProtocolError
from engine.protocol import manifest as documents
from engine.protocol.manifest import Member, PolicyRule, Retiring, chain_pin, open_chain
from engine.protocol.signed import read_unverified, verify_envelope

__all__ = ["ChainView", "view_chain"]


@dataclass(frozen=True, slots=True)
class ChainView:
    """The newest manifest of a chain, with the signatures it has and the count it needs.

    Every link before the newest, and every signature on the newest, is checked; whether ``pin`` is the right one is for
    the person to know.
    """

    name: str
    serial: int
    pin: bytes
    digest: bytes
    quorum: int
    groups: int
    domain_level: int
    members: tuple[Member, ...]
    rules: tuple[PolicyRule, ...]
    retiring: tuple[Retiring, ...]
    draining: tuple[str, ...]
    signers: tuple[str, ...]
    needed: int

    @property
    def complete(self) -> bool:
        """Whether enough operators have signed."""
        return len(self.signers) >= self.needed


def view_chain(chain: bytes, pin: bytes | None = None) -> ChainView:
    """The chain as far as it is signed; ``ManifestError`` where a link or a signature is wrong.

    Without ``pin`` the chain's own first hash is taken.
    """
    try:
        return _view(chain, chain_pin(chain) if pin is None else pin)
    except ProtocolError as error:
        raise ManifestError(f"no cluster manifest: {error}") from None


def _view(chain: bytes, pin: bytes) -> ChainView:
    envelopes = documents._chains.decode(chain).envelopes
    newest = read_unverified(envelopes[-1])
    manifest = documents._manifests.decode(newest.payload)
    documents.check_content(manifest)
    if len(envelopes) > 1:
        before = open_chain(documents._chains.encode(documents._Chain(envelopes[:-1])), pin)
        if (newest.serial, manifest.previous) != (before.serial + 1, before.digest):
            raise ManifestError(f"cluster manifest: serial {newest.serial} does not follow {before.serial}")
        if (manifest.cluster, manifest.groups) != (before.name, before.groups):
            raise ManifestError("cluster manifest: the name and the number of groups can't change")
        operators, needed = before.sign_key("operator"), before.quorum
    else:
        if newest.digest != pin:
            raise ManifestError(
                f"cluster manifest: the first one has hash {newest.digest.hex()}, pinned is {pin.hex()}"
            )
        operators = {each.name: each.sign_public for each in manifest.members if each.role == "operator"}
        needed = manifest.quorum
    signed = verify_envelope(envelopes[-1], "cluster", operators)
    view = ChainView(
        name=manifest.cluster,
        serial=signed.serial,
        pin=pin,
        digest=signed.digest,
        quorum=manifest.quorum,
        groups=manifest.groups,
        domain_level=manifest.domain_level,
        members=tuple(manifest.members),
        rules=tuple(manifest.rules),
        retiring=tuple(manifest.retiring),
        draining=tuple(manifest.draining),
        signers=signed.signers,
        needed=needed,
    )
    if view.complete:
        open_chain(chain, pin)
    return view
