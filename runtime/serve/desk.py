"""What the page is about: a bundle, its unpruned twin where it has one, and the photos that were shown to it."""

from __future__ import annotations

import asyncio
import base64
import io
import secrets
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.ask import unpruned_twin
from runtime.bundle import OWN_LAYOUT, Bundle, read_bundle
from runtime.errors import BundleError, PruneportError, RequestError
from runtime.image import load_photo, preprocess, view_jpeg
from runtime.latency import device_name
from runtime.report import subtitle
from runtime.serve.messages import Event, builtins
from runtime.serve.sides import Side
from runtime.text_graphs import VISION_ENCODER

# What the largest phone cameras make fits.
MAX_UPLOAD_BYTES = 64 * 2**20
_PHOTOS = 8


@dataclass(frozen=True)
class _Photo:
    """A photo as each side reads it, pixel_values (views, 3, H, W)."""

    pixels: np.ndarray
    twin_pixels: np.ndarray


class Desk:
    """A bundle and its twin, asked by one at a time; `check` opens the bundle.

    `folder` is a temporary one, for all that is left on the disk meanwhile.
    Raises BundleError or RequestError for a bundle that has nothing to show here.
    """

    def __init__(self, path: Path, folder: Path, *, verbose: bool = False) -> None:
        self.folder = folder
        self.bundle = read_bundle(path)
        self._refuse_what_shows_nothing()
        self._twin: Bundle | None = None
        self._why_no_twin = ""
        try:
            self._twin = self._find_twin()
        except PruneportError as err:
            self._why_no_twin = str(err)
        self._side = Side(path, self.bundle.keeps[0], folder, verbose=verbose)
        self._other: Side | None = None
        if self._twin is not None:
            self._other = Side(self._twin.path, self._twin.manifest.prune.keep, folder, verbose=verbose)
        self._photos: OrderedDict[str, _Photo] = OrderedDict()
        self._busy = asyncio.Lock()
        self._reading = asyncio.Lock()
        golden = self.bundle.golden()
        self._sample = golden.get("photo")

    def _refuse_what_shows_nothing(self) -> None:
        manifest = self.bundle.manifest
        if manifest.target.name == "ios":
            raise RequestError(
                f"{self.bundle.path} is made for Core ML, which runs on a Mac or an iPhone and not here; what can be "
                "done here is `pruneport verify`"
            )
        told = {info.name for info in self.bundle.at().graph(VISION_ENCODER).outputs}
        if not told & {"positions", "kept_indices"}:
            raise BundleError(
                f"{self.bundle.path} is made for {manifest.layout}, and its vision graph does not say which tokens it "
                "keeps: there is nothing to show; ask it there, or export without --layout"
            )

    @property
    def why_no_answer(self) -> str:
        """Why the bundle cannot be asked; empty where it can."""
        manifest = self.bundle.manifest
        if manifest.text is not None:
            return ""
        if manifest.layout != OWN_LAYOUT:
            return (
                f"This bundle is made for {manifest.layout} and answers there. Here it shows the tokens that it keeps."
            )
        return "This bundle has no text graphs, so that it cannot answer. It shows the tokens that it keeps."

    def _find_twin(self) -> Bundle:
        if self.why_no_answer:
            raise BundleError("a bundle that cannot answer is not compared")
        pruned = next((view for view in self.bundle.views if view.manifest.prune.pruned), None)
        if pruned is None:
            raise RequestError("This bundle is unpruned itself: there is nothing to compare it with.")
        try:
            return unpruned_twin(pruned)
        except BundleError as err:
            raise BundleError("No unpruned twin lies beside this bundle. An export with --twin makes both.") from err

    async def check(self) -> None:
        """Hashes the bundle and opens its graphs. Raises what `open_bundle` raises."""
        await self._side.open()

    async def close(self) -> None:
        """Ends both processes, and with them what they are doing."""
        for side in (self._side, self._other):
            if side is not None:
                await side.close()

    def facts(self) -> dict[str, Any]:
        """What the page says of the bundle."""
        manifest = self.bundle.manifest
        rows, columns = manifest.prune.grid
        seed = manifest.weights.seed
        return {
            "name": manifest.name,
            "subtitle": subtitle(self.bundle.at()),
            "keeps": self.bundle.keeps,
            "image_tokens": manifest.prune.image_tokens,
            "rows": rows,
            "columns": columns,
            "overview": manifest.prune.overview,
            "why_no_answer": self.why_no_answer,
            "twin": None if self._twin is None else self._twin.title,
            "why_no_twin": self._why_no_twin,
            "device": device_name(),
            "emulated": self._side.emulated,
            "random_seed": seed,
            "sample": self._sample is not None,
            "max_upload_bytes": MAX_UPLOAD_BYTES,
        }

    def sample_png(self) -> bytes | None:
        """The photo that the bundle was checked with, pixel for pixel; None where it holds none."""
        from PIL import Image

        if self._sample is None:
            return None
        buffer = io.BytesIO()
        Image.fromarray(self._sample).save(buffer, "PNG", compress_level=3)
        return buffer.getvalue()

    async def show(self, path: Path) -> dict[str, str]:
        """Reads a photo: the name it can be asked about by, and the part of it that the model sees, as a JPEG.

        Raises ImageError.
        """
        async with self._reading:  # a photo may take some hundred megabytes while it is read
            photo, jpeg = await asyncio.to_thread(self._read, path)
        name = secrets.token_urlsafe(12)
        self._photos[name] = photo
        while len(self._photos) > _PHOTOS:
            self._photos.popitem(last=False)
        return {"photo": name, "jpeg": base64.b64encode(jpeg).decode("ascii")}

    def _read(self, path: Path) -> tuple[_Photo, bytes]:
        photo = load_photo(path)
        info = self.bundle.manifest.image
        pixels = preprocess(photo, info)
        twin_pixels = pixels if self._twin is None else preprocess(photo, self._twin.manifest.image)
        return _Photo(pixels, twin_pixels), view_jpeg(photo, info)

    def _shown(self, name: str, keep: int) -> _Photo:
        self.bundle.at(keep)  # refuses a keep that it does not have
        photo = self._photos.get(name)
        if photo is None:
            raise RequestError("this photo is no longer here, because others were chosen since; choose it again")
        self._photos.move_to_end(name)
        return photo

    async def kept(self, name: str, keep: int) -> dict[str, Any]:
        """The image tokens that a photo is left with, and the time until it was ready.

        Raises RequestError, EngineError.
        """
        photo = self._shown(name, keep)
        async with self._busy:
            seen = [event async for event in self._side.work(keep, photo.pixels) if event.kept is not None]
        return builtins(seen[0])

    async def answer(self, name: str, keep: int, question: str, *, twin: bool) -> AsyncGenerator[dict[str, Any]]:
        """Asks the bundle and then, on demand, the twin; what happens comes as it happens, each with its side.

        Raises RequestError before anything runs. What fails later is the last that comes: an error.
        """
        photo = self._shown(name, keep)
        if self.why_no_answer:
            raise RequestError(self.why_no_answer)
        if twin and self._other is None:
            raise RequestError(self._why_no_twin)
        return self._answers(photo, keep, question, twin=twin)

    async def _answers(self, photo: _Photo, keep: int, question: str, *, twin: bool) -> AsyncGenerator[dict[str, Any]]:
        if self._busy.locked():
            yield {"waiting": True}
        async with self._busy:
            turns = [("bundle", self._side, keep, photo.pixels)]
            if twin:
                assert self._twin is not None
                assert self._other is not None
                turns.append(("twin", self._other, self._twin.manifest.prune.keep, photo.twin_pixels))
            for name, side, at, pixels in turns:
                yield {"side": name, "begins": True}
                try:
                    # Closed at once when the reader leaves, not when the garbage is collected.
                    async with aclosing(side.work(at, pixels, question)) as events:
                        async for event in events:
                            yield {"side": name, **_told(event)}
                except PruneportError as err:
                    yield {"side": name, "error": str(err)}
                    return


def _told(event: Event) -> dict[str, Any]:
    return {field: value for field, value in builtins(event).items() if field not in ("job", "kept")}
