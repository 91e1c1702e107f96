"""What the server and the process of one bundle say to each other: one JSON object a line."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

STOP = b"\n"
"""The line that ends the job that is running."""


class PhotoJob(msgspec.Struct, frozen=True, kw_only=True):
    """A photo to see at one keep and, with a question, to be asked about. Any further line ends the answer."""

    number: int
    keep: int
    shape: tuple[int, ...]
    pixels: bytes
    question: str | None = None

    @classmethod
    def of(cls, number: int, keep: int, pixels: np.ndarray, question: str | None) -> PhotoJob:
        """The job for pixel_values (views, 3, H, W) float32."""
        return cls(number=number, keep=keep, shape=pixels.shape, pixels=pixels.tobytes(), question=question)

    @property
    def pixel_values(self) -> np.ndarray:
        """The photo and, where it is seen in tiles, these: (views, 3, H, W) float32."""
        return np.frombuffer(self.pixels, np.float32).reshape(self.shape)


class Numbers(msgspec.Struct, frozen=True, kw_only=True):
    """What one answer took; None where there was no token, or only one.

    `peak_rss_bytes` is of the whole process since it was started; it has one bundle open.
    """

    image_ready_ms: float
    ttft_ms: float | None
    tokens_per_s: float | None
    tokens: int
    question_tokens: int
    kv_cache_bytes: int
    peak_rss_bytes: int


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something that happened in a job; in job 0 the bundle was opened, or could not be.

    `kept` are the image tokens that the photo was left with, `error` is one message of the class `kind`, and `end` is
    True in the last event of a job.
    """

    job: int
    kept: tuple[int, ...] | None = None
    image_ready_ms: float | None = None
    piece: str | None = None
    numbers: Numbers | None = None
    emulated: bool = False
    error: str | None = None
    kind: str | None = None
    end: bool = False


def line(message: msgspec.Struct) -> bytes:
    """A message as one line."""
    return msgspec.json.encode(message) + b"\n"


def builtins(message: msgspec.Struct) -> dict[str, Any]:
    """A message as the page gets it."""
    plain: dict[str, Any] = msgspec.to_builtins(message)
    return plain
