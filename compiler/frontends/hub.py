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
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = _CONFIGURATION + (_WEIGHTS if weights else [])
    try:
        path = huggingface_hub.snapshot_download(name, allow_patterns=patterns, tqdm_class=_reporting_bar(name, report))
    except RepositoryNotFoundError as error:  # a gated one is a subclass
        raise ModelError(
            f"{name}: the hub has no such model, or it is private or gated; "
            "check the name, or log in with `hf auth login`"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name}: can't be downloaded from the hub ({reason}); check the connection and try again"
        ) from error
    return Path(path)


def _reporting_bar(name: str, report: Callable[[Progress], None]) -> Any:
    """A class that the hub takes for tqdm and that reports bytes instead of drawing."""
    from tqdm.auto import tqdm

    class ReportingBar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            # The hub hands options of its own over; a bar that is disabled counts nothing by itself.
            options.pop("name", None)
            self.in_bytes = options.get("unit") == "B"
            self.done = int(options.get("initial") or 0)
            super().__init__(*args, **{**options, "disable": True})
            self.total = options.get("total")

        def update(self, n: float | None = 1) -> None:
            self.done += int(n or 0)
            if self.in_bytes and self.total:
                report(Progress("download", min(self.done, int(self.total)), int(self.total), name))

    return ReportingBar
