"""The model `pruneport` of lmms-eval: what lmms-eval's tasks ask of a model, handed to `ChatModel`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.model import lmms
from tqdm import tqdm

from export.evaluation.chat_model import ChatModel
from runtime.errors import RequestError

# What lmms-eval hands over beside `--model_args`, wanted or not.
_ALWAYS = {"device", "batch_size", "max_batch_size"}


class Pruneport(lmms):  # type: ignore[misc]  # lmms-eval ships no types
    """One model a process, each with its share of a task's questions, one prompt at a time.

    Under `accelerate launch` each process takes the accelerator that is its own; `device` counts without it.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        device: str | None = None,
        batch_size: int | str = 1,
        **arguments: Any,
    ) -> None:
        """Takes the arguments of `ChatModel` by their names; RequestError for others."""
        super().__init__()
        allowed = set(inspect.signature(ChatModel).parameters) | _ALWAYS
        arguments.pop("max_batch_size", None)
        if unknown := sorted(arguments.keys() - allowed):
            raise RequestError(
                f"--model_args: {', '.join(unknown)} is not known; allowed: {', '.join(sorted(allowed - _ALWAYS))}"
            )
        if pretrained is None:
            raise RequestError("--model_args: pretrained is missing; give pretrained=DIR or a name of the hub")
        if str(batch_size) != "1":
            raise RequestError(
                f"--batch_size {batch_size}: prompts are answered one at a time, since padding would change them; "
                "leave it at 1 and start more processes"
            )
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        shared = self._world_size > 1
        self.device = self.accelerator.device if device is None or shared else device
        self._chat: ChatModel | None = ChatModel(str(pretrained), device=self.device, **arguments)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers every request's text with its images."""
        assert self._chat is not None
        answers = []
        for request in tqdm(requests, desc="answers", disable=self._rank != 0):
            text, settings, doc_to_visual, doc_id, task, split = request.args
            images = doc_to_visual(self.task_dict[task][split][doc_id]) or []
            if any(not hasattr(image, "convert") for image in images):
                raise RequestError(f"task {task} shows something else than images; give tasks on images")
            answers.append(self._chat.answer(text, images, settings))
            self.cache_hook.add_partial("generate_until", (text, settings), answers[-1])
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuses: RequestError."""
        raise RequestError(
            "a task asks for the likelihood of given answers (output_type loglikelihood or multiple_choice); "
            "only generate_until is answered: leave the task out, or take its form that generates"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuses: RequestError."""
        raise RequestError(
            "a task asks in several rounds (generate_until_multi_round); only generate_until is answered: "
            "leave the task out"
        )

    def clean(self) -> None:
        """Lets go of the model, when lmms-eval makes room for a judge."""
        self._chat = None
        super().clean()
