"""Text to train on: splits by file, the same everywhere; errors that say what to do."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from widthwise.derive.errors import DeriveError  # noqa: E402
from widthwise.verify.data import corpus  # noqa: E402


def test_a_file_gives_its_last_tenth(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(250)) * 200)
    text = corpus(tmp_path / "text")
    assert (len(text.train), len(text.valid)) == (45_000, 5_000)
    assert bytes(text.valid[:10].tolist()) == bytes(range(10))


def test_a_folder_is_split_by_file(tmp_path: Path) -> None:
    for index in range(60):
        (tmp_path / f"{index}.txt").write_bytes(bytes([index]) * 2000)
    (tmp_path / ".hidden").write_bytes(b"\xff" * 2000)
    text = corpus(tmp_path)
    train, valid = set(text.train.tolist()), set(text.valid.tolist())
    assert train | valid == set(range(60))
    assert not train & valid
    assert torch.equal(corpus(tmp_path).valid, text.valid)


def test_a_folder_of_few_files_is_split_within_them(tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_bytes(bytes(range(250)) * 200)
    text = corpus(tmp_path)
    assert (len(text.train), len(text.valid)) == (45_000, 5_000)


def test_the_default_is_the_standard_library() -> None:
    text = corpus()
    assert len(text.train) > 5e6
    assert 0.02 < len(text.valid) / len(text.train) < 0.3


def test_batches_are_shifted_by_one_and_repeatable(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(250)) * 200)
    text = corpus(tmp_path / "text")
    tokens, targets = next(text.batches(3, 16, seed=0))
    assert tokens.shape == targets.shape == (3, 16)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert torch.equal(next(text.batches(3, 16, seed=0))[0], tokens)
    assert not torch.equal(next(text.batches(3, 16, seed=1))[0], tokens)


@pytest.mark.parametrize(("make", "says"), [(None, "does not exist"), (b"short", "5 bytes of text, too few")])
def test_what_cannot_be_read_is_an_error(tmp_path: Path, make: bytes | None, says: str) -> None:
    path = tmp_path / "text"
    if make is not None:
        path.write_bytes(make)
    with pytest.raises(DeriveError, match=says):
        corpus(path)
