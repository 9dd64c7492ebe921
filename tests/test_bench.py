"""The benchmark's tables of cases, its lines of results and its command line; nothing is timed here."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "run.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_result_is_a_line_with_median_spread_and_what_was_run_on(tmp_path: Path) -> None:
    from cases import CPU_CASES
    from results_file import Results, about

    file = tmp_path / "new" / "results.jsonl"
    results = Results(file, CPU_CASES, about("abc1234", "a device", threads=2))
    results.add("decode-4", "tilewright", [3.0, 1.0, 2.0], note="n")
    results.add("decode-4", "llama_cpp", [6.0])
    first, second = map(json.loads, file.read_text().splitlines())
    assert (first["case"], first["engine"], first["unit"]) == ("decode-4", "tilewright", "ms")
    assert (first["median"], first["spread"], first["samples"], first["note"]) == (2.0, [1.0, 3.0], 3, "n")
    assert (first["commit"], first["device"], first["threads"]) == ("abc1234", "a device", 2)
    assert {"python", "apache-tvm"} <= first["versions"].keys()
    assert second["engine"] == "llama_cpp"


def test_a_ratio_above_one_is_better_whatever_the_unit(tmp_path: Path) -> None:
    from cases import CPU_CASES
    from results_file import Results

    results = Results(tmp_path / "r.jsonl", CPU_CASES, {})
    for case, ours, theirs in (("decode-4", 1.0, 2.0), ("streams-1", 20.0, 10.0)):
        results.add(case, "tilewright", [ours])
        results.add(case, "llama_cpp", [theirs])
        assert results.ratio(case) == 2.0


def test_the_commit_is_the_checkouts_where_none_is_given() -> None:
    from results_file import about

    assert about(None, "a device")["commit"].rstrip("+").isalnum()


def test_kernel_cases_are_the_tables() -> None:
    from cases import DECODES, KERNEL_CASES, PREFILLS, chosen

    names = [case.name for case in chosen(None)]
    assert len(names) == len(set(names)) == 4 * 9 + 6 + 9 + len(DECODES) + len(PREFILLS) + 1
    assert all(name == case.name for name, case in KERNEL_CASES.items())
    assert {case.table for case in chosen(["qkv-*"])} == {
        "linears, M up to 64",
        "linears, M 128 to 512",
        "linears, M 2048 and 8192",
    }
    assert [case.name for case in chosen(["decode-1x*", "o-1"])] == ["o-1", *(f"decode-1x{n}" for _, n in DECODES[:3])]
    assert chosen(["lm_head-4"])[0].shape.out_dtype == "float32"


def test_an_unknown_case_is_named() -> None:
    for words in (["--suite", "kernels", "--only", "qkv-3"], ["a.tw", "--only", "qkv-3"]):
        result = bench(*words)
        assert result.returncode and "no case is named 'qkv-3'" in result.stderr


def test_suites_of_models_need_an_artifact() -> None:
    result = bench("--suite", "model")
    assert result.returncode == 2 and "name one" in result.stderr


def test_a_step_counts_what_it_cannot_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from cases import AttentionShape
    from gpu_attention import Step

    decode = Step(AttentionShape(64, 1024), decode=True)
    assert (decode.tokens, decode.pages, decode.layers) == (64, 64, 2)
    assert decode.cache_bytes == 64 * 1024 * 2 * 8 * 128 * 2
    assert decode.operations == 64 * 1024 * 4 * 32 * 128
    prefill = Step(AttentionShape(2, 512), decode=False)
    assert prefill.tokens == 1024
    assert prefill.operations == 2 * (512 * 513 // 2) * 4 * 32 * 128


def test_floors_take_the_tighter_ceiling() -> None:
    pytest.importorskip("torch")
    from gpu_timing import Ceilings

    ceilings = Ceilings(bytes_s=1e12, operations_s=1e15)
    assert ceilings.floor_us(10**6, 10**6) == pytest.approx(1.0)
    assert ceilings.floor_us(10**6, 10**10) == pytest.approx(10.0)


def test_results_are_measured_against_references_not_just_on_average() -> None:
    torch = pytest.importorskip("torch")
    from gpu_work import distance

    right = torch.ones(1000)
    assert distance(right, right) == 0
    wrong = right.clone()
    wrong[7] = 1.5
    assert distance(wrong, right) == pytest.approx(0.5)
    wrong[7] = float("nan")
    assert not distance(wrong, right) <= 1


def test_draws_are_counted_by_rank() -> None:
    torch = pytest.importorskip("torch")
    from cases import SampleShape
    from gpu_sampling import MOST_ERROR, frequency_error, kept

    torch.manual_seed(0)
    logits = torch.randn(64, 40)
    probabilities = kept(logits, SampleShape(64, 40, 10, 0.8))
    assert probabilities.sum(-1).allclose(torch.ones(64))
    assert ((probabilities > 0).sum(-1) <= 10).all()
    true = frequency_error(lambda i: probabilities.multinomial(1)[:, 0], probabilities)
    assert true < MOST_ERROR
    assert frequency_error(lambda i: probabilities.argmax(-1), probabilities) > MOST_ERROR
    assert frequency_error(lambda i: logits.argmin(-1), probabilities) == float("inf")


def test_a_mixed_step_is_one_that_the_executor_takes() -> None:
    from gpu_step import MIXED, mixed_batch

    from tests.runtime.fake import FakeModel
    from tests.runtime.fake_cuda import fake_executor
    from tilewright.compiler.composites import SAMPLING_INPUTS, STEP_INPUTS
    from tilewright.runtime.types import DeviceLimits

    limits = DeviceLimits(256, 64, 128, page_size=16, num_pages=400, vocab_size=50, top_logprobs=3)
    batch = mixed_batch(limits)
    assert len(batch.tokens) == MIXED and len(batch.rows) == len(batch.kv_len) == 33
    for name, (shape, dtype) in (STEP_INPUTS | SAMPLING_INPUTS).items():
        array = getattr(batch, name)
        assert str(array.dtype) == dtype and array.ndim == 1, name
        known = {"t": 64, "b": 33, "r": 33, "b+1": 34, "r+1": 34}.get(shape)
        assert known in (None, len(array)), name
    assert len(set(batch.slots.tolist())) == MIXED, "two tokens of one slot"
    pages = batch.page_indices[np.repeat(batch.page_indptr[:-1], np.diff(batch.indptr)) + batch.positions // 16]
    assert (batch.slots == pages * 16 + batch.positions % 16).all()
    executor, _ = fake_executor(limits, FakeModel(limits))
    executor.launch(batch)


def test_chat_lengths_have_their_mean() -> None:
    from bench.gpu_model import CHAT_MOST, chat_lengths

    lengths = chat_lengths(np.random.default_rng(1), 186, 1000)
    assert lengths.mean() == pytest.approx(186, abs=1) and lengths.min() >= 4 and lengths.max() == CHAT_MOST
    assert np.median(lengths) < 150


def test_a_steps_time_is_that_of_full_steps() -> None:
    """Prompts, ten steps of four streams in which a stream's end shows, and a mark between two counts."""
    from bench.gpu_model import full_steps

    marks = [(0.0, 1, 512), (0.1, 2, 1024)]
    marks += [(1 + 0.01 * i, 3 + i, 1024 + 4 * (i + 1)) for i in range(40)]
    marks.insert(20, (1.175, 21, 1024 + 4 * 18))  # the step is counted, its tokens not yet
    marks += [(5.0 + i, 43 + i, 1024 + 160 + 3 * (i + 1)) for i in range(20)]
    first, last = full_steps(marks, 4)
    assert (first[1], last[1]) == (6, 42)
    assert (last[0] - first[0]) / (last[1] - first[1]) == pytest.approx(0.01)
    with pytest.raises(SystemExit, match="no 16 steps of 7 streams"):
        full_steps(marks, 7)


def test_the_peers_server_needs_the_models_file() -> None:
    result = bench("a.tw", "--suite", "serving", "--only", "chats-peer", "--peer-python", "python")
    assert result.returncode == 2 and "give --gguf and --peer-python" in result.stderr


def test_a_streams_client_finds_events_and_their_times_in_reads_of_any_size() -> None:
    from serving_client import Stream, read

    texts = ["a", "\n\n", "ü", "data: ", '"']
    events = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
    events += [{"choices": [{"delta": {"content": text}}]} for text in texts]
    events.append({"choices": [{"delta": {}}]})
    lines = [f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode() for event in events] + [b"data: [DONE]\n\n"]
    whole = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    ends = []
    for line in lines:
        whole += b"%x\r\n%b\r\n" % (len(line), line)
        ends.append(len(whole))
    for size in (1, 7, 100, len(whole)):
        reads = [(float(min(at + size, len(whole))), whole[at : at + size]) for at in range(0, len(whole), size)]
        said = read(Stream(None, 0.0, reads))
        assert said.text == "".join(texts) and said.tokens == len(texts)
        assert said.times == [min(-(-end // size) * size, len(whole)) for end in ends[1:-2]]


def test_a_streams_client_takes_no_broken_answer() -> None:
    from serving_client import Stream, read

    for answer, words in (
        (b"HTTP/1.1 503 No\r\n\r\n{}", "refuses"),
        (b"HTTP/1.1 200 OK\r\n\r\n0\r\n\r\n", "broke off"),
    ):
        with pytest.raises(SystemExit, match=words):
            read(Stream(None, 0.0, [(0.0, answer)]))


def test_servers_that_say_different_things_are_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    from serving_peer import check_alike

    check_alike(["Once upon a time", "b"], ["once, upon a mountain", "c"])
    assert "50%" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0% of the answers alike"):
        check_alike(["a", "b"], ["c", "d"])
