"""The calibration set: always the same photos, and a folder that is refused before anything is made."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from export.calibration import SCENES, default_photos, rendered_scene


def test_default_photos_are_many_and_always_the_same() -> None:
    photos = default_photos()
    assert len(photos) >= 20
    for photo in photos.values():
        assert (photo.dtype, photo.ndim, photo.shape[2]) == (np.uint8, 3, 3)
    again = default_photos()
    assert list(photos) == list(again)
    assert all(np.array_equal(photo, again[name]) for name, photo in photos.items())


def test_scenes_do_not_depend_on_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.calibration.find_spec", lambda name: None)
    photos = default_photos()
    assert len(photos) == SCENES >= 10
    digest = hashlib.sha256(b"".join(photo.tobytes() for photo in photos.values())).hexdigest()
    assert digest == "432580642cf151aae24c6b282d754b7aa26822bccfa7428a9426894ce920adf3"


def test_scenes_go_from_dark_to_bright_and_none_is_flat() -> None:
    scenes = [rendered_scene(number) for number in range(SCENES)]
    assert scenes[0].mean() < 40
    assert scenes[-1].mean() > 160
    for scene in scenes:
        assert scene.std() > 10
