"""The interface of a pruning method: what it needs, what it decides, and the module that decides it in a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pruning.spec import PruneSpec, SpecError

Need = Literal["keys", "attention", "question"]
# What an engine computes a pruner in, whatever the dtypes that a program declares.
Arithmetic = Literal["float32", "float16"]
ARITHMETICS: tuple[Arithmetic, ...] = ("float32", "float16")

S = TypeVar("S")


class Features(NamedTuple):
    """What a method may look at, for B images of N tokens; what it does not need may be missing.

    hidden     (B, N, D) what enters the cut, and what is kept of
    keys       (B, N, Dk) of the layer before the cut, after rotary embedding, all heads side by side
    attention  (B, N) the share of its attention, averaged over heads, that one token gives to each image token: behind
               the projector the class token in the tower's last layer, in the decoder the question's last token in
               the layer before the cut
    question   (B, T, D) the embedded question
    """

    hidden: Tensor
    keys: Tensor | None = None
    attention: Tensor | None = None
    question: Tensor | None = None


class Kept(NamedTuple):
    """What a module hands on: tokens (B, keep, D), indices (B, keep) ascending, filled (B, 1) float32.

    Indices are int64. In an exported program they are float32 whole numbers, because mobile delegates have no int64,
    or int32 where the arithmetic does not hold them. `filled` counts the tokens that only filled up, because a fixed
    number of steps ran out.
    """

    tokens: Tensor
    indices: Tensor
    filled: Tensor


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What kept tokens are mixed of: each dropped token goes into its most similar kept one.

    Attributes:
        similarity: (B, N, N), which decides who stands for whom, and weighs.
        share: of a kept token that is replaced by the mean of those it stands for; 0 where they stay as they are, so
            that the rows of any other choice are known too.
        least_share: of the sum of absolute weights that the sum of weights must exceed, or nothing is mixed.
    """

    similarity: Tensor
    share: float
    least_share: float


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Everything a selection decided, for B images.

    Attributes:
        tokens: (B, keep, D) kept tokens, in position order.
        indices: (B, keep) int64, ascending.
        order: (B, keep) int64, the same positions in the order of selection.
        margin: (B, keep) float32, in the order of selection: how far the deciding number was from the next answer;
            infinite where no number decided.
        marks: (B, M) int64, the tokens that a picture of the selection should mark, in order; M may be 0.
        recovery: what `tokens` are mixed of, for this choice and any other; None where that is not told.
        mix: (B, keep, N) of which the product with `hidden` is `tokens`; None where `recovery` tells it, or they are
            rows of `hidden` as they are.
    """

    tokens: Tensor
    indices: Tensor
    order: Tensor
    margin: Tensor
    marks: Tensor
    recovery: Recovery | None = None
    mix: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """Where a method may prune: 0 is behind the projector, n in front of decoder layer n; `most` None has no end."""

    least: int = 0
    most: int | None = None

    def allow(self, cut: int) -> bool:
        """True where the method may prune."""
        return self.least <= cut and (self.most is None or cut <= self.most)

    def __str__(self) -> str:
        return f"{self.least} or more" if self.most is None else f"{self.least}..{self.most}"


class Method(Protocol):
    """A way to choose `keep` of N image tokens, in two forms that agree: a readable loop and a static module.

    Attributes:
        name: as requests and manifests spell it.
        needs: what it looks at beside `hidden`.
        cuts: where it may prune.
        arithmetics: what it has static forms for.
        settings: the frozen dataclass of its constants, all of them numbers, with the paper's as defaults.
    """

    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> frozenset[Need]: ...
    @property
    def cuts(self) -> Cuts: ...
    @property
    def arithmetics(self) -> tuple[Arithmetic, ...]: ...
    @property
    def settings(self) -> type[Any]: ...

    def choose(self, features: Features, spec: PruneSpec) -> Trace:
        """Chooses as the paper tells it: the oracle. SpecError for features or a spec that have no answer."""
        ...

    def module(self, spec: PruneSpec, arithmetic: Arithmetic) -> nn.Module:
        """Builds the static form, Features -> Kept, for engines that compute in `arithmetic`.

        SpecError for a spec that the form does not cover.
        """
        ...


def settings_of(spec: PruneSpec, name: str, kind: type[S]) -> S:
    """Gives the spec's settings for the method `name`, its defaults where there are none; SpecError for another's."""
    if spec.method != name:
        raise SpecError(f"the spec asks for method={spec.method!r}, this is {name!r}; take METHODS[spec.method]")
    if spec.settings is None:
        return kind()
    if not isinstance(spec.settings, kind):
        raise SpecError(f"settings={spec.settings!r} are not those of method {name!r}; give a {kind.__qualname__}")
    return spec.settings


def check_arithmetic(arithmetic: str, method: Method) -> None:
    """Refuses the name of an arithmetic that no module is built for, or none of the method's; SpecError."""
    if arithmetic not in ARITHMETICS:
        raise SpecError(f"arithmetic={arithmetic!r} is not known; allowed: {', '.join(ARITHMETICS)}")
    if arithmetic not in method.arithmetics:
        raise SpecError(
            f"method {method.name!r} has no static form for engines that compute in {arithmetic}: its choices take "
            f"more bits; it has one for {', '.join(method.arithmetics)}"
        )


def needed(features: Features, spec: PruneSpec, needs: frozenset[Need]) -> Features:
    """Gives hidden states and, of the rest, what a method needs; SpecError for features that have no defined answer.

    While a program is traced only shapes are looked at.
    """
    for need in sorted(needs):
        if getattr(features, need) is None:
            raise SpecError(f"method {spec.method!r} needs {need}, and the features hold none")
    given = Features(
        features.hidden, *(getattr(features, name) if name in needs else None for name in Features._fields[1:])
    )
    (check_shapes if torch.compiler.is_exporting() else check_features)(given, spec)
    return given


def check_features(features: Features, spec: PruneSpec) -> None:
    """Refuses features that have no defined answer; SpecError."""
    check_shapes(features, spec)
    for name, tensor in _given(features):
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise SpecError(f"{name} holds {bad} values that are NaN or infinite; only finite features can be ranked")
    if features.attention is not None and bool((features.attention < 0.0).any()):
        raise SpecError("attention holds negative values; expected shares, as a softmax gives them")


def check_shapes(features: Features, spec: PruneSpec) -> None:
    """Refuses features whose shapes do not fit the spec; SpecError."""
    for name, tensor in _given(features):
        if name == "attention":
            fits, expected = tensor.dim() == 2 and tensor.shape[1] == spec.tokens, f"(B, {spec.tokens})"
        else:
            fits = tensor.dim() == 3 and (name == "question" or tensor.shape[1] == spec.tokens)
            expected = f"(B, {'T' if name == 'question' else spec.tokens}, channels)"
        if not fits or 0 in tensor.shape:
            raise SpecError(f"{name} has shape {tuple(tensor.shape)}; expected {expected} for {spec.views}")
        if not tensor.is_floating_point():
            raise SpecError(f"{name} has dtype {tensor.dtype}; expected float16, bfloat16, float32 or float64")
        if len(tensor) != len(features.hidden):
            held = f"{name} hold{'' if name == 'keys' else 's'} {len(tensor)} images"
            raise SpecError(f"{held} and hidden {len(features.hidden)}; expected the same number")


def _given(features: Features) -> list[tuple[str, Tensor]]:
    names = ("keys", "attention", "question", "hidden")
    return [(name, x) for name in names if (x := getattr(features, name)) is not None]
