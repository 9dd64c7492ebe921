"""The files of deploy/ against the program: options, paths and metric names that they use are there."""

import json
import re
import shlex
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.server.serving import Running
from tilewright.cli import app
from tilewright.runtime.server.app import ENDPOINTS

DEPLOY = Path(__file__).parents[2] / "deploy"


def serve_options() -> set[str]:
    import typer

    command = typer.main.get_command(app).commands["serve"]
    return {option for parameter in command.params for option in parameter.opts}


def test_the_dashboard_asks_for_metrics_that_are_exported(server: Running) -> None:
    server.chat(n=2)
    families = list(text_string_to_metric_families(server.ask("GET", "/metrics")[2]))
    exported = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    text = (DEPLOY / "grafana.json").read_text()
    dashboard = json.loads(text)
    asked = set(re.findall(r"tilewright:\w+", text))
    assert len(asked) >= 20 and asked <= set(exported), asked - set(exported)
    histograms = {family.name for family in families if family.type == "histogram"}
    assert {f"{name}_bucket" for name in histograms} <= asked, "a histogram has no panel"
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            for names in re.findall(r"by \(([\w, ]+)\)", target["expr"]):
                metric = re.search(r"tilewright:\w+", target["expr"])[0]
                assert set(names.split(", ")) <= exported[metric] | {"le"}, target["expr"]


def test_the_units_command_is_one_that_serve_takes() -> None:
    unit = (DEPLOY / "tilewright.service").read_text()
    [command] = re.findall(r"^ExecStart=(.+)$", unit, re.M)
    program, name, *arguments = shlex.split(command)
    assert program.endswith("/bin/tilewright") and name == "serve"
    used = {word for word in arguments if word.startswith("--")}
    assert len(used) >= 5 and used <= serve_options(), used - serve_options()
    drain = float(arguments[arguments.index("--drain-seconds") + 1])
    assert float(re.search(r"^TimeoutStopSec=(\d+)", unit, re.M)[1]) > drain
    for line in unit.splitlines():
        assert re.fullmatch(r"(#.*|\[(Unit|Service|Install)\]|[A-Z]\w+=.*|)", line), line
    for hardening in ("NoNewPrivileges=yes", "DynamicUser=yes", "ProtectSystem=strict", "PrivateTmp=yes"):
        assert hardening in unit.splitlines()


def test_the_container_serves_as_nobody_and_is_probed_at_health() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    lines = re.sub(r"\\\n", " ", text).splitlines()
    instructions = [line.split(None, 1) for line in lines if line and not line.startswith("#")]
    assert [rest for word, rest in instructions if word == "FROM"][-1] == "python:3.12-slim"
    assert [rest for word, rest in instructions if word == "USER"] == ["tilewright"]
    [probe] = [rest for word, rest in instructions if word == "HEALTHCHECK"]
    assert "/health" in probe and any(e.path == "/health" and e.public for e in ENDPOINTS)
    [entry] = [json.loads(rest) for word, rest in instructions if word == "ENTRYPOINT"]
    assert {word for word in entry if word.startswith("--")} <= serve_options()
    assert "'/src[serve]'" in text and "cuda" not in text
