"""The paper's loop inside transformers' own models, which pruned graphs are compared with."""

from __future__ import annotations

from typing import Any

import torch

from pruning import METHODS, Features, PruneSpec


class PaperLoop:
    """The paper's loop in front of a decoder layer of transformers' own model, over whole prompts without a cache."""

    def __init__(self, decoder: Any, frame: Any, spec: PruneSpec, cut: int) -> None:
        self._layers, self._frame, self._spec, self._cut = decoder.layers, frame, spec, cut
        self._instead: dict[str, Any] = {}
        self.kept: list[int] = []

    def __enter__(self) -> PaperLoop:
        self._hooks = [
            layer.register_forward_pre_hook(self._prune if index == self._cut else self._follow, with_kwargs=True)
            for index, layer in enumerate(self._layers)
            if index >= self._cut
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _prune(self, _module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden, slots = args[0], torch.tensor(self._frame.slots)
        keys = kwargs["past_key_values"].layers[self._cut - 1].keys[0][:, slots].transpose(0, 1).flatten(1)[None]
        trace = METHODS["vlm-pruner"].choose(Features(hidden=hidden[:, slots], keys=keys), self._spec)
        self.kept = trace.indices[0].tolist()
        hidden = hidden.clone()
        hidden[:, slots[trace.indices[0]]] = trace.tokens
        gone = {*self._frame.slots, *self._frame.breaks} - {self._frame.slots[index] for index in self.kept}
        stays = [at for at in range(hidden.shape[1]) if at not in gone]
        mask = torch.full((len(stays), len(stays)), torch.finfo(torch.float32).min).triu(1)[None, None]
        turns = tuple(table[..., stays, :] for table in kwargs["position_embeddings"])
        self._instead = {"attention_mask": mask, "position_embeddings": turns, "position_ids": None}
        return self._follow(_module, (hidden[:, stays], *args[1:]), kwargs)

    def _follow(self, _module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, **self._instead}
