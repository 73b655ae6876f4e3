"""Files that appear whole or not at all, names that are safe as directories, hashes."""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import time
import unicodedata
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import AlreadyExistsError, CorruptFileError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

TEMPORARY = ".tmp-"  # a path component that starts so is never part of a result
DTYPES = ("F64", "F32", "F16", "BF16")  # of tensors that are read
MAX_BYTES = 8 * 2**30  # of a file of tensors
MODEL_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")  # as transformers names them
MAX_JSON = 2**26  # bytes of a JSON file or header: the largest that is written has a few


@contextlib.contextmanager
def commit_directory(path: str | Path) -> Iterator[Path]:
    """Fill a temporary directory beside `path`, then make it appear there by one rename.

    Args:
        path (`str` or `Path`): The final directory, which must not exist yet.

    Yields:
        `Path`: the temporary directory to write into. It is removed when the body raises.

    Raises:
        AlreadyExistsError: if `path` exists, or was made by another process meanwhile; its content is untouched.
        OSError: if it cannot be written, a full disk for instance; it names `path`, or what is beside it.
    """
    path = Path(path)
    if path.exists():
        raise AlreadyExistsError(f"{path} exists already.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        with _named(path):
            yield temporary
            for entry in [*temporary.rglob("*"), temporary]:
                _respect_umask(entry)
                _fsync(entry)
            try:
                os.rename(temporary, path)
            except OSError as error:
                if path.exists():  # a rename onto a non-empty directory fails differently on each system
                    raise AlreadyExistsError(f"{path} was made by another process meanwhile.") from error
                raise
            _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def commit_files(path: str | Path, last: str) -> Iterator[Path]:
    """Fill a temporary directory inside `path`, then move its files there, each by one rename.

    A model's weights that lie there under names that the new ones do not have are removed.

    Args:
        path (`str` or `Path`): The directory, made if there is none. Files that it holds are replaced one by one.
        last (`str`): The file without which readers take the others for nothing; it is moved after them.
    """
    path = Path(path)
    temporary = path / f"{TEMPORARY}{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    try:
        with _named(path):
            yield temporary
            *files, final = sorted(temporary.iterdir(), key=lambda file: (file.name == last, file.name))
            for file in (*files, final):
                _respect_umask(file)
                _fsync(file)
            for file in files:
                os.replace(file, path / file.name)
            for name in stale_weights(os.listdir(path), [file.name for file in files]):
                (path / name).unlink()
            os.replace(final, path / final.name)
            _fsync(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def stale_weights(there: Iterable[str], new: Iterable[str]) -> list[str]:
    """Return which files of a model's weights the new ones leave behind: one file, or the shards of another number.

    transformers would go on reading `model.safetensors` beside new shards.
    """
    new = set(new)
    if not any(map(MODEL_WEIGHTS.fullmatch, new)):
        return []
    return sorted(name for name in there if MODEL_WEIGHTS.fullmatch(name) and name not in new)


@contextlib.contextmanager
def commit_file(path: str | Path) -> Iterator[Path]:
    """Write a temporary file beside `path`, then put it in place of the old one by one rename."""
    path = Path(path)
    temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        with _named(path):
            yield temporary
            _respect_umask(temporary)
            _fsync(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part; numbers not finite become null."""
    text = json.dumps(as_plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with commit_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read JSON from an ordinary file of up to 64 MiB.

    Raises:
        CorruptFileError: if it is no JSON, or too large, or nested too deeply.
        OSError: if there is no such file, or it cannot be read.
    """
    path = _ordinary(path)
    if (size := path.stat().st_size) > MAX_JSON:
        raise CorruptFileError(f"expected up to {MAX_JSON} bytes, found {size}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise CorruptFileError("nested too deeply") from error
    except ValueError as error:  # of JSON, or of UTF-8
        raise CorruptFileError(str(error)) from error


def read_safetensors(path: str | Path, max_bytes: int = MAX_BYTES) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read finite floating-point tensors, with the checks that the library leaves out.

    Args:
        path (`str` or `Path`): The file.
        max_bytes (`int`, *optional*, defaults to 8 GiB): Most bytes that it may have: as much will be allocated.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, str]]`: the tensors as stored, and the file's metadata.

    Raises:
        CorruptFileError: if it is no ordinary file, is larger, malformed, has a name twice, another dtype, or a value
            that is not finite.
        OSError: if there is no such file, or it cannot be read.
    """
    path = _ordinary(path)
    try:
        _check_header(path, max_bytes)
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                if (dtype := file.get_slice(key).get_dtype()) not in DTYPES:
                    raise CorruptFileError(f"{key!r:.300}: expected one of {DTYPES}, found {dtype}")
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise CorruptFileError(f"not a whole safetensors file: {error}") from error
    if broken := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise CorruptFileError(f"{broken[0]} holds values that are not finite")
    return tensors, metadata


def _ordinary(path: str | Path) -> Path:
    """Refuse a folder, and a pipe, which would be waited for."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise CorruptFileError("not a file")
    return path


def _check_header(path: Path, max_bytes: int) -> None:
    """Refuse a file by its size, and names that stand twice, before anything is allocated."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise CorruptFileError(f"expected up to {max_bytes} bytes, found {size}; a larger max_bytes reads it")
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, MAX_JSON):
            raise CorruptFileError(
                f"not a whole safetensors file: its header would have {length} bytes, of {size} in all"
            )
        try:
            json.loads(file.read(length), object_pairs_hook=_unique)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise CorruptFileError(f"not a whole safetensors file: its header: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        names = [name for name, _ in pairs]
        raise CorruptFileError(f"its header has {next(name for name in names if names.count(name) > 1)!r} twice")
    return unique


@contextlib.contextmanager
def locked(path: str | Path, wait: bool) -> Iterator[bool]:
    """Hold a lock that other processes respect, and that goes with its holder; yield whether it was got.

    Where there are no such locks (Windows, some network file systems) everybody gets it: what it protects from is work
    that is done twice.
    """
    with Path(path).open("w") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        try:
            yield True
        finally:
            Path(path).unlink(missing_ok=True)


def sweep_temporary(root: str | Path, min_age: float = 3600.0) -> None:
    """Remove what interrupted writers left below `root` over `min_age` seconds ago; others may still be writing."""
    for folder, folders, names in os.walk(root):  # which, unlike `rglob`, does not mind what others remove meanwhile
        for leftover in (Path(folder, name) for name in [*folders, *names] if name.startswith(TEMPORARY)):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - leftover.lstat().st_mtime >= min_age:
                    shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()


def safe_dirname(name: str) -> str:
    """Return a directory name for any text: readable ASCII, plus a hash that keeps different names apart.

    Names that differ only in Unicode normal form share a directory; names that differ only in case do not, also on
    file systems that ignore case.

    Example:
        >>> safe_dirname("country names/Größe")
        'country_names-Gro_e-c53b79a5'
    """
    name = unicodedata.normalize("NFC", name)
    decomposed = unicodedata.normalize("NFD", name)
    ascii_only = "".join(c if c.isascii() and c.isalnum() else "-" if c == "/" else "_" for c in decomposed
                         if not unicodedata.combining(c))  # fmt: skip
    return f"{ascii_only.strip('_-')[:60] or 'task'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def sha256_of(*parts: bytes | str) -> str:
    """Return the SHA-256 of the parts in hexadecimal, unambiguous in where one part ends and the next begins."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def as_plain(content: Any) -> Any:
    """Return the same content with null in place of numbers that are not finite, which JSON does not know."""
    # Python would write NaN and Infinity, which are not JSON.
    if isinstance(content, dict):
        return {key: as_plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [as_plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    # A write to a full disk does not say which file it was; safetensors has an error of its own for it.
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    except OSError as error:
        if error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _respect_umask(path: Path) -> None:
    # safetensors creates files with mode 0600, which would hide a shared zoo from one's own group.
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
