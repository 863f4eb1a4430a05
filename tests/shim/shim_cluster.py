"""A local cluster with a shim before each node's token."""

from __future__ import annotations

import tomllib
from typing import Any

from engine import LocalCluster
from engine.client.config import write_toml
from pkcs11_shim import Shim

__all__ = ["ShimCluster"]


class ShimCluster(LocalCluster):
    """``shims`` are those of the nodes, by name; the rest is ``LocalCluster``'s."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.shims: dict[str, Shim] = {}
        super().__init__(*arguments, **named)

    def _write_node(self, name: str, pin: str, owner: str) -> None:
        super()._write_node(name, pin, owner)
        self.shims[name] = Shim(self.path / "shims" / name)
        file = self.path / "nodes" / name / "node.toml"
        values = tomllib.loads(file.read_text(encoding="utf-8"))
        values["token"]["module"] = str(self.shims[name].library)
        write_toml(file, values)

    def close(self) -> None:
        """Stop, and let go of the shims."""
        super().close()
        for shim in self.shims.values():
            shim.close()
