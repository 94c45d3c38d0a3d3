"""The data sets of the figures: looked for, verified by checksum, fetched when allowed, and otherwise replaced by a documented substitute."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from theorylab import runtime
from theorylab.core import store
from theorylab.errors import DatasetError, UnknownNameError

LIBSVM = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets"
MNIST = "https://storage.googleapis.com/cvdf-datasets/mnist"
SECONDS = 60.0


class SubstituteDataWarning(UserWarning):
    """A data set was not at hand, and another stands in for it."""


class Dataset(NamedTuple):
    """One data set as NumPy arrays.

    Attributes:
        x: features, axes (sample, feature).
        y: targets, axis (sample,): floats for regression, whole numbers for classes.
        name: the name that was asked for.
        source: where the arrays come from, for captions and sidecars.
        substitute: name of the set that stands in for the one asked for, or None.
    """

    x: np.ndarray
    y: np.ndarray
    name: str
    source: str
    substitute: str | None


class _File(NamedTuple):
    """A file that may lie in a folder under any of `names`."""

    names: tuple[str, ...]
    url: str
    sha256: str


class _Entry(NamedTuple):
    """A data set made of files."""

    files: tuple[_File, ...]
    read: Callable[[list[bytes]], tuple[np.ndarray, np.ndarray]]
    source: str
    substitute: str
    stand_in: Callable[[], tuple[np.ndarray, np.ndarray]]


def load(name: str, download: bool = False) -> Dataset:
    """Load a data set by name.

    | name | what | samples, features | substitute |
    |---|---|---|---|
    | `mpg` | fuel consumption of cars, features scaled to [-1, 1] | 392, 7 | `diabetes` |
    | `liver` | liver disorders, two classes, features scaled to [-1, 1] | 145, 5 | even rows of `breast-cancer` |
    | `liver-test` | its test part, in raw units | 200, 5 | odd rows of `breast-cancer`, in raw units |
    | `mnist`, `mnist-test` | handwritten digits, bytes 0 to 255 | 60000 and 10000, 784 | `digits` |
    | `digits`, `diabetes`, `breast-cancer` | as scikit-learn has them | 1797, 64; 442, 10; 569, 30 | |

    Files are looked for in the folder that the environment variable `THEORYLAB_DATA` names, then in the folder `data` of the user's
    cache, then, with `download=True`, fetched into that cache. Each must have the SHA-256 of the table in this module. If there is none,
    the substitute is returned with a `SubstituteDataWarning`; its features are scaled like those of the set it stands in for.

    Args:
        name: one of the names above.
        download: whether the network may be used.

    Raises:
        UnknownNameError: there is no set of that name.
        DatasetError: a file has another checksum, `THEORYLAB_DATA` is no folder, or scikit-learn is needed and absent.

    Example:
        >>> data = load("diabetes")
        >>> data.x.shape, data.y.shape, data.substitute
        ((442, 10), (442,), None)
    """
    if name in _SKLEARN:
        x, y = _SKLEARN[name]()
        return Dataset(x, y, name, "scikit-learn", None)
    if name not in _FILES:
        raise UnknownNameError.of("data set", name, names())
    entry, contents, failure = _FILES[name], [], ""
    for file in entry.files:
        content = _find(file)
        if content is None and download:
            content, failure = _fetch(file)
        if content is None:
            break
        contents.append(content)
    if len(contents) == len(entry.files):
        return Dataset(*entry.read(contents), name, entry.source, None)
    how = f"; the download failed: {failure}" if failure else "" if download else "; load(..., download=True) fetches it"
    warnings.warn(f"data set {name!r} is neither in the folder THEORYLAB_DATA nor in the cache, and {entry.substitute} stands in for it{how}",
                  SubstituteDataWarning, stacklevel=2)
    x, y = entry.stand_in()
    return Dataset(x, y, name, f"scikit-learn, {entry.substitute}", entry.substitute)


def names() -> tuple[str, ...]:
    """Names that `load` knows."""
    return (*_FILES, *_SKLEARN)


# ---------------------------------------------------------------------------------------------------------------- files


def _folders() -> list[Path]:
    given = os.environ.get("THEORYLAB_DATA")
    folders = [runtime.cache_folder() / "data"]
    if given:
        if not Path(given).expanduser().is_dir():
            raise DatasetError(f"the environment variable THEORYLAB_DATA names {given}, which is not a folder")
        folders.insert(0, Path(given).expanduser())
    return folders


def _find(file: _File) -> bytes | None:
    """The verified content of the first file of that name, or None."""
    for folder in _folders():
        for name in file.names:
            path = folder / name
            if path.is_file():
                try:
                    content = path.read_bytes()
                except OSError as error:
                    raise DatasetError(f"{path} cannot be read: {error.strerror or error}") from error
                _verify(content, file, str(path))
                return content
    return None


def _fetch(file: _File) -> tuple[bytes | None, str]:
    """Download into the cache; content, or None and the reason."""
    try:
        with urllib.request.urlopen(file.url, timeout=SECONDS) as answer:
            content = answer.read()
    except (urllib.error.URLError, OSError) as error:
        return None, f"{file.url}: {getattr(error, 'reason', None) or error}"
    _verify(content, file, file.url)
    store.write_bytes(runtime.cache_folder() / "data" / file.names[0], lambda out: out.write(content))
    return content, ""


def _verify(content: bytes, file: _File, where: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise DatasetError(f"{where} is not the file that is expected: its SHA-256 is {found}, not {file.sha256}. "
                           "It was not used; remove it, or put the right file in its place")


# ---------------------------------------------------------------------------------------------------------------- formats


def parse_libsvm(text: str, columns: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    r"""Dense features and targets from LIBSVM text: lines `target index:value ...`, indices from 1 and increasing, zeros left out.

    Args:
        text: content of the file; empty lines and what follows `#` are skipped.
        columns: number of features; the largest index if None.

    Raises:
        DatasetError: a line is malformed; the message gives its number.

    Example:
        >>> x, y = parse_libsvm("1 1:0.5 3:2\n-1 2:1")
        >>> x.tolist(), y.tolist()
        ([[0.5, 0.0, 2.0], [0.0, 1.0, 0.0]], [1.0, -1.0])
    """
    targets, entries = [], []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            targets.append(float(words[0]))
            pairs = [(int(index), float(value)) for index, value in (word.split(":") for word in words[1:])]
        except ValueError as error:
            raise DatasetError(f"line {number} is not LIBSVM text ({error}): {line[:60]!r}") from None
        indices = [index for index, _ in pairs]
        if indices and (indices[0] < 1 or any(b <= a for a, b in itertools.pairwise(indices))):
            raise DatasetError(f"line {number}: indices must begin at 1 and increase, got {indices[:8]}")
        if columns is not None and indices and indices[-1] > columns:
            raise DatasetError(f"line {number}: index {indices[-1]} is above the number of features, {columns}")
        entries.append(pairs)
    width = columns if columns is not None else max((pairs[-1][0] for pairs in entries if pairs), default=0)
    x = np.zeros((len(entries), width))
    for row, pairs in zip(x, entries, strict=True):
        for index, value in pairs:
            row[index - 1] = value
    return x, np.array(targets)


def parse_idx(content: bytes) -> np.ndarray:
    """The array of bytes in a gzipped IDX file, the format of MNIST.

    Raises:
        DatasetError: the content is not of that format.
    """
    try:
        plain = gzip.decompress(content)
    except (OSError, EOFError) as error:
        raise DatasetError(f"not a gzipped IDX file: {error}") from None
    axes = plain[3] if len(plain) > 3 else 0
    shape = tuple(int(n) for n in np.frombuffer(plain[4:4 + 4 * axes], ">u4"))
    if plain[:3] != b"\0\0\x08" or len(plain) != 4 + 4 * axes + int(np.prod(shape)):
        raise DatasetError(f"not an IDX file of bytes: it begins with {plain[:4].hex()} and has {len(plain)} bytes")
    return np.frombuffer(plain, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()


def _regression(columns: int) -> Callable[[list[bytes]], tuple[np.ndarray, np.ndarray]]:
    return lambda contents: parse_libsvm(contents[0].decode(), columns)


def _classes(columns: int) -> Callable[[list[bytes]], tuple[np.ndarray, np.ndarray]]:
    def read(contents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        x, y = parse_libsvm(contents[0].decode(), columns)
        return x, y.astype(int)

    return read


def _images(contents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    images, labels = map(parse_idx, contents)
    return images.reshape(len(images), -1), labels.astype(int)


# ---------------------------------------------------------------------------------------------------------------- scikit-learn


def _sklearn(loader: str) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    def read() -> tuple[np.ndarray, np.ndarray]:
        try:
            from sklearn import datasets
        except ImportError:
            raise DatasetError("this data set comes from scikit-learn, which is not installed: pip install 'theorylab[figures]'") from None
        x, y = getattr(datasets, loader)(return_X_y=True)
        return np.asarray(x, float), np.asarray(y)

    return read


def _scaled(x: np.ndarray) -> np.ndarray:
    """Each column mapped to [-1, 1], as in the scaled files of LIBSVM."""
    low, high = x.min(0), x.max(0)
    return 2 * (x - low) / np.where(high > low, high - low, 1) - 1


def _scaled_diabetes() -> tuple[np.ndarray, np.ndarray]:
    x, y = _SKLEARN["diabetes"]()
    return _scaled(x), y


def _half(first: int, scale: bool) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    """Every second sample of breast-cancer: even ones to train with, odd ones to test with."""

    def read() -> tuple[np.ndarray, np.ndarray]:
        x, y = _SKLEARN["breast-cancer"]()
        return (_scaled(x[first::2]) if scale else x[first::2]), y[first::2]

    return read


def _digit_bytes(first: int) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    """Six of seven digits to train with, the others to test with; pixels 0 to 16 become bytes 0 to 255."""

    def read() -> tuple[np.ndarray, np.ndarray]:
        x, y = _SKLEARN["digits"]()
        test = np.arange(len(x)) % 7 == 6
        mine = test if first else ~test
        return np.round(x[mine] * (255 / 16)).astype(np.uint8), y[mine]

    return read


# ---------------------------------------------------------------------------------------------------------------- tables


def _libsvm(folder: str, *names: str, sha256: str) -> tuple[_File, ...]:
    return (_File(names, f"{LIBSVM}/{folder}/{names[0]}", sha256),)


def _mnist(part: str, images: str, labels: str) -> tuple[_File, ...]:
    names = (f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz")
    return tuple(_File((name,), f"{MNIST}/{name}", digest) for name, digest in zip(names, (images, labels), strict=True))


_SKLEARN: dict[str, Callable[[], tuple[Any, Any]]] = {
    "digits": _sklearn("load_digits"), "diabetes": _sklearn("load_diabetes"), "breast-cancer": _sklearn("load_breast_cancer"),
}
_FILES: dict[str, _Entry] = {
    "mpg": _Entry(_libsvm("regression", "mpg_scale", "mpg_scale.txt",
                          sha256="19176eee7c4cb69ffe858676cd0001f0cd78cd3434d56c9d8509af5550e5da68"),
                  _regression(7), "LIBSVM, mpg_scale", "diabetes", _scaled_diabetes),
    "liver": _Entry(_libsvm("binary", "liver-disorders_scale", "liver_scale.txt",
                            sha256="5313c042b96cc24c4090cfbcc33f527535899ca216abfb14401a15af1f57de91"),
                    _classes(5), "LIBSVM, liver-disorders_scale", "breast-cancer", _half(0, scale=True)),
    "liver-test": _Entry(_libsvm("binary", "liver-disorders.t", "liver_scale_test.txt",
                                 sha256="bc2dd4904d5912ad326bb9798809768b4a80f03556560cd260f8731dcb1877b5"),
                         _classes(5), "LIBSVM, liver-disorders.t", "breast-cancer", _half(1, scale=False)),
    "mnist": _Entry(_mnist("train", "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                           "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
                    _images, "MNIST, training part", "digits", _digit_bytes(0)),
    "mnist-test": _Entry(_mnist("t10k", "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
                         _images, "MNIST, test part", "digits", _digit_bytes(1)),
}
