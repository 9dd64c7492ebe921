"""The whole way, in fresh processes: the real SmolLM2 compiled, inspected, verified and asked."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.weights

MODEL = "smollm2-135m"
QUESTION = "What is the capital of France?"


def tilewright(*arguments: str, stdin: str = "", **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tilewright", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=540, **options)


def answer(artifact: Path | str, *arguments: str, **options) -> dict:
    result = tilewright("generate", str(artifact), "--json", *arguments, **options)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    path = tmp_path_factory.mktemp("artifact") / "smollm2.tw"
    return path, tilewright("compile", MODEL, "-o", str(path))


@pytest.fixture(scope="module")
def artifact(compiled) -> Path:
    path, result = compiled
    assert result.returncode == 0, result.stderr
    return path


def test_compile_says_what_it_made(compiled):
    path, result = compiled
    assert result.returncode == 0, result.stderr
    assert "passes: " in result.stderr and "kernels compiled: " in result.stderr
    assert result.stdout.startswith(f"{path}\n")
    for row in ("size", "kernels", "floor", "warnings"):
        assert f"\n{row} " in result.stdout


def test_generate_answers(artifact):
    result = tilewright("generate", str(artifact), "--prompt", QUESTION, "--max-tokens", "40")
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert "tokens in" in result.stderr and "Paris" not in result.stderr


def test_json_agrees_with_the_stream_and_with_stdin(artifact):
    arguments = ("--max-tokens", "24")
    given = answer(artifact, "--prompt", QUESTION, *arguments)
    streamed = tilewright("generate", str(artifact), "--prompt", QUESTION, *arguments)
    piped = answer(artifact, "--prompt", "-", *arguments, stdin=QUESTION + "\n")
    assert streamed.stdout == given["text"] + "\n"
    assert piped["token_ids"] == given["token_ids"]
    assert given["completion_tokens"] == len(given["token_ids"]) <= 24
    assert given["finish_reason"] in ("stop", "length")
    assert all(given["timings"][name] > 0 for name in ("load_s", "ttft_ms", "itl_ms"))


def test_a_seed_repeats_and_another_does_not(artifact):
    arguments = ("--prompt", "Tell me a story.", "--temperature", "1.0", "--max-tokens", "24")
    first, again, other = (answer(artifact, *arguments, "--seed", seed)["token_ids"] for seed in ("7", "7", "8"))
    assert first == again != other


def test_logprobs_come_with_alternatives(artifact):
    result = answer(artifact, "--prompt", QUESTION, "--max-tokens", "4", "--logprobs", "3")
    assert len(result["logprobs"]) == result["completion_tokens"]
    for each, token in zip(result["logprobs"], result["token_ids"], strict=True):
        assert each["token_id"] == token == each["top"][0]["token_id"]  # greedy
        assert 0 >= each["logprob"] == each["top"][0]["logprob"] >= each["top"][1]["logprob"]


def test_raw_continues_the_text(artifact):
    text = answer(artifact, "--raw", "--prompt", "1, 2, 3, 4, 5, 6, 7,", "--max-tokens", "6")["text"]
    assert text.startswith(" 8, 9")


def test_threads_change_no_token(artifact):
    arguments = ("--prompt", QUESTION, "--max-tokens", "16")
    one, two = (answer(artifact, *arguments, "--threads", n)["token_ids"] for n in ("1", "2"))
    assert one == two


def test_chat_remembers(artifact):
    turns = "My name is Ada. Say hello.\nWhat is my name?\n/exit\n"
    result = tilewright("chat", str(artifact), "--max-tokens", "40", stdin=turns)
    assert result.returncode == 0, result.stderr
    assert "Ada" in result.stdout.splitlines()[-1]


def test_a_moved_artifact_runs(artifact, tmp_path):
    before = answer(artifact, "--prompt", QUESTION, "--max-tokens", "8")["token_ids"]
    moved = artifact.rename(tmp_path / "elsewhere")
    try:
        assert answer(moved, "--prompt", QUESTION, "--max-tokens", "8", cwd=tmp_path)["token_ids"] == before
    finally:
        moved.rename(artifact)


def test_inspect_shows_kernels_and_memory(artifact):
    result = tilewright("inspect", str(artifact))
    assert result.returncode == 0, result.stderr
    for text in ("\ntarget ", "\nlimits ", "Kernels\n", "linear", "Memory\n", "weights ", "KV cache"):
        assert text in result.stdout


def test_verify_finds_every_layer_close(artifact):
    result = tilewright("verify", str(artifact))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "worst layer: " in result.stdout


def test_bench_appends_its_result(artifact, tmp_path):
    file = tmp_path / "results.jsonl"
    result = tilewright("bench", str(artifact), "latency", "--output", str(file))
    assert result.returncode == 0, result.stderr
    [line] = map(json.loads, file.read_text().splitlines())
    assert line["model"] and all(row["tokens/s"] > 0 and 0 < row["of floor"] < 1.5 for row in line["rows"])


def test_generate_on_a_model_compiles_once(tmp_path):
    environment = os.environ | {"TILEWRIGHT_CACHE_DIR": str(tmp_path)}
    arguments = ("generate", MODEL, "--prompt", QUESTION, "--max-tokens", "4")
    first = tilewright(*arguments, env=environment)
    second = tilewright(*arguments, env=environment)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout == second.stdout != ""
    assert "is not compiled for this machine yet" in first.stderr
    assert "compil" not in second.stderr


def test_an_interrupted_compile_leaves_nothing_and_resumes(tmp_path):
    environment = os.environ | {"TILEWRIGHT_CACHE_DIR": str(tmp_path / "cache")}
    path = tmp_path / "out" / "model.tw"
    command = [sys.executable, "-m", "tilewright", "compile", MODEL, "-o", str(path)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    kernels = tmp_path / "cache" / "kernels"
    deadline = time.monotonic() + 300
    while not list(kernels.glob("*.o")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == "interrupted" and "Traceback" not in error
    assert list(path.parent.iterdir()) == []
    kept = {file.name for file in kernels.glob("*.o")}
    assert kept
    result = tilewright("compile", MODEL, "-o", str(path), env=environment)
    assert result.returncode == 0, result.stderr
    assert kept <= {file.name for file in kernels.glob("*.o")}


def test_serving_maps_no_compiler_and_no_torch(artifact):
    script = (
        "import sys, tilewright\n"
        "model = tilewright.load(sys.argv[1])\n"
        "engine = tilewright.Engine(model)\n"
        "[done] = engine.generate(['Hello'], tilewright.SamplingParams(max_tokens=4, temperature=0))\n"
        "assert len(done.token_ids) <= 4\n"
        "assert model.logits([1, 2, 3]).shape == (3, model.limits.vocab_size)\n"
        "print(open('/proc/self/maps').read())\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(artifact)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "libtvm_runtime" in result.stdout
    assert [name for name in ("libtvm_compiler", "libtorch", "libcuda", "libnvrtc") if name in result.stdout] == []
