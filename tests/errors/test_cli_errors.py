"""What a person can do wrong on the command line: one sentence with value, limit and remedy, exit code 2."""

import re
import signal
import subprocess
import sys

import pytest

import tilewright
from tests.cli_runner import make_runner
from tests.fake_model import FakeModel, fake_artifact
from tilewright.compiler import env
from tilewright.compiler.errors import ModelError
from tilewright.compiler.targets import cuda
from tilewright.runtime import model as runtime_model


@pytest.fixture
def run(capsys, monkeypatch):
    return make_runner(capsys, monkeypatch)


@pytest.fixture
def refused(run):
    """refused(*arguments) -> the sentence; checks all that every refusal has in common."""

    def check(*arguments: str, stdin: str | bytes = b"") -> str:
        code, out, err = run(*arguments, stdin=stdin)
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
        return err.removeprefix("error: ").strip()

    return check


@pytest.fixture
def artifact(tmp_path):
    return fake_artifact(tmp_path / "alphabet.tw")


@pytest.fixture
def loaded(monkeypatch):
    monkeypatch.setattr(runtime_model, "load", lambda path, threads: FakeModel())


# -- usage ---


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        pytest.param(("compil",), r"No such command 'compil'", id="unknown_command"),
        pytest.param(("--verbose",), r"No such option: --verbose", id="unknown_option"),
        pytest.param(("compile", "m", "--quantise", "x"), r"No such option: --quantise", id="unknown_own_option"),
        pytest.param(("compile",), r"Missing argument 'MODEL'; see tilewright compile --help", id="no_model"),
        pytest.param(("generate", "m"), r"Missing option '--prompt'", id="no_prompt"),
        pytest.param(("compile", "m", "--max-batch", "two"), r"'--max-batch'.*", id="not_a_number"),
        pytest.param(("bench", "a.tw", "speed"), r"'speed' is not one of 'latency', 'throughput'", id="unknown_bench"),
        pytest.param(("inspect", "a.tw", "b.tw"), r"unexpected extra argument", id="one_too_many"),
    ],
)
def test_usage(refused, arguments, sentence):
    said = refused(*arguments)
    assert re.search(sentence, said)
    assert said.endswith("--help")


# -- environment ---


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        (env.THREADS, "many", "TILEWRIGHT_THREADS='many' is not a whole number from 1 to 1024; set one or unset it"),
        (env.DEBUG, "yes", "TILEWRIGHT_DEBUG='yes' is neither 0 nor 1"),
        ("TILEWRIGHT_JOB", "2", "unknown environment variable TILEWRIGHT_JOB; did you mean TILEWRIGHT_JOBS?"),
    ],
)
def test_environment(refused, monkeypatch, name, value, sentence):
    monkeypatch.setenv(name, value)
    assert sentence in refused("doctor")


# -- compile ---


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        pytest.param(("smolm2-135m",), "did you mean smollm2-135m", id="misspelt_model"),
        pytest.param(("./no-such-dir/model.gguf",), "no such file", id="no_such_file"),
        pytest.param(("x", "--target", "nvidia-h10"), "did you mean nvidia-h100", id="target"),
        pytest.param(("x", "--target", "nvidia-b200"), "nvidia-b200", id="gpu"),
        pytest.param(("x", "--max-batch", "0"), "--max-batch is 0; give a number from 1 to", id="batch_too_small"),
        pytest.param(("x", "--max-tokens", "99999999"), "--max-tokens is 99999999; give", id="tokens_too_many"),
        pytest.param(("x", "--page-size", "-1"), "--page-size is -1; give a number from 1", id="page_size"),
    ],
)
def test_compile(refused, arguments, sentence):
    assert sentence in refused("compile", *arguments)


def test_compile_for_a_gpu_that_is_not_here(refused, monkeypatch):
    monkeypatch.setattr(cuda, "find_driver", lambda: None)
    assert "target cuda means this machine's GPU and it has none" in refused("compile", "x", "--target", "cuda")


def test_what_the_compiler_refuses_is_one_line(refused, monkeypatch):
    def compile(*_, **__):
        raise ModelError("config.json has\n  no field 'hidden_size'; [add] it")

    monkeypatch.setitem(tilewright.__dict__, "compile", compile)
    assert refused("compile", "x") == "config.json has no field 'hidden_size'; [add] it"


# -- artifacts ---


@pytest.mark.parametrize(
    ("command", "more"),
    [("inspect", ()), ("verify", ()), ("bench", ("latency",)), ("generate", ("--prompt", "x")), ("chat", ())],
)
def test_no_artifact(refused, tmp_path, monkeypatch, command, more):
    monkeypatch.chdir(tmp_path)
    assert "absent.tw is no artifact: it has no manifest.json" in refused(command, "absent.tw", *more)


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        pytest.param({"arch": "riscv64"}, "is for riscv64", id="architecture"),
        pytest.param({"features": ["avx2", "avx1024"]}, "avx1024", id="feature"),
        pytest.param({"name": "nvidia-h100", "kind": "cuda", "arch": "sm_90a"}, "nvidia-h100", id="gpu"),
    ],
)
def test_artifact_for_another_machine(refused, tmp_path, target, sentence):
    whole = {"name": "cpu", "kind": "cpu", "arch": "x86_64", "features": []}
    artifact = fake_artifact(tmp_path / "other.tw", target=whole | target)
    assert sentence in refused("generate", str(artifact.path), "--prompt", "x")


# -- requests ---


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        pytest.param(("--prompt", ""), "the prompt is empty", id="empty"),
        pytest.param(("--prompt", "-"), "the prompt is empty", id="empty_stdin"),
        pytest.param(("--prompt", "a\udcff"), "the prompt holds bytes that are no UTF-8 text", id="not_text"),
        pytest.param(("--prompt", "x" * 400), "prompt of 402 tokens is longer than 255", id="too_long"),
        pytest.param(("--prompt", "x", "--raw", "--system", "s"), "drop one of them", id="system_without_template"),
        pytest.param(("--prompt", "x", "--logprobs", "2"), "add --json", id="logprobs_without_json"),
        pytest.param(("--prompt", "x", "--json", "--logprobs", "9"), "logprobs 9 is above 3", id="logprobs_too_many"),
        pytest.param(("--prompt", "x", "--temperature", "nan"), "temperature nan", id="nan"),
        pytest.param(("--prompt", "x", "--temperature", "-1"), "temperature -1", id="temperature"),
        pytest.param(("--prompt", "x", "--top-p", "1.5"), "top_p 1.5", id="top_p"),
        pytest.param(("--prompt", "x", "--top-k", "-3"), "top_k -3", id="top_k"),
        pytest.param(("--prompt", "x", "--min-p", "inf"), "min_p inf", id="min_p"),
        pytest.param(("--prompt", "x", "--repetition-penalty", "0"), "repetition_penalty 0", id="penalty"),
        pytest.param(("--prompt", "x", "--seed", "-1"), "seed -1", id="seed"),
        pytest.param(("--prompt", "x", "--max-tokens", "0"), "max_tokens 0", id="no_tokens"),
        pytest.param(("--prompt", "x", "--max-tokens", "999"), "max_tokens 999", id="beyond_the_context"),
        pytest.param(("--prompt", "x", "--stop", ""), "stop string ''", id="empty_stop"),
        pytest.param(("--prompt", "x", "--threads", "0"), "--threads is 0; give a number from 1 to 1024", id="threads"),
    ],
)
def test_generate(refused, loaded, artifact, arguments, sentence):
    assert sentence in refused("generate", str(artifact.path), *arguments)


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize("option", ["temperature", "top-p", "min-p", "repetition-penalty"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-0.5"])
def test_sampling_values(refused, loaded, artifact, command, option, value):
    prompt = ("--prompt", "x") if command == "generate" else ()
    said = refused(command, str(artifact.path), *prompt, f"--{option}={value}")
    assert said.startswith(f"{option.replace('-', '_')} {value} ")


@pytest.mark.parametrize(("option", "value"), [("temperature", "warm"), ("top-k", "1.5"), ("seed", "x")])
def test_sampling_values_that_are_no_numbers(refused, loaded, artifact, option, value):
    said = refused("generate", str(artifact.path), "--prompt", "x", f"--{option}={value}")
    assert f"Invalid value for '--{option}': " in said and said.endswith("; see tilewright generate --help")


def test_stdin_that_is_no_text(refused, loaded, artifact):
    said = refused("generate", str(artifact.path), "--prompt", "-", stdin=b"abc\xff")
    assert said == "standard input is no UTF-8 text (byte 3); convert it"


def test_bench_results_that_cannot_be_written(refused, loaded, artifact, tmp_path):
    said = refused("bench", str(artifact.path), "latency", "--output", str(tmp_path / "absent" / "file"))
    assert "can't be written (No such file or directory); name another file with --output" in said


# -- interrupts and bugs ---


@pytest.fixture
def interruptible():
    """The interrupt handler of the tests, back when the command has put its own."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def failing(monkeypatch):
    def fail(error: BaseException) -> None:
        def compile(*_, **__):
            raise error

        monkeypatch.setitem(tilewright.__dict__, "compile", compile)

    return fail


def test_an_interrupt_is_one_line(run, failing, interruptible):
    failing(KeyboardInterrupt())
    assert run("compile", "x") == (130, "", "interrupted\n")


def test_a_bug_is_one_line_and_says_how_to_see_more(run, failing):
    failing(ZeroDivisionError("division\nby [zero]"))
    code, out, err = run("compile", "x")
    assert (code, out) == (1, "")
    assert err == (
        "error: a bug in tilewright (ZeroDivisionError: division by [zero]); "
        "run again with TILEWRIGHT_DEBUG=1 for the traceback, and report it\n"
    )


def test_a_bug_has_its_traceback_when_asked(run, failing, monkeypatch):
    failing(ZeroDivisionError("division by zero"))
    monkeypatch.setenv(env.DEBUG, "1")
    code, _, err = run("compile", "x")
    assert code == 1
    assert err.startswith("Traceback") and err.rstrip().endswith("ZeroDivisionError: division by zero")


def test_a_fresh_process_agrees():
    """Nothing of the above depends on running inside the tests."""
    command = [sys.executable, "-m", "tilewright", "compile", "x", "--target", "toaster!"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: unknown target 'toaster!'; known are") and result.stderr.count("\n") == 1
