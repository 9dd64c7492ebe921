"""Checks, then times.

    python bench/run.py ARTIFACT [--gguf FILE --peer-python PYTHON]     a model on a processor (cpu_model.py)
    python bench/run.py ARTIFACT --suite model                          a model on a GPU (gpu_model.py)
    python bench/run.py MODEL --suite compile --target nvidia-h100      compiling a model (compile_time.py)
    python bench/run.py --suite kernels                                kernels on a GPU (gpu_kernels.py)
    python bench/run.py ARTIFACT --suite serving                        the server, on a processor (serving.py); with
                                                                        --gguf and --peer-python llama.cpp's beside it

Each prints tables and appends one line a figure to a file of bench/results (results_file.py). `--only CASE ...` takes
some of the cases (cases.py). What fails its check is not timed.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from cases import CPU_CASES, MODEL_CASES, SERVING_CASES, chosen

HERE = Path(__file__).parent


def main() -> None:
    args = parse()
    if args.suite == "kernels":
        sys.path.insert(0, str(HERE.parent))  # for the tests' runner of kernels
        import gpu_kernels

        gpu_kernels.run(args, chosen(args.only))
    elif args.suite == "serving":
        sys.path.insert(0, str(HERE.parent))  # for the tests' tokenizer of letters
        import serving

        serving.run(args)
    elif args.suite == "model":
        time_model(args)
    elif args.suite == "compile":
        import compile_time

        compile_time.run(args)
    else:
        import cpu_model

        cpu_model.run(args)


def time_model(args: argparse.Namespace) -> None:
    import gpu_timing
    from gpu_model import time_model
    from results_file import Results, about

    file = args.results or HERE / "results" / "cuda-model.jsonl"
    results = Results(file, MODEL_CASES, about(args.commit, gpu_timing.device()))
    artifact: Any = {"artifact": Path(args.artifact).name}
    add = lambda case, samples, **facts: results.add(case, "tilewright", samples, **artifact, **facts)  # noqa: E731
    time_model(args.artifact, add, set(args.only or MODEL_CASES))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="?", help="to time; a model in compile; the suite kernels takes none")
    parser.add_argument("--suite", choices=("cpu", "kernels", "model", "compile", "serving"), default="cpu")
    parser.add_argument("--only", nargs="*", metavar="CASE", help="default all; the kernels' may be patterns: 'qkv-*'")
    parser.add_argument("--results", type=Path, help="the file of lines, default that of the suite")
    parser.add_argument("--commit", help="what is timed, where this is no checkout of it")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--target", default="cuda", help="to compile for")
    cpu = parser.add_argument_group("the suites cpu and serving")
    cpu.add_argument("--gguf", help="the same model's GGUF file, for llama.cpp")
    cpu.add_argument("--peer-python", help="a Python that has llama-cpp-python; in serving with its extra 'server'")
    cpu.add_argument("--threads", type=int, default=2)
    kernels = parser.add_argument_group("the suite kernels")
    kernels.add_argument("--prepare", type=Path, metavar="FILE", help="compile the kernels into FILE; needs no GPU")
    kernels.add_argument("--prepared", type=Path, metavar="FILE", help="take the kernels from FILE")
    args = parser.parse_args()
    if args.suite != "kernels" and args.artifact is None:
        parser.error(f"the suite {args.suite} times an artifact, or compiles a model: name one")
    known = {"cpu": CPU_CASES, "model": MODEL_CASES, "serving": SERVING_CASES}.get(args.suite)
    unknown = set(args.only or ()) - set(known) if known else ()
    if unknown:
        parser.error(f"no case is named {sorted(unknown)[0]!r}; there are {', '.join(sorted(known or ()))}")
    if "chats-peer" in (args.only or ()) and not (args.gguf and args.peer_python):
        parser.error("chats-peer serves the same model by llama.cpp as well: give --gguf and --peer-python")
    return args


if __name__ == "__main__":
    main()
