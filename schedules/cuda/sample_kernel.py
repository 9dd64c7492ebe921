"""The kernel of the sampler on a GPU: a cluster of thread blocks a row, or one block where there are no clusters.

A row's logits are read from memory once and stay in the shared memory of the cluster, each block with a slice of the
tokens, or in a scratch output where they do not fit. Blocks exchange a few words for every reduction. What is done
depends on the row's own settings alone, and every sum has one order: so do a row's bits.

With a small top-k the blocks send their largest tokens to the first one, which filters and draws from those few. Other
filters find their thresholds in passes over the whole row.
"""

from typing import Any

from tvm.script import tirx as T
from tvm.tirx.cuda.lang import SMEMPool

from tilewright.compiler.composites import SampleSpec
from tilewright.compiler.targets.base import Target
from tilewright.schedules.base import deferred
from tilewright.schedules.cuda.cluster_gather import ClusterGather
from tilewright.schedules.cuda.launch import chained
from tilewright.schedules.cuda.sample_alternatives import Alternatives
from tilewright.schedules.cuda.sample_candidates import BOUND, COUNT, FIRST, LARGEST, MASS, MOST, PEAK, Candidates
from tilewright.schedules.cuda.sample_draw import ShortDraw, WholeDraw
from tilewright.schedules.cuda.sample_math import LOWEST, LOWEST_KEY, exp, key, key_value
from tilewright.schedules.cuda.sample_row import Row, RowLayout, warp_largest, warp_lowest, warp_sum
from tilewright.schedules.cuda.sample_settings import Settings
from tilewright.schedules.cuda.sample_threshold import Threshold

_MINUS_INFINITY_KEY = 0x007FFFFF


@deferred
def sample_kernel(spec: SampleSpec, layout: RowLayout, resident: bool, blocks_per_sm: int, target: Target) -> Any:
    """(logits f32[m,V], SAMPLING_INPUTS..., ids i32[m], logprobs f32[m], top_ids i32[m,L], top_logprobs f32[m,L]), and
    unless resident (..., scores f32[m, cluster * slice]); a resident one takes any one float in its place."""
    vocab, top = spec.vocab, spec.top_logprobs
    cluster, threads, warps = layout.cluster, layout.threads, layout.warps
    pdl = target.has("pdl")

    @T.prim_func
    def kernel(
        logits_ptr: T.handle,
        temperature_ptr: T.handle,
        top_k_ptr: T.handle,
        top_p_ptr: T.handle,
        min_p_ptr: T.handle,
        repetition_ptr: T.handle,
        presence_ptr: T.handle,
        frequency_ptr: T.handle,
        seeds_ptr: T.handle,
        draws_ptr: T.handle,
        penalty_indptr_ptr: T.handle,
        penalty_tokens_ptr: T.handle,
        penalty_counts_ptr: T.handle,
        bias_indptr_ptr: T.handle,
        bias_tokens_ptr: T.handle,
        bias_values_ptr: T.handle,
        wanted_ptr: T.handle,
        ids_ptr: T.handle,
        logprobs_ptr: T.handle,
        top_ids_ptr: T.handle,
        top_logprobs_ptr: T.handle,
        scores_ptr: T.handle,
    ):
        T.func_attr({"global_symbol": "sample"})
        m = T.int32()
        c = T.int32()
        e = T.int32()
        logits = T.match_buffer(logits_ptr, (m, vocab), "float32")
        temperatures = T.match_buffer(temperature_ptr, (m,), "float32")
        top_ks = T.match_buffer(top_k_ptr, (m,), "int32")
        top_ps = T.match_buffer(top_p_ptr, (m,), "float32")
        min_ps = T.match_buffer(min_p_ptr, (m,), "float32")
        repetitions = T.match_buffer(repetition_ptr, (m,), "float32")
        presences = T.match_buffer(presence_ptr, (m,), "float32")
        frequencies = T.match_buffer(frequency_ptr, (m,), "float32")
        seeds = T.match_buffer(seeds_ptr, (m,), "int64")
        draws = T.match_buffer(draws_ptr, (m,), "int32")
        penalty_indptr = T.match_buffer(penalty_indptr_ptr, (m + 1,), "int32")
        penalty_tokens = T.match_buffer(penalty_tokens_ptr, (c,), "int32")
        penalty_counts = T.match_buffer(penalty_counts_ptr, (c,), "int32")
        bias_indptr = T.match_buffer(bias_indptr_ptr, (m + 1,), "int32")
        bias_tokens = T.match_buffer(bias_tokens_ptr, (e,), "int32")
        bias_values = T.match_buffer(bias_values_ptr, (e,), "float32")
        wanted_counts = T.match_buffer(wanted_ptr, (m,), "int32")
        ids = T.match_buffer(ids_ptr, (m,), "int32")
        logprobs = T.match_buffer(logprobs_ptr, (m,), "float32")
        top_ids = T.match_buffer(top_ids_ptr, (m, top), "int32")
        top_logprobs = T.match_buffer(top_logprobs_ptr, (m, top), "float32")
        scratch = T.match_buffer(scores_ptr, (1,) if resident else (m, cluster * layout.slice), "float32")
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": blocks_per_sm})
        block = T.cta_id([m * cluster])
        rank = T.cta_id_in_cluster([cluster])
        thread = T.thread_id([threads])
        line: T.let = T.cast(block // cluster, "int64")
        pool = SMEMPool()
        if resident:
            scores = pool.alloc((layout.slice,), "float32", align=128)
            row = Row(layout, scores, (), rank, thread)
        else:
            row = Row(layout, scratch, (line, rank * layout.slice), rank, thread)
        words = ClusterGather(pool, cluster, rank, thread)
        candidates = Candidates(pool, row, rank)
        threshold = Threshold(pool, row, words)
        whole_draw = WholeDraw(pool, row, words)
        short_draw = ShortDraw(candidates)
        alternatives = Alternatives(pool, row, words, candidates)
        settings = Settings(pool, thread)
        warp_words = pool.alloc((4, warps), "float32", align=16)
        pool.commit()
        words.init()
        candidates.init()
        if cluster > 1:
            T.ptx["fence.mbarrier_init.release.cluster"]()
            T.cuda.cta_sync()
            T.ptx["barrier.cluster.arrive.release.aligned"]()
        if pdl:
            T.ptx["griddepcontrol.launch_dependents"]()
            T.ptx["griddepcontrol.wait"]()
        settings.fetch(
            (temperatures[line], top_ps[line], min_ps[line], repetitions[line], presences[line], frequencies[line]),
            (
                top_ks[line],
                T.min(wanted_counts[line], top),
                penalty_indptr[line],
                penalty_indptr[line + 1],
                bias_indptr[line],
                bias_indptr[line + 1],
            ),
            seeds[line],
            draws[line],
        )
        peak = T.alloc_local([1], "float32")  # the thread's largest
        raw = T.alloc_local([2], "float32")  # the same of the logits, and its sum of e^(x - that)
        mass = T.alloc_local([1], "float32")
        largest = T.alloc_local([1], "float32")
        token = T.alloc_local([1], "int32")
        log_total: T.float32
        crowded: T.int32

        @T.inline
        def tell_log_sum():
            """The first warp sends the block's PEAK and MASS, COUNT and BOUND."""
            largest[0] = raw[0]
            warp_largest(largest)
            mass[0] = raw[1] * exp(raw[0] - largest[0])
            warp_sum(mass, 0)
            if row.lane == 0:
                warp_words[0, row.warp] = largest[0]
                warp_words[1, row.warp] = mass[0]
            T.cuda.cta_sync()
            if thread == 0:
                largest[0] = warp_words[0, 0]
                for w in T.unroll(warps - 1):
                    largest[0] = T.max(largest[0], warp_words[0, w + 1])
                mass[0] = T.float32(0)
                for w in T.unroll(warps):
                    mass[0] = mass[0] + warp_words[1, w] * exp(warp_words[0, w] - largest[0])
                words.send(PEAK, largest[0])
                words.send(MASS, mass[0])
                words.send(COUNT, candidates.counter[0])
                words.send(BOUND, candidates.low[0])

        @T.inline
        def hear_log_sum():
            """log_total, and crowded: whether a block has more candidates than it can send."""
            largest[0] = words.number(0, PEAK)
            for r in T.unroll(cluster - 1):
                largest[0] = T.max(largest[0], words.number(r + 1, PEAK))
            mass[0] = T.float32(0)
            crowded = 0
            for r in T.unroll(cluster):
                mass[0] = mass[0] + words.number(r, MASS) * exp(words.number(r, PEAK) - largest[0])
                if words.word(r, COUNT) > T.uint32(candidates.part):
                    crowded = 1
            log_total = largest[0] + T.log(mass[0])

        @T.inline
        def list_alternatives():
            candidates.bound(raw[0], T.cast(settings.wanted, "uint32"), _MINUS_INFINITY_KEY)
            candidates.offer(raw[0])
            tell_log_sum()
            words.gather()
            hear_log_sum()
            if rank == 0:
                candidates.receive(words)
            if crowded == 1:
                alternatives.write_whole(logits, line, settings.wanted, log_total, top_ids, top_logprobs)
            else:
                if rank == 0:
                    candidates.raise_bound(words, T.cast(settings.wanted, "uint32"))
                    candidates.keep_largest(words)
                    alternatives.write_short(line, settings.wanted, log_total, top_ids, top_logprobs)
            words.gather()  # no block sends candidates again before the first has done with these

        @T.inline
        def penalise():
            """Every thread changes the tokens that are its own, in the order of the lists."""
            for j in T.serial(settings.bias_end - settings.bias_begin):
                at: T.int32 = bias_tokens[settings.bias_begin + j] - row.first
                if T.And(T.And(at >= 0, at < layout.slice), at % threads == thread):
                    row.change(at, row.score(at) + bias_values[settings.bias_begin + j])
            T.cuda.cta_sync()
            for turn in T.serial((settings.penalty_end - settings.penalty_begin + (threads - 1)) // threads):
                entry: T.int32 = settings.penalty_begin + turn * threads + thread
                if entry < settings.penalty_end:
                    at: T.int32 = penalty_tokens[entry] - row.first
                    if T.And(at >= 0, at < layout.slice):
                        score: T.float32 = row.score(at)
                        if score > T.float32(0):
                            score = score / settings.repetition
                        else:
                            score = score * settings.repetition
                        if penalty_counts[entry] > 0:
                            score = score - settings.presence
                            score = score - settings.frequency * T.cast(penalty_counts[entry], "float32")
                        row.change(at, score)
            T.cuda.cta_sync()

        @T.inline
        def tell_largest():
            """The first warp sends the block's LARGEST, and for a greedy row the FIRST token that has it."""
            largest[0] = peak[0]
            warp_largest(largest)
            if row.lane == 0:
                warp_words[2, row.warp] = largest[0]
            T.cuda.cta_sync()
            largest[0] = warp_words[2, 0]
            for w in T.unroll(warps - 1):
                largest[0] = T.max(largest[0], warp_words[2, w + 1])
            if settings.temperature == T.float32(0):
                token[0] = T.int32(0x7FFFFFFF)
                if peak[0] == largest[0]:
                    row.find(largest[0], token)
                token[0] = warp_lowest(token[0])
                if row.lane == 0:
                    warp_words[3, row.warp] = T.reinterpret("float32", token[0])
                T.cuda.cta_sync()
            if thread == 0:
                words.send(LARGEST, largest[0])
                if settings.temperature == T.float32(0):
                    for w in T.unroll(warps):
                        token[0] = T.min(token[0], T.reinterpret("int32", warp_words[3, w]))
                    words.send(FIRST, token[0])

        @T.inline
        def finish():
            """Of one thread. A row without a finite logit, as in the padding of a batch, gets a token all the same."""
            token[0] = T.max(T.min(token[0], vocab - 1), 0)
            ids[line] = token[0]
            logprobs[line] = logits[line, token[0]] - log_total

        @T.inline
        def take_first():
            token[0] = T.int32(0x7FFFFFFF)
            for r in T.unroll(cluster):
                if words.number(r, LARGEST) == largest[0]:
                    token[0] = T.min(token[0], T.cast(words.word(r, FIRST), "int32"))
            if T.And(rank == 0, thread == 0):
                finish()

        @T.inline
        def draw_from_few():
            candidates.receive(words)
            if crowded == 0:
                candidates.raise_bound(words, T.cast(settings.top_k, "uint32"))
                candidates.keep_largest(words)
                short_draw.sort_by_token(largest[0])
                short_draw.measure()
                short_draw.filter(settings.top_p, settings.min_p)
                short_draw.draw(settings.u, token)
                if thread == 0:
                    finish()

        @T.inline
        def draw_from_all():
            least_score: T.float32 = T.float32(LOWEST)
            least_weight: T.float32 = settings.min_p
            threshold.low[0] = T.uint32(LOWEST_KEY)
            if T.And(settings.top_k > 0, settings.top_k < vocab):
                threshold.high[0] = key(largest[0]) + T.uint32(1)
                threshold.search("count", largest[0], T.cast(settings.top_k, "float32"))
                least_score = key_value(threshold.low[0])
            if settings.top_p < T.float32(1):
                threshold.high[0] = key(largest[0]) + T.uint32(1)
                threshold.total_mass(largest[0], least_score)
                threshold.search("mass", largest[0], settings.top_p * threshold.total)
                least_weight = T.max(least_weight, exp(key_value(threshold.low[0]) - largest[0]))
            whole_draw.draw(settings.u, largest[0], least_score, least_weight, token)
            if T.And(token[0] >= 0, row.lane == 0):
                finish()

        if cluster > 1:
            T.ptx["barrier.cluster.wait.acquire.aligned"]()
        row.load(logits, line, raw)
        peak[0] = raw[0]
        settings.keep()
        T.cuda.cta_sync()
        if settings.wanted > 0:
            list_alternatives()
        changed: T.int32 = 0
        if T.Or(settings.bias_end > settings.bias_begin, settings.penalty_end > settings.penalty_begin):
            changed = 1
        if changed == 1:
            T.cuda.cta_sync()
            penalise()
        if T.And(settings.temperature != T.float32(0), settings.temperature != T.float32(1)):
            row.divide(settings.temperature, peak)
        else:
            if changed == 1:
                row.divide(T.float32(1), peak)
        few: T.int32 = 0
        if T.And(
            settings.temperature != T.float32(0),
            T.And(settings.top_k > 0, T.And(settings.top_k <= MOST, settings.top_k < vocab)),
        ):
            few = 1
            candidates.bound(peak[0], T.cast(settings.top_k, "uint32"), LOWEST_KEY)
            candidates.offer(peak[0])
        tell_largest()
        tell_log_sum()
        words.gather()
        hear_log_sum()
        largest[0] = words.number(0, LARGEST)
        for r in T.unroll(cluster - 1):
            largest[0] = T.max(largest[0], words.number(r + 1, LARGEST))
        if settings.temperature == T.float32(0):
            take_first()
        else:
            if T.And(few == 1, rank == 0):
                draw_from_few()
            if T.Or(few == 0, crowded == 1):
                draw_from_all()

    return chained(kernel, target, cluster=cluster > 1, shared=True)
