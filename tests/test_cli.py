"""The command line: what each command prints where, on a model that only says the alphabet."""

import io
import json
import os
import re
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest

import tilewright
from tests.cli_runner import make_runner
from tests.fake_model import FakeModel, fake_artifact
from tilewright import cache, console, timing
from tilewright.compiler import build, env
from tilewright.compiler.progress import Progress
from tilewright.compiler.targets import host
from tilewright.progress_display import PlainProgress
from tilewright.runtime import model as runtime_model

REAL_COMPILE = build.compile
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def run(capsys, monkeypatch):
    """run(*arguments, stdin=...) -> (exit code, stdout, stderr)."""
    return make_runner(capsys, monkeypatch)


@pytest.fixture
def loaded(monkeypatch):
    """Every artifact loads as the alphabet model; -> how it was asked for."""
    asked = []

    def load(path, threads):
        asked.append((Path(path), threads))
        return FakeModel()

    monkeypatch.setattr(runtime_model, "load", load)
    return asked


@pytest.fixture
def artifact(tmp_path):
    return fake_artifact(tmp_path / "alphabet.tw")


# -- the program ---


def test_version(run):
    assert run("--version") == (0, f"tilewright {tilewright.__version__}\n", "")


def test_python_m_is_the_same_program():
    result = subprocess.run([sys.executable, "-m", "tilewright", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"tilewright {tilewright.__version__}\n")


def test_help_names_every_command(run):
    code, out, _ = run()
    assert code == 0
    for command in ("compile", "generate", "chat", "serve", "inspect", "verify", "bench", "doctor"):
        assert re.search(rf"\b{command}\b", out)
        assert run(command, "--help")[0] == 0


# -- compile ---


@pytest.fixture
def compiler(monkeypatch, artifact):
    """A compile that only reports progress; -> the calls it got."""
    calls = []

    def compile(model, progress, **options):
        calls.append((model, options))
        for done in range(3):
            progress(Progress("passes", done, 2, "fuse_norm"))
        progress(Progress("kernels", 1, 1, "linear_0"))
        return artifact

    monkeypatch.setattr(build, "compile", compile)
    monkeypatch.setitem(tilewright.__dict__, "compile", compile)
    return calls


def test_compile_passes_its_options_on(run, compiler, tmp_path):
    sizes = ["--max-batch", "2", "--max-tokens", "64", "--page-size", "8"]
    arguments = ["--target", "cpu", "-o", "x.tw", "--weights", "random:3", "--quant", "none", *sizes]
    code, out, err = run("compile", "some-model", *arguments, "--dump", str(tmp_path))
    assert code == 0
    assert compiler == [
        (
            "some-model",
            {
                "target": "cpu",
                "output": Path("x.tw"),
                "weights": "random:3",
                "quant": "none",
                "max_batch": 2,
                "max_tokens": 64,
                "page_size": 8,
                "strict": False,
                "pooling": "last",
                "dump": tmp_path,
                "logs": None,
            },
        )
    ]
    # Progress goes to stderr, a line at each end of a stage; the summary is the result.
    assert "passes: 0 of 2\n" in err and "passes: 2 of 2 in 0.0 s\n" in err and "kernels compiled: 1 of 1" in err
    assert re.search(r"kernels +2\n", out) and "98.5 MB and 270 M operations for a decoded token" in out


def test_compile_defaults_are_those_of_python(run, compiler):
    run("compile", "some-model")
    parameters = signature(REAL_COMPILE).parameters
    assert compiler[0][1] == {n: p.default for n, p in parameters.items() if n not in ("model", "progress")}


def test_warnings_are_counted_and_shown(run, compiler, monkeypatch, tmp_path):
    warned = fake_artifact(tmp_path / "w.tw", warnings=("3 tensors of Q6_K are converted to q8_0",))
    monkeypatch.setitem(tilewright.__dict__, "compile", lambda *_, **__: warned)
    code, out, err = run("compile", "some-model")
    assert code == 0
    assert re.search(r"warnings +1\n", out)
    assert err == "warning: 3 tensors of Q6_K are converted to q8_0\n"


def test_plain_progress_says_little():
    """A line at both ends of a stage, and one every few seconds with the time that is left."""
    now = 0.0
    stream = io.StringIO()
    report = PlainProgress(console.Console(file=stream, width=200), clock=lambda: now)
    for done in range(101):
        report(Progress("kernels", done, 100, f"kernel_{done} [x]"))
        now += 0.5
    assert stream.getvalue().splitlines()[:2] == [
        "kernels compiled: 0 of 100",
        "kernels compiled: 10 of 100 after 5.0 s, about 45 s left",
    ]
    assert stream.getvalue().splitlines()[-1] == "kernels compiled: 100 of 100 in 50 s"
    assert len(stream.getvalue().splitlines()) == 11


def test_plain_progress_tells_one_thing_once():
    stream = io.StringIO()
    report = PlainProgress(console.Console(file=stream, width=200), clock=lambda: 0.0)
    report(Progress("link", 0, 1))
    report(Progress("link", 1, 1))
    assert stream.getvalue() == "linking: 1 of 1 in 0.0 s\n"


def test_downloads_count_bytes():
    stream = io.StringIO()
    PlainProgress(console.Console(file=stream, width=200))(Progress("download", 0, 98_362_432, "model"))
    assert stream.getvalue() == "downloading: 0 B of 98.4 MB\n"


@pytest.mark.parametrize(("stage", "done", "total"), [("naps", 0, 1), ("passes", 2, 1), ("passes", -1, 1)])
def test_progress_checks_itself(stage, done, total):
    with pytest.raises(ValueError):
        Progress(stage, done, total)


# -- generate ---


def test_generate_streams_text_alone_to_stdout(run, loaded, artifact):
    code, out, err = run("generate", str(artifact.path), "--prompt", "count: a", "--threads", "3")
    assert (code, out) == (0, LETTERS[1:] + "\n")
    assert loaded == [(artifact.path, 3)]
    assert re.fullmatch(
        r"10 tokens in, 26 out \(stop\), first after \d+ ms, then [\d.]+ ms each, loaded in 0\.2 s\n", err
    )


@pytest.mark.parametrize(
    ("arguments", "answer", "reason"),
    [
        (("--max-tokens", "3"), "bcd", "length"),
        (("--stop", "fg"), "bcde", "stop"),
        (("--stop", "xyz", "--stop", "d"), "bc", "stop"),
        (("--raw", "--max-tokens", "2"), "bc", "length"),
    ],
)
def test_generate_as_json(run, loaded, artifact, arguments, answer, reason):
    code, out, err = run("generate", str(artifact.path), "--prompt", "a", "--json", *arguments)
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert out.count("\n") == 1
    assert list(result) == ["text", "token_ids", "prompt_tokens", "completion_tokens", "finish_reason", "timings"]
    assert (result["text"], result["finish_reason"]) == (answer, reason)
    assert result["completion_tokens"] == len(result["token_ids"])
    assert result["prompt_tokens"] == (1 if "--raw" in arguments else 3)
    assert result["timings"]["load_s"] == 0.25 and result["timings"]["ttft_ms"] > 0


def test_logprobs_are_valid_json(run, loaded, artifact):
    """JSON has no infinity."""
    _, out, _ = run("generate", str(artifact.path), "--prompt", "y", "--json", "--logprobs", "3")
    result = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    z = {"token_id": 122, "logprob": -0.5}
    others = [{"token_id": 123, "logprob": -1.5}, {"token_id": 124, "logprob": None}]
    assert result["logprobs"][0] == {**z, "top": [z, *others]}
    assert len(result["logprobs"]) == 2


def test_generate_reads_the_prompt_from_stdin(run, loaded, artifact):
    _, out, _ = run("generate", str(artifact.path), "--prompt", "-", "--raw", "--json", stdin="line one\nx\n")
    result = json.loads(out)
    assert (result["text"], result["prompt_tokens"]) == ("yz", 10)  # one line end less


def test_generate_with_a_system_message(run, loaded, artifact):
    _, out, _ = run("generate", str(artifact.path), "--prompt", "a", "--system", "be brief", "--json")
    assert json.loads(out)["prompt_tokens"] == len("S:be briefU:a")


# -- chat ---


def test_chat_remembers_until_cleared(run, loaded, artifact, monkeypatch):
    prompts = []
    encode = runtime_model.load(artifact.path, 1).tokenizer.__class__.encode_chat

    def encode_chat(self, messages):
        prompts.append([m["content"] for m in messages])
        return encode(self, messages)

    monkeypatch.setattr("tests.fake_model.FakeTokenizer.encode_chat", encode_chat)
    code, out, err = run(
        "chat", str(artifact.path), "--system", "s", "--max-tokens", "2", stdin="a\n\nc\n/clear\nm\n/what\n/exit\nq\n"
    )
    assert (code, out) == (0, "bc\nde\nno\n")
    assert prompts == [["s", "a"], ["s", "a", "bc", "c"], ["s", "m"]]
    assert "there is no /what" in err


def test_chat_goes_on_after_a_message_that_is_too_long(run, loaded, artifact):
    code, out, err = run("chat", str(artifact.path), "--max-tokens", "2", stdin=f"{'x' * 300}\na\n")
    assert (code, out) == (0, "bc\n")
    assert err.startswith("error: the prompt of 302 tokens is longer than") and "/clear starts over" in err


# -- the cache of compiled models ---


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """A compile into a fresh cache; -> the models compiled."""
    compiled = []

    def compile(model, output, progress):
        compiled.append(model)
        return fake_artifact(output)

    monkeypatch.setenv(env.CACHE_DIR, str(tmp_path / "cache"))
    monkeypatch.setattr(build, "compile", compile)
    return compiled


def test_a_model_is_compiled_once_and_said_so(run, loaded, cached, monkeypatch, tmp_path):
    monkeypatch.setattr("tilewright.cache.env.cache_dir", lambda: tmp_path / "cache")
    code, out, err = run("generate", "smollm2-135m", "--prompt", "x")
    assert (code, out) == (0, "yz\n")
    place = loaded[0][0]
    assert f"smollm2-135m is not compiled for this machine yet: compiling into {place}, once\n" in err
    assert place.is_relative_to(tmp_path / "cache" / "artifacts")
    code, out, err = run("generate", "smollm2-135m", "--prompt", "x")
    assert (code, out) == (0, "yz\n") and "compil" not in err
    assert cached == ["smollm2-135m"] and loaded[1][0] == place


def test_what_a_cached_artifact_depends_on(cached, tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"one")
    first = cache.cached_path(str(file))
    assert first == cache.cached_path(str(file)) and first.name.startswith("model-gguf-")
    file.write_bytes(b"another")
    second = cache.cached_path(str(file))
    old = ("avx2", "f16c", "fma")
    other = old if "avx512" in host.features() else (*old, "avx512")
    monkeypatch.setattr(host, "features", lambda: other)
    third = cache.cached_path(str(file))
    monkeypatch.setattr(cache, "_compiler", lambda: "changed")
    assert len({first, second, third, cache.cached_path(str(file))}) == 4


def test_a_damaged_cache_entry_is_compiled_again(cached):
    path = cache.artifact_path("smollm2-135m")
    (path / "model.so").unlink()
    with pytest.raises(FileExistsError):  # the fake does not replace; it was asked to, which is what counts
        cache.artifact_path("smollm2-135m")
    assert cached == ["smollm2-135m"] * 2


def test_artifacts_are_taken_as_they_are(cached, artifact, tmp_path):
    renamed = artifact.path.rename(tmp_path / "no-suffix")
    assert cache.artifact_path(str(renamed)) == renamed
    assert cache.artifact_path(str(tmp_path / "absent.tw")) == tmp_path / "absent.tw"  # to be refused when opened
    assert cached == []


# -- inspect, verify, bench, doctor ---


def test_inspect(run, artifact):
    code, out, err = run("inspect", str(artifact.path))
    assert (code, err) == (0, "")
    assert re.search(r"^target +cpu \(x86_64, avx2\)", out, re.M)
    assert re.search(r"^model +family llama, hidden 576, tied, vocab 128$", out, re.M)
    assert re.search(r"^steps +step_1 \(1 tokens\), step \(up to 32 tokens\)", out, re.M)
    assert re.search(r"^kernel +tile +in step_1 +in step +bytes +\+ a row +op. a row$", out, re.M)
    assert re.search(r"^linear_block_gemv_0 +rows 16 +30 +1.23 MB +2.05 kB +3 M$", out, re.M)
    assert re.search(r"^embedding_0 +1$", out, re.M)
    assert re.search(r"^weights +98 MB", out, re.M) and re.search(r"^KV cache of a token .* 46.1 kB", out, re.M)


@pytest.mark.parametrize(("error", "code"), [(1e-3, 0), (2e-2, 1), (float("nan"), 1)])
def test_verify_names_the_worst_layer(run, artifact, monkeypatch, error, code):
    from types import ModuleType, SimpleNamespace

    layers = [SimpleNamespace(name=f"layer {i}", error=e, allowed=1e-2) for i, e in enumerate((1e-4, error, 1e-5))]
    module = ModuleType("verify_artifact")
    module.verify = lambda opened: layers
    monkeypatch.setitem(sys.modules, "tilewright.compiler.verify_artifact", module)
    found, out, _ = run("verify", str(artifact.path))
    assert found == code
    assert out.endswith(f"worst layer: layer 1, error {error:.2e} of 1.00e-02 allowed\n")
    assert ("too far off" in out) == bool(code)


@pytest.fixture
def quick_bench(monkeypatch):
    monkeypatch.setattr(timing, "read_bandwidth_gbs", lambda threads: 10.0)
    monkeypatch.setattr(timing, "ROUNDS", 2)


@pytest.mark.parametrize("kind", ["latency", "throughput"])
def test_bench_appends_a_line(run, loaded, artifact, quick_bench, tmp_path, kind):
    file = tmp_path / "results.jsonl"
    file.write_text('{"earlier": 1}\n')
    code, out, err = run("bench", str(artifact.path), kind, "--output", str(file))
    assert (code, err) == (0, f"appended to {file}\n")
    earlier, line = map(json.loads, file.read_text().splitlines())
    assert earlier == {"earlier": 1}
    assert line["kind"] == kind and line["model"] == "alphabet" and line["processor"] == host.processor()
    if kind == "latency":
        assert [row["prompt"] for row in line["rows"]] == [32, 128]
        assert line["rows"][0]["floor ms"] == pytest.approx(9.85)  # 98.5 MB at 10 GB/s
    else:
        assert [row["streams"] for row in line["rows"]] == [1, 2, 4]
        assert line["rows"][0]["of one stream"] == 1
    assert len(out.splitlines()) == 2 + len(line["rows"])


def test_bench_times_nothing_that_is_wrong(run, loaded, artifact, quick_bench, monkeypatch, tmp_path):
    """A model whose answers depend on the batch is a bug, not a result."""
    step = FakeModel.step

    def dependent(self, batch):
        result = step(self, batch)
        result.token_ids[:] += len(batch.kv_len) - 1
        return result

    monkeypatch.setattr(FakeModel, "step", dependent)
    file = tmp_path / "results.jsonl"
    code, _, err = run("bench", str(artifact.path), "throughput", "--output", str(file))
    assert code == 1 and "gave other tokens than alone" in err
    assert file.read_text() == ""


def test_doctor_says_what_there_is(run):
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    assert host.processor() in out
    assert re.search(r"^apache-tvm +0\.27", out, re.M)
    assert re.search(r"^nvidia-h100 +yes +(yes|no: )", out, re.M)


def test_doctor_says_what_is_missing(run, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr("tilewright.diagnosis.shutil.which", lambda name: None)
    monkeypatch.setattr("tilewright.diagnosis.os.access", lambda *_: False)
    monkeypatch.setattr(host, "features", lambda: ("f16c",))
    monkeypatch.setattr(host, "arch", lambda: "x86_64")
    monkeypatch.setattr("tilewright.diagnosis.metadata.requires", lambda _: ["no-such-package>=1", "numpy==0.1"])
    code, out, _ = run("doctor")
    assert code == 0
    assert re.search(r"^C compiler +none +install gcc or clang", out, re.M)
    assert re.search(r"^no-such-package +not installed +pip install 'no-such-package>=1'", out, re.M)
    assert re.search(r"^numpy +[\d.]+ +pip install 'numpy==0\.1'", out, re.M)
    assert re.search(r"^processor: avx2 +no +needed", out, re.M)
    assert re.search(r"^cache directory .* not writable", out, re.M)
    assert re.search(r"^cpu +no: this processor lacks avx2, fma", out, re.M)


# -- units ---


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (98_362_432, "98.4 MB"),
        (999_499, "999 kB"),
        (999_999, "1 MB"),
        (2.5e12, "2500 GB"),
    ],
)
def test_sizes(count, text):
    assert console.size(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (42.4, "42 s"), (185, "3 min 5 s")])
def test_durations(seconds, text):
    assert console.duration(seconds) == text


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, "-m", "tilewright", "doctor"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(write)
    assert (result.returncode, result.stderr) == (0, "")
