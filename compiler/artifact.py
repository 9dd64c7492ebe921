"""The artifact: one sealed, relocatable directory NAME.tw that serves a model.

    manifest.json          what follows, by name; sealed by a checksum of itself
    model.so               kernels and the step's program
    params/model.safetensors   weights, packed as the kernels read them, mapped from disk
    tokenizer.json         in Hugging Face's format
    costs.json             predicted floor of a step by bucket, in bytes and operations

Everything is written aside and renamed at the end, so a place holds a whole artifact or none. Opening one checks the
schema, the seal, every file's size and checksum, and that this machine has what the kernels need.
"""

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.compiler.artifact_form import check_manifest, read_json
from tilewright.compiler.errors import ArtifactError

SCHEMA = 1
MANIFEST = "manifest.json"
LIBRARY = "model.so"
PARAMS = "params/model.safetensors"
TOKENIZER = "tokenizer.json"
COSTS = "costs.json"
ALIGNMENT = 64  # bytes; kernels load aligned vectors

_DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int32": "I32",
}
_NUMPY = {v: k for k, v in _DTYPES.items() if k != "bfloat16"} | {"BF16": "uint16"}


def numpy_dtype(name: str) -> np.dtype:
    """numpy's dtype for the bits of a param's; bfloat16, which it lacks, travels as uint16."""
    return np.dtype("uint16" if name == "bfloat16" else name)


@dataclass(frozen=True)
class Param:
    """One weight as the step takes it, and where it came from.

    `sources` are checkpoint tensors whose rows are joined in order; `format` is the packed layout (models/quant) of the
    [rows, columns] matrix, "f32" with no columns for vectors.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sources: tuple[str, ...]
    format: str
    rows: int
    columns: int | None

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * numpy_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Bucket:
    """One way to run the step: `tokens` exact where `static`, else an upper bound. Several may share a function."""

    function: str
    tokens: int
    static: bool

    @property
    def name(self) -> str:
        return f"{self.function} of {self.tokens}"


@dataclass(frozen=True)
class Manifest:
    """What manifest.json holds. Sizes in bytes, lengths in tokens."""

    name: str
    target: Mapping[str, Any]  # name, kind, arch, features; a GPU's has host, the architecture of its host code
    model: Mapping[str, Any]  # ModelConfig
    limits: Mapping[str, int]  # max_batch, max_tokens, max_context, page_size, logits_rows
    kv: Mapping[str, Any]  # KVFormat
    step: Mapping[str, Any]  # inputs of the step in order, buckets, top_logprobs
    params: tuple[Param, ...]
    kernels: tuple[Mapping[str, Any], ...]
    memory: Mapping[str, int]
    tokenizer: Mapping[str, Any]
    provenance: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    embedding: Mapping[str, Any] = field(default_factory=dict)  # pooling, dimensions; empty in older artifacts
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        return tuple(Bucket(**b) for b in self.step["buckets"])

    def to_json(self) -> str:
        body = _canonical(asdict(self))
        return json.dumps({**json.loads(body), "seal": _seal(body)}, indent=1, sort_keys=True) + "\n"

    @staticmethod
    def read(where: Path) -> "Manifest":
        """ArtifactError where the file is no manifest, of another schema, changed after it was sealed, or of another
        form than this version writes."""
        fields = read_json(where, "artifact manifest")
        if not isinstance(fields, dict) or "schema" not in fields:
            raise ArtifactError(f"{where} is no artifact manifest (it has no schema); compile it again")
        _check_schema(fields["schema"], where)
        seal = fields.pop("seal", None)
        if seal != _seal(_canonical(fields)):
            raise ArtifactError(f"{where} does not match its own checksum: it was changed; compile the model again")
        check_manifest(fields, where, _DTYPES)
        params = tuple(
            Param(**{**p, "shape": tuple(p["shape"]), "sources": tuple(p["sources"])}) for p in fields["params"]
        )
        lists = {"params": params, "kernels": tuple(fields["kernels"]), "warnings": tuple(fields["warnings"])}
        return Manifest(**{**fields, **lists})


def _check_schema(schema: Any, where: Path) -> None:
    if schema == SCHEMA:
        return
    newer = not isinstance(schema, int) or schema > SCHEMA
    shown = " ".join(str(schema).split())[:40]
    raise ArtifactError(
        f"{where.parent} has artifact schema {shown}, {'newer' if newer else 'older'} than this version's {SCHEMA}; "
        f"{'upgrade tilewright or ' if newer else ''}compile the model again"
    )


def _canonical(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def _seal(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """An opened artifact: its place and its manifest."""

    path: Path
    manifest: Manifest

    @staticmethod
    def open(path: str | os.PathLike[str], check: bool = True) -> "Artifact":
        """Reads the manifest and, if `check`, compares every file's checksum. Raises ArtifactError."""
        root = Path(path)
        if not (root / MANIFEST).is_file():
            raise ArtifactError(f"{root} is no artifact: it has no {MANIFEST}; give a directory made by compile")
        artifact = Artifact(root, Manifest.read(root / MANIFEST))
        artifact._check_files()
        if check:
            artifact._check_sums()
        return artifact

    def _check_files(self) -> None:
        """That every file is there, within the artifact, and of its size."""
        listed = self.manifest.files
        if LIBRARY not in listed:
            raise ArtifactError(f"{self.path / MANIFEST} lists no {LIBRARY}; compile the model again")
        for name, expected in listed.items():
            file = self.path / name
            if (link := _link(self.path, name)) is not None:
                raise ArtifactError(f"{link} is a link, and an artifact has files alone; copy what it points to there")
            size = file.stat().st_size if file.is_file() else None
            if size != expected["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise ArtifactError(f"{file} {found}, {expected['bytes']} expected; compile the model again")

    def _check_sums(self) -> None:
        names = list(self.manifest.files)
        with ThreadPoolExecutor() as pool:
            sums = list(pool.map(lambda n: sha256(self.path / n), names))
        for name, found in zip(names, sums, strict=True):
            if found != self.manifest.files[name]["sha256"]:
                raise ArtifactError(f"{self.path / name} does not match its checksum; compile the model again")

    @property
    def bytes(self) -> int:
        return sum(int(f["bytes"]) for f in self.manifest.files.values())

    def map_params(self) -> list[np.ndarray]:
        """The weights in the step's order, mapped copy-on-write, each 64-byte aligned; bfloat16 as uint16.

        ArtifactError where the manifest and the file do not speak of the same tensors.
        """
        if PARAMS not in self.manifest.files:
            raise ArtifactError(f"{self.path / MANIFEST} lists no {PARAMS}; compile the model again")
        file = self.path / PARAMS
        tensors = read_tensors(file)
        return [_as_param(tensors, param, file) for param in self.manifest.params]


def _as_param(tensors: Mapping[str, np.ndarray], param: Param, file: Path) -> np.ndarray:
    found = tensors.get(param.name)
    if found is None or param.dtype not in _DTYPES or found.nbytes != param.bytes:
        is_there = "not there" if found is None else f"of {found.nbytes} bytes"
        raise ArtifactError(
            f"{file}: the tensor {param.name} is {is_there}, {param.dtype}{list(param.shape)} expected; "
            "compile the model again"
        )
    return found.view(numpy_dtype(param.dtype)).reshape(param.shape)


def _link(root: Path, name: str) -> Path | None:
    """The first part of a file's path within the artifact that is a symbolic link."""
    parts = Path(name).parts
    paths = (root.joinpath(*parts[: i + 1]) for i in range(len(parts)))
    return next((path for path in paths if path.is_symlink()), None)


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


# ---- writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A directory to fill aside `path`; renamed to it on success, removed on failure.

    Only one process writes to a place at a time. Raises ArtifactError where the place can't be written.
    """
    if path.name in ("", ".."):
        raise ArtifactError(f"{path} is no name for an artifact; give one such as model.tw with -o")
    aside = path.with_name(f".{path.name}.partial")
    lock_file = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _open_locked(lock_file, path)
    except OSError as error:
        raise ArtifactError(
            f"{path.parent} can't be written to ({_reason(error)}); give another place with -o"
        ) from None
    with lock:
        try:
            if path.exists() and not (path / MANIFEST).exists():
                raise ArtifactError(f"{path} exists and is no artifact; give another place with -o")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            yield aside
            _replace(aside, path)
        except OSError as error:
            raise ArtifactError(
                f"{path} can't be written ({_reason(error)}) and nothing was left there; "
                "make room, or give another place with -o"
            ) from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            with contextlib.suppress(OSError):
                lock_file.unlink()


def _reason(error: OSError) -> str:
    """What the system says, in place of its puzzling "File exists" for a file where a directory is needed."""
    if isinstance(error, FileExistsError | NotADirectoryError):
        return "a file is in its way"
    return error.strerror or str(error)


def _open_locked(file: Path, path: Path) -> Any:
    """The lock file, open and held. It is removed after use, so what was locked must still be what stands there."""
    while True:
        lock = file.open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip()
            lock.close()
            raise ArtifactError(
                f"{f'process {owner}' if owner else 'another process'} is compiling into {path} now; "
                "wait for it, or give another place with -o"
            ) from None
        if file.exists() and os.fstat(lock.fileno()).st_ino == file.stat().st_ino:
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            return lock
        lock.close()


def _replace(aside: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    aside.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def seal(root: Path, manifest: Manifest) -> Manifest:
    """Writes manifest.json over the files that stand in `root`; returns it with their checksums."""
    names = sorted(str(f.relative_to(root)) for f in root.rglob("*") if f.is_file())
    files = {n: {"bytes": (root / n).stat().st_size, "sha256": sha256(root / n)} for n in names}
    sealed = Manifest(**{**{k: getattr(manifest, k) for k in manifest.__dataclass_fields__}, "files": files})
    (root / MANIFEST).write_text(sealed.to_json())
    return sealed


class TensorWriter:
    """Streams tensors into one safetensors file, in the order given, each at a 64-byte boundary where its size allows.

    The format wants tensors without gaps, so those whose size is no multiple of the alignment go last.
    """

    def __init__(self, file: Path, params: tuple[Param, ...]):
        self._params = sorted(params, key=lambda p: p.bytes % ALIGNMENT != 0)
        self._stream = file.open("wb")
        header: dict[str, Any] = {}
        offset = 0
        for p in self._params:
            header[p.name] = {
                "dtype": _DTYPES[p.dtype],
                "shape": list(p.shape),
                "data_offsets": [offset, offset + p.bytes],
            }
            offset += p.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        self._stream.write(len(text).to_bytes(8, "little") + text)

    @property
    def order(self) -> list[Param]:
        return self._params

    def write(self, param: Param, array: np.ndarray) -> None:
        """`array` has the param's shape and dtype (bfloat16: its bits); params come in `order`."""
        if array.shape != param.shape or array.dtype != numpy_dtype(param.dtype):
            raise ValueError(f"{param.name}: {array.dtype}{array.shape} is not {param.dtype}{param.shape}")
        self._stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        self._stream.close()


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file as a copy-on-write view (bf16 as uint16); unaligned ones are copied.

    ArtifactError where the file's header is none, or speaks of bytes that are not there.
    """
    try:
        with file.open("rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        start = 8 + int.from_bytes(data[:8], "little")
        if not 8 < start <= len(data):
            raise ValueError("the header is longer than the file")
        header = json.loads(data[8:start])
        whole = np.frombuffer(data, dtype=np.uint8)[start:]
        return {name: _tensor(whole, entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise ArtifactError(f"{file} holds no tensors ({why}); compile the model again") from None


def _tensor(data: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= len(data):
        raise ValueError(f"a tensor lies at bytes {begin} to {end} of {len(data)}")
    raw = data[begin:end]
    if raw.size and raw.ctypes.data % ALIGNMENT:
        raw = aligned_copy(raw)
    return raw.view(_NUMPY[entry["dtype"]]).reshape(entry["shape"])


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array whose data starts at a 64-byte boundary."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def aligned_copy(array: np.ndarray) -> np.ndarray:
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy
