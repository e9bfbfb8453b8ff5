"""Pictures that are there more than once: the same pixels, and nearly the same picture."""
from collections.abc import Iterator

import numpy as np

from nbn_timm.data.grouping import Groups

NEAR_BITS = 6  # of 64: perceptual hashes that differ in no more are compared further
NEAR_CORRELATION = 0.95  # of the two pictures in 16 x 16 grey; see docs/checking.md for what was tried
_PLAIN = 4.0  # grey levels: the hash of a picture that varies less is noise
_BITS_OF_BYTE = np.array([bin(byte).count('1') for byte in range(256)], dtype=np.uint8)


def same_content(contents: list[bytes]) -> list[list[int]]:
    """Groups of two pictures or more with the same pixels, by position; b'' is none."""
    groups = Groups(len(contents))
    groups.join_equal(content or None for content in contents)
    return groups.members()


def near_groups(hashes: np.ndarray, greys: np.ndarray) -> list[list[int]]:
    """Groups of pictures that look nearly alike, by position.

    Two are joined if their hashes differ in `NEAR_BITS` bits at most and their grey pictures correlate by at least
    `NEAR_CORRELATION`, which small pictures of one colour with a spot in the middle do not by chance.

    Args:
        hashes: uint64 [N].
        greys: uint8 [N, 256].
    """
    greys = greys.astype(np.float32)
    centred = greys - greys.mean(1, keepdims=True)
    spread = np.sqrt((centred ** 2).mean(1))
    usable = np.flatnonzero(spread >= _PLAIN)
    unit = centred / np.maximum(spread, 1e-6)[:, None] / np.sqrt(greys.shape[1])
    groups = Groups(len(hashes))
    for first, second in near_pairs(hashes[usable], NEAR_BITS):
        first, second = usable[first], usable[second]
        alike = np.einsum('nd,nd->n', unit[first], unit[second]) >= NEAR_CORRELATION
        for one, other in zip(first[alike].tolist(), second[alike].tolist(), strict=True):
            groups.join(one, other)
    return groups.members()


def near_pairs(hashes: np.ndarray, bits: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of hashes that differ in `bits` of 64 bits at most, in blocks (positions [P], positions [P]).

    Of two such hashes, cut into bits + 1 pieces, one piece is equal, so only hashes that share a piece are compared; a
    pair may come more than once.

    Args:
        hashes: uint64 [N].
        bits: At most this many.
    """
    cuts = [round(piece * 64 / (bits + 1)) for piece in range(bits + 2)]
    for low, high in zip(cuts, cuts[1:], strict=False):
        pieces = (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(pieces, kind='stable')
        pieces, sorted_hashes = pieces[order], hashes[order]
        place = np.arange(len(hashes))
        distance = 1
        while True:  # compare each with the next of its piece, then the one after that, ...
            place = place[place + distance < len(hashes)]
            place = place[pieces[place] == pieces[place + distance]]
            if not len(place):
                break
            near = differing_bits(sorted_hashes[place], sorted_hashes[place + distance]) <= bits
            if near.any():
                yield order[place[near]], order[place[near] + distance]
            distance += 1


def differing_bits(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """In how many bits hashes differ, [N]."""
    return _BITS_OF_BYTE[np.ascontiguousarray(first ^ second).view(np.uint8).reshape(-1, 8)].sum(1)
