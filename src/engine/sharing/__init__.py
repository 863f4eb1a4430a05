"""Owns Shamir's sharing of a key and the placement of its shares; it knows no sockets and no clock.

This is the one room that touches the native core: everyone else gets at it through these names.
"""

from engine._fastshamir import available_kernels, kernel_name, use_kernel
from engine.sharing.combiner import find_corrupt, reconstruct_into, reconstruct_key
from engine.sharing.correction import Correction, correct_shares, find_consistent
from engine.sharing.dealer import BLINDING_BYTES, blind, fresh_secret, generate_shares, unblind
from engine.sharing.placement import (
    Distribution,
    NodeLocation,
    check_placement,
    distribute_shares,
    order_holders,
    placement_group,
    placement_risk,
)
from engine.sharing.renewal import (
    FINGERPRINT_BYTES,
    deal_sub_shares,
    deal_zero,
    fingerprint,
    finish_recovery,
    merge_sub_shares,
    recover_share,
    recovery_parts,
    refresh_share,
    refresh_shares,
    reshare,
    sharing_faults,
    sub_share_gaps,
    sum_recovery_parts,
    wrong_sub_sharings,
    zero_sharing_faults,
)
from engine.sharing.secret import SecretBuffer, secret_memory, take, wipe
from engine.sharing.share import SALT_BYTES, SecretShare, Share, check_value, commitment, new_salt

__all__ = [
    "BLINDING_BYTES",
    "FINGERPRINT_BYTES",
    "SALT_BYTES",
    "Correction",
    "Distribution",
    "NodeLocation",
    "SecretBuffer",
    "SecretShare",
    "Share",
    "available_kernels",
    "blind",
    "check_placement",
    "check_value",
    "commitment",
    "correct_shares",
    "deal_sub_shares",
    "deal_zero",
    "distribute_shares",
    "find_consistent",
    "find_corrupt",
    "fingerprint",
    "finish_recovery",
    "fresh_secret",
    "generate_shares",
    "kernel_name",
    "merge_sub_shares",
    "new_salt",
    "order_holders",
    "placement_group",
    "placement_risk",
    "reconstruct_into",
    "reconstruct_key",
    "recover_share",
    "recovery_parts",
    "refresh_share",
    "refresh_shares",
    "reshare",
    "secret_memory",
    "sharing_faults",
    "sub_share_gaps",
    "sum_recovery_parts",
    "take",
    "unblind",
    "use_kernel",
    "wipe",
    "wrong_sub_sharings",
    "zero_sharing_faults",
]
