"""A model of the Hugging Face hub, downloaded once into the hub's own cache. Interrupted downloads resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tilewright.compiler.errors import ModelError
from tilewright.compiler.progress import Progress

_CONFIGURATION = ["*.json", "*.jinja"]
_WEIGHTS = ["*.safetensors"]


def download_model(name: str, weights: bool, report: Callable[[Progress], None]) -> Path:
    """The directory of the model `name` ("org/name"). ModelError where there is none or it can't be reached."""
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    patterns = _CONFIGURATION + (_WEIGHTS if weights else [])
    try:
        path = huggingface_hub.snapshot_download(name, allow_patterns=patterns, tqdm_class=_reporting_bar(name, report))
    except RepositoryNotFoundError as error:  # a gated one is a subclass
        raise ModelError(
            f"{name}: the hub has no such model, or it is private or gated; "
            "check the name, or log in with `hf auth login`"
        ) from error
    except Exception as error:  # the HTTP library beneath changes between releases, and its errors with it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name}: can't be downloaded from the hub ({reason}); check the connection and try again"
        ) from error
    return Path(path)


def _reporting_bar(name: str, report: Callable[[Progress], None]) -> Any:
    """A class that the hub takes for tqdm and that reports bytes instead of drawing."""
    from tqdm.auto import tqdm

    furthest = 0  # the hub draws several bars over the same bytes; together they only ever advance

    class ReportingBar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)  # the hub's own
            self.counts_bytes = options.get("unit") == "B"
            self.done = int(options.get("initial") or 0)
            super().__init__(*args, **{**options, "disable": True})  # draws nothing, counts nothing
            self.total = options.get("total")  # the hub raises it as it learns of files

        def update(self, n: float | None = 1) -> None:
            nonlocal furthest
            self.done += int(n or 0)
            if self.counts_bytes and self.total and self.done > furthest:
                furthest = self.done
                report(Progress("download", min(self.done, int(self.total)), int(self.total), name))

    return ReportingBar
