"""The whole way, in fresh processes: the real SmolLM2 compiled, inspected, verified and asked."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.server.processes import client, serving
from tilewright import Engine, SamplingParams, load
from tilewright.compiler import env
from tilewright.compiler.artifact import Artifact

pytestmark = pytest.mark.weights

MODEL = "smollm2-135m"
QUESTION = "Name the capital of France."  # not a close call for the model, as other wordings are
FIELDS = {"text", "token_ids", "prompt_tokens", "completion_tokens", "finish_reason", "timings"}


def tilewright(*arguments: str, stdin: str = "", **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tilewright", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=540, **options)


def answer(artifact: Path | str, *arguments: str, **options) -> dict:
    """The object that --json prints; its fields are these and no others, and its times are possible ones."""
    begun = time.perf_counter()
    result = tilewright("generate", str(artifact), "--json", *arguments, **options)
    elapsed_s = time.perf_counter() - begun
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert set(said) - {"logprobs"} == FIELDS and ("logprobs" in said) == ("--logprobs" in arguments)
    assert list(said["timings"]) == ["load_s", "ttft_ms", "itl_ms"]
    load_s, ttft_ms, itl_ms = said["timings"].values()
    assert min(load_s, ttft_ms, itl_ms) > 0
    assert load_s + (ttft_ms + (len(said["token_ids"]) - 1) * itl_ms) / 1e3 < elapsed_s
    return said


@pytest.fixture(scope="module")
def artifact(smollm2: Path) -> Path:
    return smollm2


@pytest.fixture(scope="module")
def small(tmp_path_factory, compile_tiny) -> tuple[Path, Path]:
    """A checkpoint and its artifact, for what takes the real model long."""
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("model"), "llama")
    return checkpoint, compile_tiny(checkpoint)


@pytest.fixture(scope="module")
def given(artifact) -> dict:
    """The answer to the question."""
    return answer(artifact, "--prompt", QUESTION, "--max-tokens", "24")


def test_compile_says_what_it_made(small, tmp_path):
    checkpoint, artifact = small
    path = tmp_path / "again.tw"
    result = tilewright("compile", str(checkpoint), "-o", str(path), "--max-batch", "4", "--max-tokens", "64")
    assert result.returncode == 0, result.stderr
    assert "passes: " in result.stderr and "kernels compiled: " in result.stderr
    assert result.stdout.startswith(f"{path}\n")
    for row in ("size", "kernels", "floor", "warnings"):
        assert f"\n{row} " in result.stdout
    assert Artifact.open(path).manifest == Artifact.open(artifact).manifest  # every file's checksum is in it


def test_generate_on_a_model_compiles_once(artifact, tmp_path):
    """In a cache of its own, but for the kernels, which the artifact has left; what it makes is the same again."""
    (tmp_path / "kernels").symlink_to(env.cache_dir() / "kernels")
    environment = os.environ | {env.CACHE_DIR: str(tmp_path)}
    arguments = ("generate", MODEL, "--prompt", QUESTION, "--max-tokens", "4")
    first = tilewright(*arguments, env=environment)
    second = tilewright(*arguments, env=environment)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout == second.stdout != ""
    assert "is not compiled for this machine yet" in first.stderr
    assert "compil" not in second.stderr
    [made] = (tmp_path / "artifacts").glob("*/manifest.json")
    assert Artifact.open(made.parent).manifest == Artifact.open(artifact).manifest


def test_json_agrees_with_the_stream_and_with_stdin(artifact, given):
    arguments = ("--max-tokens", "24")
    streamed = tilewright("generate", str(artifact), "--prompt", QUESTION, *arguments)
    assert streamed.returncode == 0, streamed.stderr
    assert "Paris" in streamed.stdout
    assert "tokens in" in streamed.stderr and "Paris" not in streamed.stderr
    piped = answer(artifact, "--prompt", "-", *arguments, stdin=QUESTION + "\n")
    assert streamed.stdout == given["text"] + "\n"
    assert piped["token_ids"] == given["token_ids"]
    assert given["completion_tokens"] == len(given["token_ids"]) <= 24
    assert given["finish_reason"] in ("stop", "length")


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


@pytest.mark.parametrize("threads", ["1", "2"])
def test_threads_change_no_token(artifact, given, threads):
    arguments = ("--prompt", QUESTION, "--max-tokens", "24", "--threads", threads)
    assert answer(artifact, *arguments)["token_ids"] == given["token_ids"]


def test_chat_remembers(artifact):
    """The second answer is the one to the whole conversation, which is another than to the question alone."""
    first, second = "My name is Ada. Say hello.", "What is my name?"
    result = tilewright("chat", str(artifact), "--max-tokens", "40", stdin=f"{first}\n{second}\n/exit\n")
    assert result.returncode == 0, result.stderr
    params = SamplingParams(temperature=0, max_tokens=40)
    with Engine(load(artifact)) as engine:
        messages = [{"role": "user", "content": first}]
        [hello] = engine.generate([messages], params)
        messages += [{"role": "assistant", "content": hello.text}, {"role": "user", "content": second}]
        told, untold = engine.generate([messages, messages[-1:]], params)
    assert result.stdout == f"{hello.text}\n{told.text}\n"
    assert told.text != untold.text


def test_a_copied_artifact_runs(artifact, given, tmp_path):
    copy = shutil.copytree(artifact, tmp_path / "elsewhere")
    arguments = ("--prompt", QUESTION, "--max-tokens", "8")
    assert answer(copy, *arguments, cwd=tmp_path)["token_ids"] == given["token_ids"][:8]


def test_inspect_shows_kernels_and_memory(artifact):
    result = tilewright("inspect", str(artifact))
    assert result.returncode == 0, result.stderr
    for text in ("\ntarget ", "\nlimits ", "Kernels\n", "linear", "Memory\n", "weights ", "KV cache"):
        assert text in result.stdout


def test_verify_finds_every_layer_close(artifact):
    result = tilewright("verify", str(artifact))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "worst layer: " in result.stdout


@pytest.mark.parametrize("kind", ["latency", "throughput"])
def test_bench_appends_its_result(small, tmp_path, kind):
    _, artifact = small
    file = tmp_path / "results.jsonl"
    result = tilewright("bench", str(artifact), kind, "--output", str(file))
    assert result.returncode == 0, result.stderr
    [line] = map(json.loads, file.read_text().splitlines())
    assert line["kind"] == kind and line["model"] and all(row["tokens/s"] > 0 for row in line["rows"])
    assert all(0 < row["first token ms"] < 60_000 for row in line["rows"] if kind == "latency")


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


def test_serve_says_what_the_engine_says_and_outlives_its_files(artifact, tmp_path):
    question = [{"role": "user", "content": QUESTION}]
    copy = tmp_path / "copy.tw"
    shutil.copytree(artifact, copy)
    with Engine(load(artifact)) as engine:
        [expected] = engine.generate([question], SamplingParams(temperature=0, max_tokens=30))
    begun = time.monotonic()
    with serving(f"smol={copy}", program=("-m", "tilewright")) as process, client(process) as ask:
        assert time.monotonic() - begun < 10
        copy.rename(tmp_path / "old.tw")
        copy.mkdir()
        (copy / "manifest.json").write_text("{}")
        answer = ask.chat.completions.create(model="smol", messages=question, temperature=0, max_tokens=30)
        assert answer.choices[0].message.content == expected.text and "Paris" in expected.text
        assert answer.usage.completion_tokens == len(expected.token_ids)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
