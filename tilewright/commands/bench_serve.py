"""`tilewright bench serve`: how a server answers under load, by OpenAI's API, whoever made it."""

import asyncio
import datetime
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tilewright.traffic.arrivals import Arrival
    from tilewright.traffic.drive import Standing
    from tilewright.traffic.figures import Objective

_EXTRA = ("aiohttp", "matplotlib")
_REPORT_S = 5.0
_LAG_MS = 50.0  # a client that sends so much late measures itself


def command(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of the server, as http://127.0.0.1:8000.")],
    model: Annotated[str | None, typer.Option(help="What to ask; the only one served by default.")] = None,
    rate: Annotated[
        list[float] | None, typer.Option(metavar="R", help="Requests a second; repeat it to compare. Default 1.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="How many for each rate; of a trace, at most.")] = 100,
    gamma_shape: Annotated[
        float, typer.Option(min=0.01, max=1000, help="Of times between requests: 1 is Poisson, less comes in bursts.")
    ] = 1.0,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="About so many in each prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=1, help="Most of each answer.")] = 64,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Arrivals and lengths of a BurstGPT CSV file; --rate speeds it up or down."),
    ] = None,
    slo_ttft_ms: Annotated[float, typer.Option(min=0.001, help="Objective for the first token.")] = 1000.0,
    slo_tpot_ms: Annotated[
        float, typer.Option(min=0.001, help="Objective for a token after the first, on average over an answer.")
    ] = 100.0,
    slo_e2e_ms: Annotated[float | None, typer.Option(min=0.001, help="Objective for the whole; none by default.")] = (
        None
    ),
    temperature: Annotated[float, typer.Option(min=0, max=2, help="Of every request.")] = 0.0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Every answer has its full length; few servers know this field.")
    ] = False,
    api_key_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Holds the key to send.")] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds after which a request has failed.")] = 600.0,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals and prompts.")] = 0,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Gets results.json, report.html and report.png.")
    ] = Path("bench-serve"),
) -> None:
    """Send a server streamed chats at given rates, however slowly it answers, and report latencies and goodput."""
    from tilewright import console
    from tilewright.compiler.errors import UserError

    try:
        from tilewright.traffic import client, drive, figures, plots
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise UserError(f"{error.name} is not installed; pip install 'tilewright[bench]'") from None

    where = _checked_url(url)
    key = None if api_key_file is None else _key(api_key_file)
    plan = _plan(rate, requests, gamma_shape, prompt_tokens, output_tokens, trace, seed)
    objective = figures.Objective(slo_ttft_ms, slo_tpot_ms, slo_e2e_ms)
    _make(output)
    settings = {
        "gamma_shape": None if trace else gamma_shape,
        "trace": None if trace is None else trace.name,
        "temperature": temperature,
        "ignore_eos": ignore_eos,
        "timeout_s": timeout,
        "seed": seed,
    }
    extra = {"temperature": temperature, **({"ignore_eos": True} if ignore_eos else {})}

    async def run() -> None:
        runs: list[dict[str, Any]] = []
        samples: list[Mapping[str, Sequence[float]]] = []
        async with drive.open_session(timeout) as session:
            found = await client.find_model(session, where, key, model)
            target = client.Target(found.url, found.model, found.key, extra)
            about = _about(target.url, target.model, settings, objective)
            for i, (each, arrivals) in enumerate(plan):
                with _progress(f"{each:g} a second") as report:
                    outcomes = await drive.drive(session, target, arrivals, seed * 1000 + i, report)
                runs.append({"rate": round(each, 6), **figures.of_run(outcomes, objective)})
                single = [figures.of_request(outcome) for outcome in outcomes]
                samples.append(
                    {name: [one[name] for one in single if one[name] is not None] for name in ("ttft_ms", "e2e_ms")}
                    | {"itl_ms": figures.between_ms(o for o in outcomes if o.error is None)}
                )
                about["rates"].append(runs[-1] | {"each": single})
                _write(output / "results.json", json.dumps(about).encode() + b"\n")  # an interrupt loses no rate
                _warn_of(runs[-1], console.warn)
        title = f"{target.model} at {target.url}"
        figure = plots.draw(runs, samples, title)
        _write(output / "report.png", plots.png(figure))
        _write(output / "report.html", plots.page(figure, runs, title, _words(objective)).encode())
        console.show(*_tables(runs, objective))
        console.note(f"results.json, report.html and report.png are in {output}")
        if all(run["requests"] == sum(run["failed"].values()) for run in runs):
            raise UserError(f"no request was answered ({next(iter(runs[0]['failed']))}); {output} holds the details")

    asyncio.run(run())


def _plan(
    rates: Sequence[float] | None,
    requests: int,
    gamma_shape: float,
    prompt_tokens: int,
    output_tokens: int,
    trace: Path | None,
    seed: int,
) -> "list[tuple[float, list[Arrival]]]":
    """(rate, arrivals) of each run. Raises UserError."""
    from tilewright import console
    from tilewright.compiler.errors import UserError
    from tilewright.traffic.arrivals import at_rate, drawn, mean_rate, read_trace

    for rate in rates or ():
        if not 0 < rate < math.inf:
            raise UserError(f"--rate is {rate:g}; give requests a second, above 0")
    if trace is None:
        return [
            (rate, drawn(rate, requests, gamma_shape, prompt_tokens, output_tokens, seed)) for rate in rates or (1.0,)
        ]
    arrivals, skipped = read_trace(trace, requests)
    if skipped:
        console.note(f"{skipped} rows of {trace} have no response tokens and are left out")
    if not rates:
        return [(mean_rate(arrivals), arrivals)]
    return [(rate, at_rate(arrivals, rate)) for rate in rates]


def _checked_url(url: str) -> str:
    """Without a trailing slash or /v1."""
    from urllib.parse import urlsplit

    from tilewright.compiler.errors import UserError

    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise UserError(f"{url!r} is no address of a server; give one as http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")


def _key(file: Path) -> str:
    from tilewright.compiler.errors import UserError

    try:
        key = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it holds more than ASCII"
        raise UserError(f"the key file {file} can't be read ({reason}); check --api-key-file") from None
    if not key or not key.isprintable():
        raise UserError(f"the key file {file} holds no key in one line; check --api-key-file")
    return key


def _make(folder: Path) -> None:
    """Makes the folder and sees that it can be written to, before an hour of measuring."""
    from tilewright.compiler.errors import UserError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} can't be made ({error.strerror}); name another with --output") from None
    _write(folder / "results.json", b"")


def _write(file: Path, data: bytes) -> None:
    from tilewright.compiler.errors import UserError

    try:
        file.write_bytes(data)
    except OSError as error:
        raise UserError(f"{file} can't be written ({error.strerror}); name another folder with --output") from None


def _about(url: str, model: str, settings: dict[str, Any], objective: "Objective") -> dict[str, Any]:
    from dataclasses import asdict

    from tilewright import __version__

    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "tilewright": __version__,
        "url": url,
        "model": model,
        **settings,
        "objective": asdict(objective),
        "rates": [],
    }


@contextmanager
def _progress(label: str) -> "Iterator[Callable[[Standing], None]]":
    """A line that is kept up to date on a terminal, one every few seconds elsewhere."""
    from tilewright import console

    begun_s, stream = time.monotonic(), console.err()

    def line(now: "Standing") -> str:
        failed = f", {now.failed} failed" if now.failed else ""
        after = console.duration(time.monotonic() - begun_s)
        return f"{label}: {now.sent} of {now.total} sent, {now.answered} answered{failed} after {after}"

    if stream.is_terminal:
        with stream.status(label) as status:
            yield lambda now: status.update(line(now))
        return
    printed_s = begun_s

    def report(now: "Standing") -> None:
        nonlocal printed_s
        if now.answered == now.total or time.monotonic() - printed_s >= _REPORT_S:
            printed_s = time.monotonic()
            console.note(line(now))

    yield report


def _warn_of(run: dict[str, Any], warn: Callable[[str], None]) -> None:
    for reason, count in run["failed"].items():
        warn(f"{count} of {run['requests']} requests failed: {reason}")
    if run["lag_ms"]["p99"] > _LAG_MS:
        warn(
            f"this client sent up to {run['lag_ms']['p99']:.0f} ms late; run it on another machine, or at a lower rate"
        )


def _tables(runs: Sequence[dict[str, Any]], objective: "Objective") -> list[Any]:
    from tilewright import console
    from tilewright.traffic.figures import LATENCIES

    columns = ("rate", "requests", "failed", "requests/s", "output tokens/s", "goodput/s", "within")
    whole = console.table(f"goodput: {_words(objective)}", *columns, numeric=columns)
    spread = ("mean", "p50", "p90", "p95", "p99", "max")
    each = console.table("latencies, ms", "rate", "", *spread, numeric=("rate", *spread))
    for run in runs:
        whole.add_row(
            f"{run['rate']:g}",
            str(run["requests"]),
            str(sum(run["failed"].values())),
            f"{run['requests_per_s']:.2f}",
            f"{run['output_tokens_per_s']:.1f}",
            f"{run['goodput_per_s']:.2f}",
            f"{run['within_objective']:.1%}",
        )
        for name in LATENCIES:
            if run[name] is not None:
                values = (f"{run[name][column]:.1f}" for column in spread)
                each.add_row(f"{run['rate']:g}", name.removesuffix("_ms"), *values)
    return [whole, each]


def _words(objective: "Objective") -> str:
    whole = "" if objective.e2e_ms is None else f", the whole within {objective.e2e_ms:g} ms"
    return (
        f"first token within {objective.ttft_ms:g} ms, further ones within {objective.tpot_ms:g} ms on average{whole}"
    )
