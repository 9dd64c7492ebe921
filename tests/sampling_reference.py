"""The sampler in numpy, written independently of the compiler: what every sampling kernel is held to.

The order of the steps is the one that passes/lower_sampling.py documents. Values are float32; the sums behind top-p and
the draw are float64 here, so a kernel that sums in float32 may differ where a draw falls within rounding of a boundary.
A row lists a token at most once among its penalties and once among its biases, and keeps at least one finite logit.
"""

import numpy as np

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: four random 32-bit words for a counter of four and a key of two. Salmon et al. 2011."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, draw: int) -> np.float32:
    """The number in [0, 1) for one draw: the upper 24 bits of the first word. seed: 64 bit, may be negative."""
    seed &= (1 << 64) - 1
    words = philox4x32((draw & _MASK, 0, 0, 0), (seed & _MASK, seed >> 32))
    return np.float32((words[0] >> 8) * 2.0**-24)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis, float32 with float64 inside."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return (x - np.log(np.exp(x).sum(-1, keepdims=True))).astype(np.float32)


def penalise(
    logits: np.ndarray,
    bias: dict[int, float],
    counts: dict[int, int],
    repetition: float,
    presence: float,
    frequency: float,
) -> np.ndarray:
    """Bias, then repetition, then presence and frequency penalties, on a copy of one row. float32[V] -> float32[V]."""
    row = logits.astype(np.float32).copy()
    for token, value in bias.items():
        row[token] += np.float32(value)
    for token, count in counts.items():
        row[token] = row[token] / np.float32(repetition) if row[token] > 0 else row[token] * np.float32(repetition)
        if count > 0:
            row[token] -= np.float32(presence)
            row[token] -= np.float32(frequency) * np.float32(count)
    return row


def kept_weights(row: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """exp(row / temperature - max) of the tokens that the filters leave, 0 for the others. float32[V] -> float32[V]."""
    scaled = row / np.float32(temperature)
    weights = np.exp(scaled - scaled.max())
    if 0 < top_k < len(row):
        weights[scaled < np.sort(scaled)[-top_k]] = 0
    if top_p < 1:
        descending = np.sort(weights)[::-1]
        mass = np.cumsum(descending, dtype=np.float64)
        reached = np.searchsorted(mass, np.float64(np.float32(top_p)) * mass[-1])
        weights[weights < descending[min(reached, len(row) - 1)]] = 0
    if min_p > 0:
        weights[weights < np.float32(min_p) * weights.max()] = 0
    return weights


def draw(weights: np.ndarray, u: np.float32) -> int:
    """The first token, in token order, whose cumulative weight exceeds u times the total."""
    mass = np.cumsum(weights, dtype=np.float64)
    token = int(np.searchsorted(mass, np.float64(u) * mass[-1], side="right"))
    return min(token, int(np.flatnonzero(weights)[-1]))


def sample_reference(
    logits: np.ndarray,
    *,
    temperature: np.ndarray,
    top_k: np.ndarray,
    top_p: np.ndarray,
    min_p: np.ndarray,
    repetition_penalty: np.ndarray,
    presence_penalty: np.ndarray,
    frequency_penalty: np.ndarray,
    seeds: np.ndarray,
    draws: np.ndarray,
    penalty_indptr: np.ndarray,
    penalty_tokens: np.ndarray,
    penalty_counts: np.ndarray,
    bias_indptr: np.ndarray,
    bias_tokens: np.ndarray,
    bias_values: np.ndarray,
    alternatives: np.ndarray,
    top_logprobs: int = 20,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """f32[r,V] and the arrays of SAMPLING_INPUTS -> ids i32[r], logprobs f32[r], top_ids i32[r,L], top_logprobs."""
    rows = len(logits)
    logprobs = log_softmax(logits)
    ids = np.empty(rows, np.int32)
    for r in range(rows):
        biases = slice(bias_indptr[r], bias_indptr[r + 1])
        listed = slice(penalty_indptr[r], penalty_indptr[r + 1])
        row = penalise(
            logits[r],
            dict(zip(bias_tokens[biases].tolist(), bias_values[biases].tolist(), strict=True)),
            dict(zip(penalty_tokens[listed].tolist(), penalty_counts[listed].tolist(), strict=True)),
            float(repetition_penalty[r]),
            float(presence_penalty[r]),
            float(frequency_penalty[r]),
        )
        if temperature[r] == 0:
            ids[r] = np.argmax(row)
        else:
            weights = kept_weights(row, float(temperature[r]), int(top_k[r]), float(top_p[r]), float(min_p[r]))
            ids[r] = draw(weights, uniform(int(seeds[r]), int(draws[r])))
    top_ids = np.argsort(-logits, axis=-1, kind="stable")[:, :top_logprobs].astype(np.int32)
    chosen = np.take_along_axis(logprobs, ids[:, None], -1)[:, 0]
    return ids, chosen, top_ids, np.take_along_axis(logprobs, top_ids, -1)
