"""Randomness by key instead of by stream: the numbers of sample `index` depend on (seed, purpose, index) and on
nothing else, so no batch size, number of processes or restart can change them, and no generator state is saved.

The hash is the finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"),
computed in uint64 for whole batches at once; numpy's own generators cannot be keyed per row.
"""

import zlib

import numpy as np

from mutor_vision.errors import UserError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def check_seed(seed: int, name: str = "--seed") -> None:
    """Raise UserError for a seed that would be another one's modulo 2^64, or that torch does not take."""
    if not 0 <= seed < 2**63:
        raise UserError(f"{name} is {seed}, expected 0 to 2^63 - 1")


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(seed: int, purpose: str, index: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # uint64 arithmetic is meant to wrap
        key = np.array([seed % 2**64], dtype=np.uint64)
        key = _mix(key + _GOLDEN) ^ np.uint64(zlib.crc32(purpose.encode()))
        return _mix(_mix(key * _GOLDEN) + np.asarray(index).astype(np.uint64) * _GOLDEN)


def bits(seed: int, purpose: str, index: np.ndarray, count: int) -> np.ndarray:
    """(B,) integer sample indices -> (B, count) uint64, each row from (seed, purpose, index[row])."""
    with np.errstate(over="ignore"):
        steps = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * _GOLDEN
        return _mix(_keys(seed, purpose, index)[:, None] + steps[None, :])


def uniforms(seed: int, purpose: str, index: np.ndarray, count: int) -> np.ndarray:
    """The same as float64 in [0, 1)."""
    return (bits(seed, purpose, index, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, purpose: str, epoch: int, n: int) -> np.ndarray:
    """A permutation of range(n) that depends on (seed, purpose, epoch) alone, on every platform and numpy version."""
    draws = uniforms(seed, f"{purpose}/{epoch}", np.arange(n), 1)[:, 0]
    return np.argsort(draws, kind="stable")


def choose(seed: int, purpose: str, n: int, count: int) -> np.ndarray:
    """(at most count,) sorted int64: numbers of range(n) chosen by (seed, purpose) alone, each equally likely. What is
    listed class by class must be chosen so: the first `count` would be of the first classes."""
    return np.sort(permutation(seed, purpose, 0, n)[:count])


def derived_seed(seed: int, purpose: str, *index: int) -> int:
    """A 63-bit seed for a library generator (dropout, say), from (seed, purpose, index...)."""
    purpose = "/".join([purpose, *map(str, index)])
    return int(_keys(seed, purpose, np.zeros(1, dtype=np.int64))[0] >> np.uint64(1))
