"""A whole model of transformers that drops image tokens in front of one decoder layer while it generates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from export.evaluation.run import usual_cut
from export.evaluation.views import View, image_views, layout_of, shares, square
from export.share import Share, is_share, read_share
from pruning import METHODS, Features, PruneSpec, selector
from runtime.errors import RequestError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from export.evaluation.views import Inputs


class PrunedModel:
    """generate() of transformers' LLaVA-1.5, LLaVA-NeXT or Qwen-VL, with fewer image tokens from layer `cut` on.

    Layers in front of the cut see every token. Those behind it see the kept ones, which keep their positions, and all
    of the text, whose positions are those of the unpruned prompt. The model itself is not changed.

    Each view of an image is chosen from alone, on its own grid. An image of LLaVA-NeXT has two, and they share `keep`
    in proportion to their tokens; the token that ends a row stays where one of its row does, and is not counted.

    Attributes:
        model: transformers' model, in whatever dtype and wherever it is.
        cut: the decoder layer in front of which tokens are dropped; 0 is behind the projector.
        kept: of the last prompt, for each view of each image, the tokens that stayed, ascending.
    """

    def __init__(self, model: Any, *, method: str, keep: int | float | str, cut: int | None = None) -> None:
        """Takes `keep` as a number of tokens an image or as a share, 0.11 or `11%`; `cut` None is the method's usual.

        Raises RequestError for a model, method, keep or cut that does not go with the others.
        """
        config, text = model.config, model.config.get_text_config()
        layout_of(config.model_type)
        if method not in METHODS:
            raise RequestError(f"method={method} is not known; allowed: {', '.join(METHODS)}")
        cuts, needs = METHODS[method].cuts, METHODS[method].needs
        # Behind the first layers of Qwen3-VL features of the tower are added to all image tokens.
        least = len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
        self.cut = usual_cut(METHODS[method], least) if cut is None else cut
        if type(self.cut) is not int or not cuts.allow(self.cut) or not least <= self.cut < text.num_hidden_layers:
            raise RequestError(
                f"cut={cut}: {method} may prune at {cuts}, and the model at {least}..{text.num_hidden_layers - 1}; "
                "leave cut out, or give one that both allow"
            )
        wanted = _wanted(keep)
        if config.model_type == "llava" and isinstance(wanted, int) and wanted > (most := square(config) ** 2):
            raise RequestError(f"keep={keep}: an image has {most} tokens; keep as many or fewer, or leave keep out")
        if self.cut == 0 and needs and config.model_type != "llava":
            raise RequestError(
                f"cut=0: {method} looks at {' and '.join(sorted(needs))} of the tower's last layer, which are told for "
                f"LLaVA-1.5 alone, and this is {config.model_type}; prune at 1 or later, or by a method that needs none"
            )
        if "attention" in needs and any(part._attn_implementation != "eager" for part in (text, config.vision_config)):
            raise RequestError(
                f"method={method} looks at attention, which only transformers' eager attention tells; "
                "load the model with attn_implementation=eager"
            )
        kinds = getattr(text, "layer_types", None)
        window = getattr(text, "sliding_window", None)
        if "sliding_attention" in kinds if kinds else window is not None:
            raise RequestError(
                "the decoder has layers with a sliding window, which would move as tokens are dropped; "
                "give a checkpoint whose layers all see everything"
            )
        self.model, self.kept = model, list[list[list[int]]]()
        self._keep, self._method = wanted, method
        self._selector = lru_cache(maxsize=64)(self._new_selector)

    @torch.no_grad()
    def generate(self, inputs: Inputs, **settings: Any) -> Tensor:
        """Answers one prompt, input_ids (1, T) and what else the processor made of it: the new ids (1, M).

        `settings` are those of transformers' generate(). Raises RequestError as `image_views` does, for padding, and
        for several beams.
        """
        if "attention_mask" in inputs and not bool(inputs["attention_mask"].all()):
            raise RequestError("the prompt is padded; give it alone, as it is")
        images = image_views(self.model.config, inputs)
        length = inputs["input_ids"].shape[1]
        run = _Run(self, images, length)
        with ExitStack() as hooks:
            if images:
                for hook in run.hooks():
                    hooks.callback(hook.remove)
            ids: Tensor = self.model.generate(**inputs, **{**settings, "use_cache": True})
        self.kept = run.kept
        return ids[:, length:]

    def select(self, view: View, keep: int, features: Features) -> tuple[Tensor, Tensor]:
        """Chooses from one view: features of N tokens -> tokens (1, keep, D), indices (keep,)."""
        tokens, indices = self._selector(view.grid, keep, features.hidden.device)(features)
        return tokens, indices[0]

    def shares(self, views: Sequence[View]) -> list[int]:
        """How many tokens each view of an image keeps."""
        return shares(self._keep, [len(view.slots) for view in views])

    def _new_selector(
        self, grid: tuple[int, int], keep: int, device: torch.device
    ) -> Callable[[Features], tuple[Tensor, Tensor]]:
        return selector(PruneSpec(grid=grid, keep=keep, method=self._method), device)


class _Run:
    """One prompt on its way through the model: what layers in front of the cut show, and what those behind it get."""

    def __init__(self, pruned: PrunedModel, images: Sequence[Sequence[View]], length: int) -> None:
        self._pruned, self._images, self._length = pruned, images, length
        self._decoder: Any = pruned.model.model.language_model
        self.kept: list[list[list[int]]] = []
        # One token each: (1, T, Dk), (1, T) and (1, T, D); at cut 0 the first two are the tower's, one row an image.
        self._keys: Tensor | None = None
        self._attention: Tensor | None = None
        self._embedded: Tensor | None = None
        self._instead: dict[str, Any] = {}

    def hooks(self) -> Iterator[RemovableHandle]:
        """Hangs itself into the model."""
        layers, cut = self._decoder.layers, self._pruned.cut
        if cut == 0 and self._pruned.model.config.model_type == "llava":
            yield from self._tower_hooks()
        yield layers[0].register_forward_pre_hook(self._embed)
        if cut:
            yield layers[cut - 1].self_attn.register_forward_hook(self._look)
        for index in range(cut, len(layers)):
            hook = self._cut if index == cut else self._follow
            yield layers[index].register_forward_pre_hook(hook, with_kwargs=True)

    def _tower_hooks(self) -> Iterator[RemovableHandle]:
        """The keys and the class token's attention of the last layer that the projector's input comes from."""
        config, tower = self._pruned.model.config, self._pruned.model.model.vision_tower
        layer = config.vision_feature_layer
        if type(layer) is not int:
            raise RequestError(f"vision_feature_layer={layer}: at cut 0 one layer of the tower is looked at; cut at 1")
        layers = tower.encoder.layers
        attention = layers[layer - 1 if layer >= 0 else len(layers) + layer].self_attn

        def keys(_module: object, _inputs: object, output: Tensor) -> None:
            self._keys = output[:, 1:]

        def looks(_module: object, _inputs: object, output: tuple[Tensor, Tensor | None]) -> None:
            self._attention = None if output[1] is None else output[1].float().mean(1)[:, 0, 1:]

        yield attention.k_proj.register_forward_hook(keys)
        yield attention.register_forward_hook(looks)

    def _embed(self, _module: object, args: tuple[Any, ...]) -> None:
        if self._embedded is None:
            self._embedded = args[0]

    def _look(self, _module: object, _args: object, output: tuple[Tensor, Tensor | None]) -> None:
        """What the last token looks at in front of the cut, where transformers tells it."""
        if self._attention is None and output[1] is not None:
            self._attention = output[1].float().mean(1)[:, -1]

    def _cut(self, _module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Drops tokens of the prompt; a token that follows it sees whatever is left."""
        hidden = args[0]
        if len(hidden) != 1:
            raise RequestError(f"{len(hidden)} answers to one prompt at once; generate with num_beams=1")
        if self.kept:
            if hidden.shape[1] != 1:
                raise RequestError(f"{hidden.shape[1]} tokens at once behind the prompt; generate them one by one")
            self._instead = {"attention_mask": None, "position_ids": None}
            return self._follow(_module, args, kwargs)
        if hidden.shape[1] != self._length:
            raise RequestError(
                f"the prompt comes in pieces of {hidden.shape[1]} tokens; generate without prefill_chunk_size"
            )
        if self._pruned.cut:
            cached = kwargs["past_key_values"].layers[self._pruned.cut - 1].keys
            self._keys = cached.transpose(1, 2).flatten(2)
        hidden, stays = self._chosen(hidden)
        eager = self._decoder.config._attn_implementation == "eager"
        self._instead = {
            # Others than eager are causal without a mask, and would take positions with gaps for several texts.
            "attention_mask": _causal(len(stays), hidden) if eager else None,
            "position_ids": None,
            "position_embeddings": tuple(table[..., stays, :] for table in kwargs["position_embeddings"]),
        }
        return self._follow(_module, (hidden[:, stays], *args[1:]), kwargs)

    def _follow(self, _module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, **self._instead}

    def _chosen(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Chooses from every view: (1, T, D) -> the same with kept tokens as they become, and the places that stay."""
        becomes = hidden.clone()
        stays = torch.ones(self._length, dtype=torch.bool, device=hidden.device)
        for number, views in enumerate(self._images):
            self.kept.append([])
            for view, keep in zip(views, self._pruned.shares(views), strict=True):
                slots = torch.tensor(view.slots, device=hidden.device)
                indices = torch.arange(len(slots), device=hidden.device)[:keep]
                if 0 < keep < len(slots):
                    tokens, indices = self._pruned.select(view, keep, self._features(hidden, slots, number))
                    becomes[:, slots[indices]] = tokens
                stays[slots] = False
                stays[slots[indices]] = True
                if view.line_ends:
                    ends = torch.tensor(view.line_ends, device=hidden.device)
                    stays[ends] = False
                    stays[ends[indices // view.grid[1]]] = True
                self.kept[-1].append(indices.tolist())
        return becomes, stays.nonzero()[:, 0]

    def _features(self, hidden: Tensor, slots: Tensor, number: int) -> Features:
        """What may be looked at of one view of image `number`."""
        assert self._embedded is not None
        question = self._embedded[:, int(self._images[-1][-1].slots[-1]) + 1 :]
        if self._pruned.cut:
            keys = None if self._keys is None else self._keys[:, slots]
            attention = None if self._attention is None else self._attention[:, slots]
        else:
            keys = None if self._keys is None else self._keys[number : number + 1]
            attention = None if self._attention is None else self._attention[number : number + 1]
        return Features(hidden[:, slots], keys, attention, question)


def _wanted(keep: int | float | str) -> int | Share:
    """A number of tokens or a share of them, however it is spelt."""
    if isinstance(keep, str) and is_share(keep):
        return read_share(keep)
    if type(keep) is int and keep > 0:
        return keep
    if type(keep) is float and 0 < keep < 1:
        return Share(Fraction(repr(keep)))  # the number that was written, not the nearest binary one
    raise RequestError(
        f"keep={keep!r} must be a whole number of image tokens of at least 1, or a share: above 0 and below 1, or such "
        "as 11%"
    )


def _causal(tokens: int, like: Tensor) -> Tensor:
    """A mask (1, 1, T, T) to be added to scores: no token sees a later one."""
    closed = torch.full((tokens, tokens), torch.finfo(like.dtype).min, dtype=like.dtype, device=like.device)
    return closed.triu(1)[None, None]
