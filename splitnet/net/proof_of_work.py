"""Work that a key has cost, so that many keys cost much: nodes of the DHT that are full prefer records of such keys.

A proof is a number with which scrypt of the key begins with `WORK_BITS` zero bits. To find it takes seconds of one
core, once in the life of a key; to check it takes 0.4 ms.
"""

from __future__ import annotations

import hashlib
import threading
from functools import lru_cache
from pathlib import Path
from typing import Final

from splitnet.net.identity import PublicKey

WORK_BITS: Final = 13
MAX_PROOF: Final = (1 << 32) - 1

_MOST_DIGITS = 10
_PREFIX = b"splitnet proof of work\0"


@lru_cache(maxsize=4096)
def has_worked(key: PublicKey, proof: int) -> bool:
    """Whether `proof` proves the work of this key; 0 proves none."""
    return proof > 0 and _is_found(key, proof)


def work(key: PublicKey, stop: threading.Event) -> int:
    """Finds the proof of a key, 3 s of one core on average; 0 if told to stop before."""
    for proof in range(1, MAX_PROOF):
        if stop.is_set():
            break
        if _is_found(key, proof):
            return proof
    return 0


def kept_proof(key: PublicKey, file: Path, stop: threading.Event) -> int:
    """The proof of a key in `file`, which is made if it holds none; 0 if told to stop before it was found.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        text = file.read_bytes()[:_MOST_DIGITS]
    except FileNotFoundError:
        text = b""
    proof = int(text) if text.isdigit() else 0
    if proof > MAX_PROOF or not has_worked(key, proof):
        proof = work(key, stop)
        if proof:
            file.write_text(str(proof), encoding="utf-8")
    return proof


def _is_found(key: PublicKey, proof: int) -> bool:
    # scrypt, as it leaves other threads alone and is hardly faster on special hardware than here.
    digest = hashlib.scrypt(_PREFIX, salt=key.raw + proof.to_bytes(8, "big"), n=256, r=8, p=1, dklen=4)
    return int.from_bytes(digest, "big") >> (32 - WORK_BITS) == 0
