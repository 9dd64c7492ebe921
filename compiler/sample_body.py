"""Reference body of the `sample` composite: one row after another in plain loops.

passes/lower_sampling.py documents the order of its steps.
Filters look for their threshold by stepping down through the distinct values, so a row costs V for every value kept.
"""

from tvm import tirx
from tvm.script import tirx as T

from tilewright.compiler.composites import SampleSpec

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Philox4x32, Salmon et al. 2011
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOWEST = -3.0e38


def _low(word):
    return T.Cast("uint32", word & T.uint64(0xFFFFFFFF))


def _high(word):
    return T.Cast("uint32", word >> T.uint64(32))


def _product(word, multiplier: int):
    return T.Cast("uint64", word) * T.uint64(multiplier)


def sample_kernel(spec: SampleSpec) -> tirx.PrimFunc:
    """logits f32[r,V] and SAMPLING_INPUTS -> ids i32[r], logprobs f32[r], top_ids i32[r,L], top_logprobs f32[r,L].

    Two more outputs, f32[r,V] each, are scratch: no device gives a kernel room for a vocabulary of its own.
    """
    vocab, alternatives = spec.vocab, spec.top_logprobs
    m0, m1 = _MULTIPLIERS

    @T.prim_func(private=True, s_tir=True)
    def sample(
        logits_handle: T.handle,
        temperature_handle: T.handle,
        top_k_handle: T.handle,
        top_p_handle: T.handle,
        min_p_handle: T.handle,
        repetition_handle: T.handle,
        presence_handle: T.handle,
        frequency_handle: T.handle,
        seeds_handle: T.handle,
        draws_handle: T.handle,
        penalty_indptr_handle: T.handle,
        penalty_tokens_handle: T.handle,
        penalty_counts_handle: T.handle,
        bias_indptr_handle: T.handle,
        bias_tokens_handle: T.handle,
        bias_values_handle: T.handle,
        wanted_handle: T.handle,
        ids_handle: T.handle,
        logprobs_handle: T.handle,
        top_ids_handle: T.handle,
        top_logprobs_handle: T.handle,
        scores_handle: T.handle,
        weights_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        r, c, e = T.int64(), T.int64(), T.int64()
        logits = T.match_buffer(logits_handle, (r, vocab), "float32")
        temperature = T.match_buffer(temperature_handle, (r,), "float32")
        top_k = T.match_buffer(top_k_handle, (r,), "int32")
        top_p = T.match_buffer(top_p_handle, (r,), "float32")
        min_p = T.match_buffer(min_p_handle, (r,), "float32")
        repetition = T.match_buffer(repetition_handle, (r,), "float32")
        presence = T.match_buffer(presence_handle, (r,), "float32")
        frequency = T.match_buffer(frequency_handle, (r,), "float32")
        seeds = T.match_buffer(seeds_handle, (r,), "int64")
        draws = T.match_buffer(draws_handle, (r,), "int32")
        penalty_indptr = T.match_buffer(penalty_indptr_handle, (r + 1,), "int32")
        penalty_tokens = T.match_buffer(penalty_tokens_handle, (c,), "int32")
        penalty_counts = T.match_buffer(penalty_counts_handle, (c,), "int32")
        bias_indptr = T.match_buffer(bias_indptr_handle, (r + 1,), "int32")
        bias_tokens = T.match_buffer(bias_tokens_handle, (e,), "int32")
        bias_values = T.match_buffer(bias_values_handle, (e,), "float32")
        T.match_buffer(wanted_handle, (r,), "int32")  # all alternatives are made, wanted or not
        ids = T.match_buffer(ids_handle, (r,), "int32")
        logprobs = T.match_buffer(logprobs_handle, (r,), "float32")
        top_ids = T.match_buffer(top_ids_handle, (r, alternatives), "int32")
        top_logprobs = T.match_buffer(top_logprobs_handle, (r, alternatives), "float32")
        scores = T.match_buffer(scores_handle, (r, vocab), "float32")
        weights = T.match_buffer(weights_handle, (r, vocab), "float32")

        for row in T.serial(r):
            with T.sblock("sample"):
                i = T.axis.spatial(r, row)
                T.reads()
                T.writes(
                    ids[i],
                    logprobs[i],
                    top_ids[i, 0:alternatives],
                    top_logprobs[i, 0:alternatives],
                    scores[i, 0:vocab],
                    weights[i, 0:vocab],
                )
                peak = T.sblock_alloc_buffer((1,), "float32", scope="local")
                mass = T.sblock_alloc_buffer((1,), "float32", scope="local")
                log_total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                threshold = T.sblock_alloc_buffer((1,), "float32", scope="local")
                following = T.sblock_alloc_buffer((1,), "float32", scope="local")
                kept = T.sblock_alloc_buffer((1,), "int32", scope="local")
                best = T.sblock_alloc_buffer((1,), "int32", scope="local")
                target = T.sblock_alloc_buffer((1,), "float32", scope="local")
                counter = T.sblock_alloc_buffer((4,), "uint32", scope="local")
                key = T.sblock_alloc_buffer((2,), "uint32", scope="local")
                product = T.sblock_alloc_buffer((2,), "uint64", scope="local")

                # log_softmax of the raw logits: log_total = peak + log(sum(exp(logits - peak)))
                peak[0] = logits[i, 0]
                for v in T.serial(vocab):
                    peak[0] = T.max(peak[0], logits[i, v])
                mass[0] = T.float32(0)
                for v in T.serial(vocab):
                    mass[0] = mass[0] + T.exp(logits[i, v] - peak[0])
                log_total[0] = peak[0] + T.log(mass[0])

                # the alternatives: each the largest of those after the one before, the lowest token on ties
                for a in T.serial(alternatives):
                    best[0] = -1
                    for v in T.serial(vocab):
                        if best[0] < 0 or logits[i, v] > logits[i, best[0]]:
                            if a == 0:
                                best[0] = T.Cast("int32", v)
                            else:
                                if logits[i, v] < logits[i, top_ids[i, a - 1]] or (
                                    logits[i, v] == logits[i, top_ids[i, a - 1]] and v > top_ids[i, a - 1]
                                ):
                                    best[0] = T.Cast("int32", v)
                    top_ids[i, a] = best[0]
                    top_logprobs[i, a] = logits[i, best[0]] - log_total[0]

                # bias and penalties
                for v in T.serial(vocab):
                    scores[i, v] = logits[i, v]
                for j in T.serial(bias_indptr[i], bias_indptr[i + 1]):
                    scores[i, bias_tokens[j]] = scores[i, bias_tokens[j]] + bias_values[j]
                for j in T.serial(penalty_indptr[i], penalty_indptr[i + 1]):
                    if scores[i, penalty_tokens[j]] > T.float32(0):
                        scores[i, penalty_tokens[j]] = scores[i, penalty_tokens[j]] / repetition[i]
                    else:
                        scores[i, penalty_tokens[j]] = scores[i, penalty_tokens[j]] * repetition[i]
                    if penalty_counts[j] > 0:
                        scores[i, penalty_tokens[j]] = scores[i, penalty_tokens[j]] - presence[i]
                        scores[i, penalty_tokens[j]] = scores[i, penalty_tokens[j]] - frequency[i] * T.Cast(
                            "float32", penalty_counts[j]
                        )

                best[0] = 0
                for v in T.serial(vocab):
                    if scores[i, v] > scores[i, best[0]]:
                        best[0] = T.Cast("int32", v)

                if temperature[i] != T.float32(0):
                    peak[0] = scores[i, best[0]] / temperature[i]
                    for v in T.serial(vocab):
                        scores[i, v] = scores[i, v] / temperature[i]
                        weights[i, v] = T.exp(scores[i, v] - peak[0])

                    if top_k[i] > 0 and top_k[i] < vocab:
                        threshold[0] = peak[0]
                        kept[0] = 0
                        while kept[0] < top_k[i]:
                            following[0] = T.float32(_LOWEST)
                            kept[0] = 0
                            for v in T.serial(vocab):
                                if scores[i, v] >= threshold[0]:
                                    kept[0] = kept[0] + 1
                                else:
                                    following[0] = T.max(following[0], scores[i, v])
                            if kept[0] < top_k[i]:
                                if following[0] == T.float32(_LOWEST):
                                    kept[0] = top_k[i]  # only banned tokens are left
                                else:
                                    threshold[0] = following[0]
                        for v in T.serial(vocab):
                            if scores[i, v] < threshold[0]:
                                weights[i, v] = T.float32(0)

                    mass[0] = T.float32(0)
                    for v in T.serial(vocab):
                        mass[0] = mass[0] + weights[i, v]

                    if top_p[i] < T.float32(1):
                        target[0] = top_p[i] * mass[0]
                        threshold[0] = T.float32(1)  # the largest weight: exp(0)
                        mass[0] = T.float32(-1)
                        while mass[0] < target[0]:
                            following[0] = T.float32(0)
                            mass[0] = T.float32(0)
                            for v in T.serial(vocab):
                                if weights[i, v] >= threshold[0]:
                                    mass[0] = mass[0] + weights[i, v]
                                else:
                                    following[0] = T.max(following[0], weights[i, v])
                            if mass[0] < target[0]:
                                threshold[0] = following[0]
                        for v in T.serial(vocab):
                            if weights[i, v] < threshold[0]:
                                weights[i, v] = T.float32(0)

                    if min_p[i] > T.float32(0):
                        for v in T.serial(vocab):
                            if weights[i, v] < min_p[i]:
                                weights[i, v] = T.float32(0)

                    # Philox4x32-10
                    counter[0] = T.Cast("uint32", draws[i])
                    for j in T.serial(3):
                        counter[j + 1] = T.uint32(0)
                    key[0] = _low(T.Cast("uint64", seeds[i]))
                    key[1] = _high(T.Cast("uint64", seeds[i]))
                    for _ in T.serial(10):
                        product[0] = _product(counter[0], m0)
                        product[1] = _product(counter[2], m1)
                        counter[0] = _high(product[1]) ^ counter[1] ^ key[0]
                        counter[1] = _low(product[1])
                        counter[2] = _high(product[0]) ^ counter[3] ^ key[1]
                        counter[3] = _low(product[0])
                        key[0] = key[0] + T.uint32(_WEYL[0])
                        key[1] = key[1] + T.uint32(_WEYL[1])

                    mass[0] = T.float32(0)
                    for v in T.serial(vocab):
                        mass[0] = mass[0] + weights[i, v]
                    target[0] = T.Cast("float32", counter[0] >> T.uint32(8)) * T.float32(2.0**-24) * mass[0]
                    mass[0] = T.float32(0)
                    kept[0] = 0  # 1 once the draw has been made
                    for v in T.serial(vocab):
                        if kept[0] == 0 and weights[i, v] > T.float32(0):
                            best[0] = T.Cast("int32", v)  # stays the last kept token should rounding use up the mass
                            mass[0] = mass[0] + weights[i, v]
                            if mass[0] > target[0]:
                                kept[0] = 1

                ids[i] = best[0]
                logprobs[i] = logits[i, best[0]] - log_total[0]

    return sample
