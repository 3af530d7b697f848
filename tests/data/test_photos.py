"""Images that are opened when asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hatcl.data.images import ImageData, Images
from hatcl.data.photos import Photos, Pictured
from hatcl.errors import ConfigError, IntegrityError


def to_tensor(image):
    return torch.from_numpy(np.asarray(image.resize((4, 4)))).permute(2, 0, 1).float()


@pytest.fixture
def photos(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths):
        Image.fromarray(np.full((6 + i, 8), 10 * i, dtype=np.uint8)).save(path)  # of different sizes, grey
    return Photos(paths)


def test_photos_are_indexed_as_an_array_is(photos):
    for at in (slice(1, 3), np.array([4, 0]), np.array([], dtype=int)):
        want = (10 * np.arange(5))[at].tolist()
        assert [np.asarray(p)[0, 0].tolist() for p in photos[at]] == [[v] * 3 for v in want]
    assert len(photos) == 5 and len(photos[1:][np.array([0])]) == 1


def test_they_are_prepared_as_arrays_are(photos):
    data = Images(photos, np.arange(5), Pictured(to_tensor))
    x = torch.cat([x for x, _ in data.batches(2)])
    assert x.shape == (5, 3, 4, 4) and x[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40]
    assert torch.equal(data[3][0], x[3]) and data[3][1] == 3
    assert torch.equal(data.at(torch.tensor([4, 2])).batches(9).__iter__().__next__()[0], x[[4, 2]])


@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 4, 4, 1), (2, 4, 4, 3)])
def test_arrays_are_taken_too(shape):
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    want = torch.from_numpy(np.broadcast_to(x.reshape(2, 4, 4, -1), (2, 4, 4, 3)).copy()).permute(0, 3, 1, 2).float()
    assert torch.equal(Pictured(to_tensor)(x), want)
    with pytest.raises(ConfigError, match="images: got float64, expected uint8"):
        Pictured(to_tensor)(x / 255)


def test_a_file_that_is_none_is_named(photos, tmp_path):
    (tmp_path / "2.png").write_bytes(b"nothing")
    with pytest.raises(IntegrityError, match="2.png cannot be read as an image"):
        list(photos)
    (tmp_path / "0.png").unlink()
    with pytest.raises(IntegrityError, match="0.png cannot be read as an image"):
        list(photos)


def test_the_digest_is_of_names_sizes_and_labels(photos, tmp_path):
    y = np.arange(5)
    data = ImageData("it", photos, y, photos[:2], y[:2], 5, tuple("abcde"))
    same = ImageData("other", photos, y, photos[:2], y[:2], 5)
    assert data.digest() == same.digest()
    assert data.digest() != ImageData("it", photos, y[::-1], photos[:2], y[:2], 5).digest()
    before = data.digest()
    (tmp_path / "3.png").write_bytes(b"longer than before" * 100)
    assert data.digest() != before
    with pytest.raises(ConfigError, match="task 'it' has no images to test"):
        ImageData("it", photos, y, photos[:0], y[:0], 5)
