"""Kernels on a GPU beside their peers: linears and cuBLAS, attention and sampling and FlashInfer.

    python bench/run.py --suite kernels --prepare build/kernels.pickle          # anywhere
    python bench/run.py --suite kernels --prepared build/kernels.pickle         # on the GPU's machine

What the device reaches is measured first; every line has the floor that follows, in microseconds, and the share of it
that was reached. All variants of a case run on the same numbers, are checked against torch in float32, and then take
turns in CUDA graphs over more memory than the cache holds. A peer's best variant counts. FlashInfer is left out where
it is not installed. What is wrong is not timed, and named when all else is done.
"""

import argparse
import math
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_attention
import gpu_compiled
import gpu_linears
import gpu_sampling
import gpu_timing
import torch
from cases import CEILINGS, KERNEL_CASES, AttentionShape, KernelCase, LinearShape
from gpu_compiled import Compiled
from gpu_timing import Ceilings
from gpu_work import Variant, Work, installed
from results_file import Results, about

HERE = Path(__file__).parent
OURS = "tilewright"


class Wrong(Exception):
    """A result that is not what torch computes in float32."""


def run(args: argparse.Namespace, cases: Sequence[KernelCase]) -> None:
    names = [case.name for case in cases]
    if args.prepare:
        gpu_compiled.write(args.prepare, gpu_compiled.compile_all(names, compile_case))
        return
    found = gpu_compiled.read(args.prepared) if args.prepared else gpu_compiled.compile_all(names, compile_case)
    missing = [name for name in names if name not in found]
    if missing:
        raise SystemExit(f"{args.prepared} has no kernels of {missing[0]}; make it again")
    kernels = {name: found[name] for name in names}
    gpu_compiled.load_all(kernels)
    packages = ["torch", *(["flashinfer-python"] if installed("flashinfer") else [])]
    known = about(args.commit, gpu_timing.device(), packages)
    results = Results(args.results or HERE / "results" / "cuda-kernels.jsonl", CEILINGS | KERNEL_CASES, known)
    suite = Suite(results, args.rounds)
    refused = [problem for case in cases if (problem := suite.try_case(case, kernels[case.name]))]
    suite.print_means()
    if refused:
        raise SystemExit("not timed: " + "; ".join(refused))


def compile_case(name: str) -> Compiled:
    """The kernels of a case. It takes a name since it is called in other processes."""
    shape = KERNEL_CASES[name].shape
    if isinstance(shape, LinearShape):
        return gpu_linears.compile_case(shape)
    if isinstance(shape, AttentionShape):
        return gpu_attention.compile_case(_step(name, shape))
    return gpu_sampling.compile_case(shape)


def make_work(case: KernelCase, kernels: Compiled) -> Work:
    if isinstance(case.shape, LinearShape):
        return gpu_linears.work(case.shape, kernels)
    if isinstance(case.shape, AttentionShape):
        return gpu_attention.work(_step(case.name, case.shape), kernels)
    return gpu_sampling.work(case.shape, kernels)


def _step(name: str, shape: AttentionShape) -> gpu_attention.Step:
    return gpu_attention.Step(shape, decode=name.startswith("decode"))


class Suite:
    """One run: the device's ceilings, then cases, then means of their ratios."""

    def __init__(self, results: Results, rounds: int):
        self._results = results
        self._rounds = rounds
        self._ratios: dict[str, list[float]] = {}
        results.add("read-bandwidth", "torch", gpu_timing.read_rates(rounds))
        results.add("matrix-rate", "cublas", gpu_timing.matrix_rates(rounds))
        medians = results.medians
        self._ceilings = Ceilings(medians["read-bandwidth", "torch"] * 1e12, medians["matrix-rate", "cublas"] * 1e12)

    def try_case(self, case: KernelCase, kernels: Compiled) -> str | None:
        """Checks and times a case. Returns why it was not timed, if so."""
        try:
            self.time_case(case, kernels)
        except Wrong as problem:
            print(problem, flush=True)
            return str(problem)
        except Exception:  # a peer's own, say: the other cases stand
            traceback.print_exc()
            return f"{case.name} failed; the traceback stands above"
        finally:
            torch.cuda.empty_cache()
        return None

    def time_case(self, case: KernelCase, kernels: Compiled) -> None:
        torch.manual_seed(0)
        work = make_work(case, kernels)
        errors = {variant.engine: check(case, variant) for variant in work.variants}
        graphs = {variant.engine: gpu_timing.capture(variant.calls) for variant in work.variants}
        floor_us = self._ceilings.floor_us(work.size_bytes, work.operations)
        apart = self._time_apart(work.variants)
        for engine, samples in gpu_timing.take_turns(graphs, self._rounds).items():
            facts = {"error": float(f"{errors[engine]:.2g}"), **apart.get(engine, {})}
            self._add(case, engine, samples, floor_us, facts)
        self._compare(case, [variant.engine for variant in work.variants])

    def _time_apart(self, variants: Sequence[Variant]) -> dict[str, dict[str, float]]:
        """Microseconds of what a step does once, for those that tell it."""
        graphs = {v.engine: gpu_timing.capture([v.apart]) for v in variants if v.apart is not None}
        times = gpu_timing.take_turns(graphs, 3)
        return {engine: {"once_a_step_us": round(sorted(samples)[1], 2)} for engine, samples in times.items()}

    def _add(self, case: KernelCase, engine: str, samples: list[float], floor_us: float, facts: dict[str, Any]) -> None:
        fraction = floor_us / sorted(samples)[len(samples) // 2]
        self._results.add(case.name, engine, samples, floor_us=round(floor_us, 2), of_floor=round(fraction, 3), **facts)

    def _compare(self, case: KernelCase, engines: Sequence[str]) -> None:
        times = {engine: self._results.medians[case.name, engine] for engine in engines}
        peers = {engine: time for engine, time in times.items() if engine != OURS}
        if peers:
            best = min(peers, key=peers.__getitem__)
            self._ratios.setdefault(case.table, []).append(self._results.ratio(case.name, OURS, best))

    def print_means(self) -> None:
        """The geometric mean of how many times faster than the best peer, by table."""
        for table, ratios in self._ratios.items():
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            print(f"{table}: {mean:.3f} × in the geometric mean of {len(ratios)} (least {min(ratios):.3f})")


def check(case: KernelCase, variant: Variant) -> float:
    """How far its first call is off. Raises Wrong where that is too far."""
    variant.calls[0]()
    torch.cuda.synchronize()
    error = variant.error()
    if not error <= variant.most_error:
        raise SystemExit(
            f"{case.name}: {variant.engine} is off by {error:.2g}, more than {variant.most_error}: not timed"
        )
    return error
