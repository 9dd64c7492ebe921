"""The tuner: how soon it finds the best, what that gains, and what it survives.

    python bench/tune.py measure smollm2-135m --logs build/tune     every tile of the tasks; again continues
    python bench/tune.py search smollm2-135m --logs build/tune      the searches, replayed on these records
    python bench/tune.py race smollm2-135m --budget 30s             the searches and MetaSchedule's, live, from nothing
    python bench/tune.py gains NAME --logs FOLDER                   the default and the best of each task in a folder
    python bench/tune.py kills smollm2-135m --logs build/kills      a sweep, killed at random moments; again kills on
    python bench/tune.py survived smollm2-135m --logs build/kills   its end, beside a sweep that is left alone
    python bench/tune.py fresh NAME --logs FOLDER                   a sweep's log folder beside the committed records

`measure` tries whole spaces, so that `search` knows the best there is; each search then runs from scratch on the
records of one task, with many seeds, and once more with the records of the other tasks to start from: first as a sweep
does, from the schedule's own guess on, which often is the best; then with the space in random order, so that only what
was measured helps. On a CPU, where spaces are small, --wide takes all tiles that linear_block_gemm's kernels can be
made with. `race` runs on linears of up to 16 rows, each search within the budget: MetaSchedule has the same computation
as plain loops (tune_race.py), and where it does not come within 5 % of the best its line says what it reached. `gains`
and `fresh` need log folders alone, neither model nor device: NAME is what their lines call the model. Lines go to
bench/results/tune.jsonl.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import tune_fresh
import tune_race
from cases import TUNE_CASES
from results_file import Results, about
from tune_wide import WideGemm

from tilewright import tuning
from tilewright.compiler import targets
from tilewright.compiler.build import compile_options
from tilewright.schedules.cpu.linear_block_gemm import LinearBlockGemm
from tilewright.schedules.records import Record, read_file, text_of
from tilewright.tuner.search import ModelSearch, RandomSearch, Search
from tilewright.tuner.sweep import BATCH, Budget
from tilewright.tuner.tasks import Task
from tilewright.tuning import Plan

HERE = Path(__file__).parent
SEEDS = 20
LEAST_TILES = 12  # of a task, for a search to be one
CLOSE = 0.95  # of the best


def main() -> None:
    args = parse()
    os.environ["PYTHONPATH"] = str(HERE)  # for the processes that compile
    if args.what in ("kills", "survived"):
        (kills if args.what == "kills" else survived)(args)
        return
    if args.what in ("fresh", "gains"):
        (fresh if args.what == "fresh" else gains)(args)
        return
    plan = make_plan(args)
    if args.what == "measure":
        state, _ = tuning.sweep(plan, args.logs, Budget(tuning.parse_budget(args.budget)), 1.0, lambda state: None)
        print(f"{state.trials} trials, {sum(not p.done for p in state.tasks)} of {len(state.tasks)} tasks open")
        return
    if args.what == "race":
        tasks = tune_race.of_few_rows(plan.tasks, args.tasks)
        tune_race.race(tasks, tuning.parse_budget(args.budget), args.trials, CLOSE, results(args))
        return
    records = [record for file in sorted(args.logs.glob("*/*.jsonl")) for record in read_file(file)[0]]
    search(plan, records, results(args))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "search", "race", "gains", "kills", "survived", "fresh"))
    parser.add_argument("model")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--workload", default="mixed")
    parser.add_argument("--logs", type=Path, default=Path("build/tune"))
    parser.add_argument("--budget", default="150s")
    parser.add_argument(
        "--wide", action="store_true", help="only block linears of several rows, with every tile there is"
    )
    parser.add_argument("--tasks", type=int, default=4, help="that `race` runs on")
    parser.add_argument("--trials", type=int, default=128, help="of each search in `race`")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument(
        "--committed", type=Path, default=HERE.parent / "tuning_logs", help="what `fresh` compares with"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results" / "tune.jsonl")
    parser.add_argument("--commit", help="what is run, where this is no checkout of it")
    return parser.parse_args()


def make_plan(args: argparse.Namespace) -> Plan:
    options = compile_options(args.target, args.weights)
    plan = tuning.plan(args.model, options, args.workload, lambda progress: None)
    if not args.wide:
        return plan
    gemms = [task for task in plan.tasks if isinstance(task.schedule, LinearBlockGemm)]
    return replace(plan, tasks=tuple(replace(task, schedule=WideGemm()) for task in gemms))


def results(args: argparse.Namespace, device: str | None = None) -> Results:
    """device: where the times are of, this machine's where it is not told."""
    searched = ["xgboost-cpu"] if device is None else []
    if device is None:
        kind = "cpu" if args.target in ("auto", "cpu") else targets.find_target(args.target).kind
        device = targets.device_name(kind) or "no GPU here"
    return Results(args.results, TUNE_CASES, about(args.commit, device, searched, model=Path(args.model).name))


# ---- how soon --------------------------------------------------------------------------------------------------------


def search(plan: Plan, records: Sequence[Record], out: Results) -> None:
    """Trials of each search on each task whose whole space was measured."""
    whole = [(task, own) for task in plan.tasks if (own := of_task(task, records)) and len(own) >= LEAST_TILES]
    totals: dict[str, list[float]] = {}
    for task, own in whole:
        others = [record for record in records if record.key not in {r.key for r in own.values()}]
        ways: dict[str, Callable[[int], Search]] = {
            "random": RandomSearch,
            "model": lambda seed: ModelSearch(seed=seed),
            "model, other tasks known": lambda seed, others=others: ModelSearch(others, seed),
        }
        for name, make in ways.items():
            for order in ("the schedule's", "random"):
                starts = [shuffled(task, seed) if order == "random" else task for seed in range(SEEDS)]
                counts = [float(trials(start, own, make(seed))) for seed, start in enumerate(starts)]
                mean = statistics.mean(counts)
                totals.setdefault(f"{name}, order {order}", []).append(mean)
                about_task = {"task": task.name, "tiles": len(task.space), "order": order}
                out.add("search", name, counts, **about_task, mean=round(mean, 2))
    for name, means in totals.items():
        print(f"{name}: {statistics.mean(means):.1f} trials in the mean of {len(means)} tasks")


def of_task(task: Task, records: Sequence[Record]) -> dict[str, Record]:
    """The records of a task by tile, where all its tiles have one; else none."""
    mine = {r.tile: r for r in records if (r.schedule, r.facts, r.rows) == task.key and r.space == task.space_hash}
    return mine if len(mine) == len(task.space) else {}


def shuffled(task: Task, seed: int) -> Task:
    """The task with its space in another order, so that another tile is the default."""
    space = list(task.space)
    random.Random(seed).shuffle(space)
    other = replace(task)
    other.__dict__["space"] = tuple(space)  # in the place of what the schedule would say
    return other


def trials(task: Task, own: dict[str, Record], tried: Search) -> int:
    """Candidates until one is close to the best."""
    goal_us = min(record.us for record in own.values() if record.us) / CLOSE
    measured: dict[str, Record] = {}
    while True:
        for tile in tried.propose(task, measured, set(measured), BATCH):
            record = measured[text_of(tile)] = own[text_of(tile)]
            tried.learn(record)
            if record.us is not None and record.us <= goal_us:
                return len(measured)


# ---- what it gains ---------------------------------------------------------------------------------------------------


def gains(args: argparse.Namespace) -> None:
    records = tune_fresh.read_folder(args.logs)
    tune_fresh.report_gains(records, results(args, tune_fresh.one_device(records, args.logs)))


# ---- what a sweep finds that the committed records don't say ---------------------------------------------------------


def fresh(args: argparse.Namespace) -> None:
    found = tune_fresh.read_folder(args.logs)
    device = tune_fresh.one_device(found, args.logs)
    tune_fresh.report(found, tune_fresh.read_folder(args.committed), results(args, device))


# ---- what it survives ------------------------------------------------------------------------------------------------


def kills(args: argparse.Namespace) -> None:
    """Kills a sweep again and again, each time after a random while; its log must be whole each time."""
    dice, counts = random.Random(), noted(args)
    for _ in range(args.kills):
        counts.append(kill_one(args, args.logs / "killed", dice))
        (args.logs / "kills.json").write_text(json.dumps(counts))
        print(f"killed with {counts[-1]} records", flush=True)


def noted(args: argparse.Namespace) -> list[int]:
    """How many records there were at each kill so far."""
    file = args.logs / "kills.json"
    return json.loads(file.read_text()) if file.exists() else []


def survived(args: argparse.Namespace) -> None:
    """Lets the killed sweep end, and looks up its best tiles in the log of a sweep that was left alone: what they took
    there, over the best there. (The times of two sweeps differ by what else the machine did.)"""
    places = args.logs / "killed", args.logs / "alone"
    for logs in places:
        subprocess.run(command(args, logs), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    killed, alone = (times_of(logs) for logs in places)
    assert killed.keys() == alone.keys(), "the killed sweep has other tasks than the one left alone"
    ratios = [alone[task][best(times)] / min(alone[task].values()) for task, times in killed.items()]
    counts = noted(args)
    results(args).add("kills", "tilewright", ratios, kills=len(counts), records_at_kills=counts, tasks=len(ratios))


def best(times: dict[str, float]) -> str:
    return min(times, key=times.__getitem__)


def command(args: argparse.Namespace, logs: Path) -> list[str]:
    program = [sys.executable, "-m", "tilewright", "tune", args.model, "--target", args.target]
    return [*program, "--workload", args.workload, "--logs", str(logs), "--budget", args.budget]


def kill_one(args: argparse.Namespace, logs: Path, dice: random.Random) -> int:
    """Starts a sweep, ends it at some moment of its measuring, and reads the log. Returns how many records it has."""
    before = len(whole_log(logs))
    running = subprocess.Popen(command(args, logs), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None and len(whole_log(logs)) <= before:
        time.sleep(0.02)
    time.sleep(dice.random() * 2.0)
    assert not running.poll(), "the sweep failed by itself"
    running.send_signal(signal.SIGKILL)
    running.wait()
    return len(whole_log(logs))


def whole_log(logs: Path) -> list[Record]:
    found = []
    for file in sorted(logs.glob("*/*.jsonl")):
        records, _, problems = read_file(file)
        assert not problems, problems
        found += records
    return found


def times_of(logs: Path) -> dict[tuple[str, str, int], dict[str, float]]:
    """Microseconds by task and tile."""
    found: dict[tuple[str, str, int], dict[str, float]] = {}
    for record in whole_log(logs):
        if record.us is not None:
            found.setdefault((record.schedule, record.facts, record.rows), {})[record.tile] = record.us
    return found


if __name__ == "__main__":
    main()
