"""Measuring on a GPU, with a stand-in for it: what is copied, launched, captured and timed, and how errors come out."""

from pathlib import Path

import pytest

from tests.stand_in_cuda import run_with_stand_in
from tilewright.compiler.calls import Call
from tilewright.compiler.composites import NormSpec
from tilewright.compiler.targets import RECORDS
from tilewright.schedules.cuda.rms_norm import RMSNorm
from tilewright.tuner.candidates import Candidate, compile_lowering

TARGET, CALL = RECORDS["nvidia-h100"], Call("rms_norm", NormSpec(64, 1e-5, "bfloat16"), None, 41)


@pytest.fixture(scope="module")
def candidate() -> Candidate:
    schedule = RMSNorm()
    facts = schedule.match(CALL, TARGET)
    return compile_lowering(schedule.apply(facts, schedule.space(facts, TARGET)[0], TARGET), TARGET)


def begin(candidate: Candidate) -> str:
    return f"""
import numpy as np
from tilewright.compiler.calls import Call
from tilewright.compiler.composites import NormSpec
from tilewright.schedules.base import Output
from tilewright.tuner import measuring
from tilewright.tuner.candidates import Candidate, Failure, Launch
from tilewright.tuner.device_cuda import CudaDevice
from tilewright.tuner.problems import Problem
candidate = {candidate!r}
problem = Problem("rms_norm", {CALL.spec!r}, 41, (), False, 1)
"""


def test_a_candidate_is_loaded_launched_and_timed(candidate: Candidate, tmp_path: Path) -> None:
    ran = run_with_stand_in(
        begin(candidate)
        + """
device = CudaDevice()
array = np.arange(12, dtype=np.int32).reshape(3, 4)
held = device.upload(array)
told["round_trip"] = bool((device.download(held) == array).all())
device.refill(held, array + 1)
told["refilled"] = bool((device.download(held) == array + 1).all())
bench = measuring._Bench(device, problem)
told["copies"] = len(bench._copies)
told["spread"] = sum(c[0].memory.size for c in bench._copies)
try:
    bench.measure(candidate, candidate)
except measuring.Wrong as wrong:
    told["wrong"] = str(wrong)
before = launches()
Problem.complaint = lambda *_: ""  # the stand-in computes nothing
timing = bench.measure(candidate, candidate)
told["us"] = timing.us
told["launched"] = launches() - before
""",
        tmp_path,
    )
    told = ran.told
    assert told["round_trip"] and told["refilled"]
    assert told["copies"] == 512  # of few bytes each
    assert told["wrong"] == "y is off by nan, more than 0.006"
    # Once for the check, three times before the clock and as often as a graph has calls: once for each copy.
    assert told["launched"] == 1 + 3 + 512
    assert told["us"] == pytest.approx(1000 / 512, abs=1e-4)  # the stand-in's events are a millisecond apart
    assert "tvm" not in ran.modules and "torch" not in ran.modules
    assert "libtvm_compiler" not in ran.maps


def test_an_error_of_the_device_ends_the_process_with_an_answer(candidate: Candidate, tmp_path: Path) -> None:
    """No memory is one kind; anything else that a call reports is a crash."""
    ran = run_with_stand_in(
        begin(candidate)
        + """
from tilewright.runtime.types import DeviceError
import os
answers, ended = [], []
os._exit = ended.append
measuring.serve = lambda answer: [answers.append(answer(request)) for request in requests]
requests = [measuring.Request("cuda", problem, candidate, candidate)] * 2
errors = iter([DeviceError("cudaMalloc failed on the GPU: out of memory (cudaErrorMemoryAllocation)"),
               DeviceError("cudaStreamSynchronize failed on the GPU: an illegal memory access was encountered")])
def failing(self, *arguments):
    raise next(errors)
measuring._Bench.measure = failing
measuring.main()
import time
time.sleep(0.5)
told["answers"] = [[a.kind, a.detail] for a in answers]
told["ended"] = ended
""",
        tmp_path,
    )
    [memory, crash] = ran.told["answers"]
    assert memory[0] == "memory" and "out of memory" in memory[1]
    assert crash[0] == "crash" and "illegal memory access" in crash[1]
    assert ran.told["ended"] == [1, 1]
