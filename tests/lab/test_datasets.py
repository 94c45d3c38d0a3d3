"""A data set is the verified one, or a substitute that says so. No test reaches the network."""

import gzip
import hashlib
import io
import socket
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.datasets import dump_svmlight_file, load_breast_cancer, load_diabetes, load_digits

from theorylab.errors import DatasetError, UnknownNameError
from theorylab.lab import datasets
from theorylab.lab.datasets import SubstituteDataWarning, load, parse_idx, parse_libsvm

X = np.arange(21.0).reshape(3, 7) - 5
Y = np.array([18.0, -1.5, 0.25])


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """An empty data folder and an empty cache; a network that fails the test."""
    def refuse(*arguments, **options):
        raise AssertionError("the network was used")

    (tmp_path / "given").mkdir()
    monkeypatch.setenv("THEORYLAB_DATA", str(tmp_path / "given"))
    monkeypatch.setenv("THEORYLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(socket, "socket", refuse)
    return tmp_path


def libsvm_text(x=X, y=Y):
    """The text that scikit-learn writes."""
    out = io.BytesIO()
    dump_svmlight_file(x, y, out, zero_based=False)
    return out.getvalue()


def expect(monkeypatch, name, *contents):
    """Let the table expect these contents."""
    entry = datasets._FILES[name]
    files = tuple(file._replace(sha256=hashlib.sha256(content).hexdigest()) for file, content in zip(entry.files, contents, strict=True))
    monkeypatch.setitem(datasets._FILES, name, entry._replace(files=files))


def answer(monkeypatch, contents):
    """A network that knows these addresses."""
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        if url not in contents:
            raise urllib.error.URLError("no route to host")
        return io.BytesIO(contents[url])

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


# ---------------------------------------------------------------------------------------------------------------- where files come from


@pytest.mark.parametrize("file", ["mpg_scale", "mpg_scale.txt"])
def test_a_file_in_the_data_folder_is_read(folders, monkeypatch, file):
    expect(monkeypatch, "mpg", libsvm_text())
    (folders / "given" / file).write_bytes(libsvm_text())
    data = load("mpg")
    assert (data.x == X).all() and (data.y == Y).all()
    assert (data.name, data.source, data.substitute) == ("mpg", "LIBSVM, mpg_scale", None)


def test_the_data_folder_comes_before_the_cache(folders, monkeypatch):
    expect(monkeypatch, "mpg", libsvm_text())
    (folders / "cache" / "data").mkdir(parents=True)
    (folders / "cache" / "data" / "mpg_scale").write_bytes(libsvm_text())
    assert (load("mpg").x == X).all()
    (folders / "given" / "mpg_scale").write_bytes(b"other")
    with pytest.raises(DatasetError, match="given/mpg_scale is not the file that is expected"):
        load("mpg")


@pytest.mark.parametrize("place", ["given", "cache/data"])
def test_a_file_with_another_checksum_is_refused_and_kept(folders, place):
    path = folders / place / "mpg_scale"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(libsvm_text())
    digest = hashlib.sha256(libsvm_text()).hexdigest()
    with pytest.raises(DatasetError, match=f"{place}/mpg_scale is not the file that is expected: its SHA-256 is {digest}, not 19176eee"):
        load("mpg", download=True)
    assert path.read_bytes() == libsvm_text()


def test_a_download_is_verified_kept_and_not_repeated(folders, monkeypatch):
    url = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary/liver-disorders_scale"
    text = libsvm_text(X[:, :5], np.array([0, 1, 1]))
    expect(monkeypatch, "liver", text)
    asked = answer(monkeypatch, {url: text})
    first, second = load("liver", download=True), load("liver", download=True)
    assert asked == [url]
    assert (first.x == X[:, :5]).all() and first.y.tolist() == [0, 1, 1] and first.y.dtype.kind == "i" and (second.x == first.x).all()
    assert [p.name for p in (folders / "cache" / "data").iterdir()] == ["liver-disorders_scale"]
    assert list((folders / "given").iterdir()) == []


def test_a_download_with_another_checksum_is_refused_and_not_kept(folders, monkeypatch):
    answer(monkeypatch, {datasets._FILES["mpg"].files[0].url: b"<html>moved</html>"})
    with pytest.raises(DatasetError, match="regression/mpg_scale is not the file that is expected"):
        load("mpg", download=True)
    assert not (folders / "cache").exists()


def test_a_data_folder_that_is_none_is_named(monkeypatch):
    monkeypatch.setenv("THEORYLAB_DATA", "/no/such/folder")
    with pytest.raises(DatasetError, match="THEORYLAB_DATA names /no/such/folder, which is not a folder"):
        load("mpg")


def test_an_unknown_name_lists_its_neighbors():
    with pytest.raises(UnknownNameError, match="data set 'mgp' is not known; did you mean 'mpg'"):
        load("mgp")


# ---------------------------------------------------------------------------------------------------------------- substitutes


def test_without_file_and_network_a_substitute_says_so(monkeypatch):
    with pytest.warns(SubstituteDataWarning, match=r"'mpg' is neither .* and diabetes stands in for it; load\(\.\.\., download=True\) fetches it"):
        data = load("mpg")
    raw, target = load_diabetes(return_X_y=True)
    assert data.substitute == "diabetes" and data.source == "scikit-learn, diabetes" and (data.y == target).all()
    assert (data.x.min(0) == -1).all() and (data.x.max(0) == 1).all()
    assert np.allclose([np.corrcoef(a, b)[0, 1] for a, b in zip(data.x.T, raw.T, strict=True)], 1)
    answer(monkeypatch, {})
    with pytest.warns(SubstituteDataWarning, match="the download failed: https://.*mpg_scale: no route to host"):
        load("mpg", download=True)


def test_the_parts_of_a_substitute_share_no_sample():
    with pytest.warns(SubstituteDataWarning):
        train, test = load("liver"), load("liver-test")
    raw, target = load_breast_cancer(return_X_y=True)
    assert (test.x == raw[1::2]).all() and (test.y == target[1::2]).all() and (train.y == target[::2]).all() and train.y.dtype.kind == "i"
    assert (np.abs(train.x) <= 1).all()
    with pytest.warns(SubstituteDataWarning):
        train, test = load("mnist"), load("mnist-test")
    raw, _ = load_digits(return_X_y=True)
    assert len(train.x) + len(test.x) == len(raw) and train.x.dtype == np.uint8 and train.x.max() == 255
    assert (np.round(test.x * (16 / 255)) == raw[6::7]).all()


@pytest.mark.parametrize(("name", "reference"), [("digits", load_digits), ("diabetes", load_diabetes), ("breast-cancer", load_breast_cancer)])
def test_sets_of_scikit_learn_come_as_they_are(name, reference):
    x, y = reference(return_X_y=True)
    data = load(name)
    assert (data.x == x).all() and (data.y == y).all() and data.substitute is None


def test_without_scikit_learn_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(DatasetError, match=r"pip install 'theorylab\[figures\]'"):
        load("digits")


# ---------------------------------------------------------------------------------------------------------------- formats


@settings(max_examples=20, deadline=None, derandomize=True)
@given(rows=st.lists(st.lists(st.sampled_from([0.0, 1.0, -0.5, 1e-3, 123456.0]), min_size=3, max_size=3), min_size=1, max_size=6))
def test_libsvm_text_comes_back_as_the_matrix_that_was_written(rows):
    x, y = np.array(rows), np.arange(len(rows)) - 1.0
    back, targets = parse_libsvm(libsvm_text(x, y).decode(), columns=3)
    assert (back == x).all() and (targets == y).all()


def test_comments_and_empty_lines_are_skipped_and_the_width_is_the_largest_index():
    x, y = parse_libsvm("# head\n\n+1  2:3 # tail\n2\n")
    assert x.tolist() == [[0, 3], [0, 0]] and y.tolist() == [1, 2]


@pytest.mark.parametrize(("line", "match"), [
    ("1 a:2", "line 2 is not LIBSVM text"), ("x 1:2", "line 2 is not LIBSVM text"), ("1 1:2:3", "line 2 is not LIBSVM text"),
    ("1 0:2", "line 2: indices must begin at 1 and increase"), ("1 2:1 1:1", "line 2: indices must begin at 1 and increase"),
    ("1 9:1", "line 2: index 9 is above the number of features, 3"),
])
def test_malformed_lines_are_named(line, match):
    with pytest.raises(DatasetError, match=match):
        parse_libsvm(f"1 1:1\n{line}\n", columns=3)


def idx(array):
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes())


def test_mnist_is_read_from_its_two_files(folders, monkeypatch):
    images, labels = np.arange(12, dtype=np.uint8).reshape(3, 2, 2), np.array([7, 0, 9], np.uint8)
    expect(monkeypatch, "mnist-test", idx(images), idx(labels))
    (folders / "given" / "t10k-images-idx3-ubyte.gz").write_bytes(idx(images))
    answer(monkeypatch, {"https://storage.googleapis.com/cvdf-datasets/mnist/t10k-labels-idx1-ubyte.gz": idx(labels)})
    data = load("mnist-test", download=True)
    assert (data.x == images.reshape(3, 4)).all() and data.y.tolist() == [7, 0, 9]


@pytest.mark.parametrize("content", [b"plain", gzip.compress(b""), gzip.compress(b"\0\0\x08\x01\0\0\0\x05abc"), idx(np.zeros(3, np.uint8))[:-9],
                                     gzip.compress(b"\0\0\x0d\x01\0\0\0\x00")],
                         ids=["not gzip", "empty", "short", "cut", "other type"])
def test_what_is_not_idx_is_refused(content):
    with pytest.raises(DatasetError, match=r"not a(n| gzipped) IDX file"):
        parse_idx(content)
