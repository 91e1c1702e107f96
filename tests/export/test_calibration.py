"""The calibration set: always the same photos, and a folder that is refused before anything is made."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.calibration import LEAST_PHOTOS, SCENES, default_photos, photos_digest, read_photos, rendered_scene
from runtime.errors import ImageError, RequestError
from tests.sample_bundle import noise_photo


def test_default_photos_are_many_and_always_the_same() -> None:
    photos = default_photos()
    assert len(photos) >= 20
    for photo in photos.values():
        assert photo.dtype == np.uint8
        assert photo.shape[2:] == (3,)
    again = default_photos()
    assert list(photos) == list(again)
    assert all(np.array_equal(photo, again[name]) for name, photo in photos.items())


def test_digest_tells_sets_apart_and_ignores_names() -> None:
    one, other = noise_photo(), noise_photo()[::-1].copy()
    digest = photos_digest({"a": one, "b": other})
    assert digest == photos_digest({"x": one, "y": other})
    turned = one.swapaxes(0, 1).reshape(one.shape[1], -1, 3)
    other_sets = (
        {"a": other, "b": one},
        {"a": one},
        {"a": turned, "b": other},
    )
    assert digest not in {photos_digest(photos) for photos in other_sets}


def test_scenes_do_not_depend_on_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.calibration.find_spec", lambda name: None)
    photos = default_photos()
    assert len(photos) == SCENES >= 10
    digest = hashlib.sha256(b"".join(photo.tobytes() for photo in photos.values())).hexdigest()
    assert digest == "432580642cf151aae24c6b282d754b7aa26822bccfa7428a9426894ce920adf3"


def test_scenes_are_dark_and_bright_and_none_is_flat() -> None:
    scenes = [rendered_scene(number) for number in range(SCENES)]
    means = [scene.mean() for scene in scenes]
    assert min(means) < 40
    assert max(means) > 200
    assert min(scene.std() for scene in scenes) > 10


# A folder of the caller's own


def _filled(folder: Path, count: int) -> Path:
    for number in range(count):
        Image.fromarray(noise_photo(seed=number)).save(folder / f"{number}.{'png' if number % 2 else 'webp'}")
    return folder


def test_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    _filled(tmp_path, LEAST_PHOTOS)
    (tmp_path / ".hidden").write_text("of the file manager")
    photos = read_photos(tmp_path)
    assert list(photos) == sorted(photos)
    assert len(photos) == LEAST_PHOTOS
    np.testing.assert_array_equal(photos["1.png"], noise_photo(seed=1))


def test_folder_that_is_missing_empty_or_too_small(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"calibration=.*nowhere does not exist"):
        read_photos(tmp_path / "nowhere")
    with pytest.raises(RequestError, match="holds 0 images; at least 8 are needed"):
        read_photos(tmp_path)
    with pytest.raises(RequestError, match="holds 7 images; at least 8 are needed"):
        read_photos(_filled(tmp_path, 7))
    with pytest.raises(RequestError, match="is a file"):
        read_photos(tmp_path / "1.png")


def test_file_that_is_no_photo_is_named(tmp_path: Path) -> None:
    _filled(tmp_path, LEAST_PHOTOS)
    odd = tmp_path / "letter.jpg"
    odd.write_text("Dear reader")
    with pytest.raises(ImageError, match=r"letter\.jpg is not an image"):
        read_photos(tmp_path)
    odd.unlink()
    os.mkfifo(odd)
    with pytest.raises(ImageError, match=r"letter\.jpg is not a plain file"):
        read_photos(tmp_path)
    odd.unlink()
    Image.new("RGB", (400, 4)).save(odd)
    with pytest.raises(ImageError, match=r"letter\.jpg is 400 x 4; its long side"):
        read_photos(tmp_path)
