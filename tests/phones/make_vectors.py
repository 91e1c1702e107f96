"""Makes the vectors that the apps' tests hold Kotlin and Swift against: what runtime/ makes of small inputs.

    python -m tests.phones.make_vectors

Photos, prompts and tokens, the walk over the text graphs, and what may be sampled; see README.md beside this file.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from export.models.pocket import pocket_folder
from runtime.bundle import GraphInfo, ImageInfo, PromptInfo, TensorInfo
from runtime.devices.wire import AnswerJob, GateJob, JobFile, StepJob, TimingJob, TwinJob
from runtime.generation import Answers, Sampling
from runtime.image import preprocess, view
from runtime.prompt import TOKENIZER_FILE, Tokenizer

VECTORS = Path(__file__).parent / "vectors"

TEXTS = (
    "What is in this picture?",
    "  two  spaces, and a tab\there ",
    "line one\nline two\n\nline four",
    "Größe, naïveté, Ελλάδα, Привет",
    "日本語のテキスト と 한국어",
    "emoji 🙂👩‍👩‍👧 and flags 🇩🇪",
    "I'll say: it's 3.14159, isn't it? 100% (or so)…",
    "e\u0301 combined, \u00a0no-break, \u200bzero width",
    "A",
    "snake_case camelCase http://example.org/?q=1&r=2",
)
CORPUS = (*TEXTS, *(f"How many red circles are left of the blue square {n}?" for n in range(30)), "the picture " * 9)
# GPT-4's and Qwen's way to cut text, as their tokenizer.json spells it.
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def photos() -> list[dict[str, Any]]:
    """Photos of many shapes through every way to resize: grey levels, and float32 pixel values."""
    cases = []
    random = np.random.default_rng(0)
    for height, width, size, shortest, resample, crop in (
        (40, 52, (28, 28), 28, "bicubic", True),
        (52, 40, (24, 24), 26, "bicubic", True),
        (9, 7, (28, 28), 28, "bicubic", True),
        (97, 33, (16, 16), 17, "bilinear", True),
        (33, 97, (20, 12), 20, "lanczos", True),
        (31, 47, (14, 28), 14, "bicubic", False),
        (30, 45, (20, 20), 20, "nearest", True),
        (28, 28, (28, 28), 28, "bicubic", True),
        (5, 240, (5, 5), 5, "bicubic", True),
    ):
        # Hard edges beside noise: what overshoots is cut off at 0 and 255.
        photo = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        photo[: height // 2, : width // 2] = (255, 0, 128)
        photo[height // 2 :, width // 3 : width // 2] = (0, 255, 7)
        info = ImageInfo(
            size=size,
            resize_shortest=shortest,
            rescale=1 / 255,
            mean=(0.48145466, 0.4578275, 0.40821073),
            std=(0.26862954, 0.26130258, 0.27577711),
            resample=resample,  # type: ignore[arg-type]
            do_center_crop=crop,
        )
        values = preprocess(photo, info)
        cases.append(
            {
                "height": height,
                "width": width,
                "photo": base64.b64encode(photo.tobytes()).decode(),
                "image": msgspec.to_builtins(info),
                "view": base64.b64encode(view(photo, info).tobytes()).decode(),
                "pixel_values_corner": [float(x) for x in values[0, :, 0, 0]],
            }
        )
    return cases


def _llama() -> tokenizers.Tokenizer:
    """Spaces as marks, single bytes for what no token covers, as LLaMA's."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", "</s>", "<image>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    # What other alphabets write is left to the bytes.
    made.train_from_iterator([text for text in CORPUS if text.isascii()], trainer)
    content = json.loads(made.to_str())
    # Bytes are tokens of the model, none that text is searched for.
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    read = tokenizers.Tokenizer.from_str(json.dumps(content))
    read.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return read


def _qwen() -> tokenizers.Tokenizer:
    """Bytes as characters, text cut by a pattern, composed Unicode, as Qwen's."""
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>", "<image>")])
    return made


def tokens() -> list[dict[str, Any]]:
    """Questions to ids behind the image, and ids to the pieces that are shown as they stream."""
    cases = []
    pocket = tokenizers.Tokenizer.from_str((pocket_folder() / TOKENIZER_FILE).read_text(encoding="utf-8"))
    for name, tokenizer, suffix, trims in (
        ("pocket", pocket, "\n{question} ASSISTANT:", False),
        ("llama", _llama(), "\n{question} ASSISTANT:", True),
        ("qwen", _qwen(), "{question}<|im_end|>\n<|im_start|>assistant\n", False),
    ):
        content = tokenizer.to_str()
        image = tokenizer.token_to_id("<image>")
        assert image is not None
        prompt = PromptInfo(
            prefix_ids=(),
            suffix_text=suffix,
            trims_question=trims,
            special_ids={"image": image},
        )
        ours = Tokenizer(Path(TOKENIZER_FILE), prompt, content=content)
        random = np.random.default_rng(1)
        streams = [ours.question_ids(text) for text in TEXTS]
        streams += [random.integers(0, tokenizer.get_vocab_size(), 24).tolist() for _ in range(6)]
        cases.append(
            {
                "name": name,
                "tokenizer": json.loads(content),
                "prompt": msgspec.to_builtins(prompt),
                "questions": [{"text": text, "ids": ours.question_ids(text)} for text in TEXTS],
                "answers": [{"ids": ids, "text": "".join(ours.text(ids))} for ids in streams],
            }
        )
    return cases


class SumGraph:
    """Stands for a graph: whole numbers below 97 that depend on every input and its place.

    s = sum over inputs i (from 1, in the manifest's order) of i * sum over elements k of x[k] * (1 + k % 7), where
    x[k] is cut to a whole number; element k of output j (from 1) is (s + 31 * j + 7 * k) % 97. An open axis of an
    output is as long as the graph's tokens, which are axis 1 of its first input.
    """

    def __init__(self, graph: GraphInfo, calls: list[list[Any]]) -> None:
        self.graph, self._calls = graph, calls

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        total = 0
        for number, info in enumerate(self.graph.inputs, start=1):
            array = inputs[info.name].astype(np.int64).ravel()
            total += number * int((array * (1 + np.arange(len(array)) % 7)).sum())
        self._calls.append([self.graph.name, total, [list(inputs[info.name].shape) for info in self.graph.inputs]])
        given = {}
        count = inputs[self.graph.inputs[0].name].shape[1]
        for number, info in enumerate(self.graph.outputs, start=1):
            shape = [count if axis in info.dynamic else size for axis, size in enumerate(info.shape)]
            values = (total + 31 * number + 7 * np.arange(int(np.prod(shape)))) % 97
            given[info.name] = values.reshape(shape).astype(info.numpy_dtype)
        return given


def _open_graphs(*, cut: int) -> tuple[GraphInfo, ...]:
    """Three layers, two heads of two numbers, 3 tokens before 10 image tokens of which 4 are kept, room for 90."""
    before, image, keep, room, chunk, width = 3, 10, 4, 90, 8, 4
    seen, kept = before + image, before + keep

    def tensor(name: str, *shape: int, dtype: str = "float32", dynamic: tuple[int, ...] = ()) -> TensorInfo:
        return TensorInfo(name=name, shape=shape, dtype=dtype, dynamic=dynamic)

    def pair(layer: int, entries: int, *, past: bool = False, dynamic: tuple[int, ...] = ()) -> list[TensorInfo]:
        names = (f"{'past_' * past}{kind}_{layer}" for kind in ("key", "value"))
        return [tensor(name, 1, 2, entries, 2, dynamic=dynamic) for name in names]

    def decoder(name: str, takes: str, gives: str, layers: range, entries: int) -> GraphInfo:
        past = [info for layer in layers for info in pair(layer, entries + room, past=True, dynamic=(2,))]
        new = [info for layer in layers for info in pair(layer, chunk, dynamic=(2,))]
        return GraphInfo(
            name=name,
            file="model.pte",
            engine="executorch",
            arithmetic=("fp32",),
            inputs=(
                tensor(takes, 1, chunk, width, dynamic=(1,)),
                tensor("positions", 1, chunk, dtype="int64", dynamic=(1,)),
                tensor("filled", 1, dtype="int64"),
                *past,
            ),
            outputs=(tensor(gives, 1, chunk, width, dynamic=(1,)), *new),
        )

    def plain(name: str, inputs: list[TensorInfo], outputs: list[TensorInfo]) -> GraphInfo:
        return GraphInfo(
            name=name,
            file="model.pte",
            engine="executorch",
            arithmetic=("fp32",),
            inputs=tuple(inputs),
            outputs=tuple(outputs),
        )

    front = [decoder("decoder_front", "inputs_embeds", "hidden", range(cut), seen)] if cut else []
    return (
        plain(
            "vision_encoder",
            [tensor("pixel_values", 1, 3, 2, 2)],
            [
                tensor("hidden", 1, kept, width),
                tensor("positions", 1, kept, dtype="int64"),
                *(info for layer in range(cut) for info in pair(layer, seen)),
            ],
        ),
        plain(
            "token_embedding",
            [tensor("ids", 1, chunk, dtype="int64", dynamic=(1,))],
            [tensor("inputs_embeds", 1, chunk, width, dynamic=(1,))],
        ),
        *front,
        decoder("decoder_back", "hidden", "last_hidden", range(cut, 3), kept),
        plain(
            "lm_head",
            [tensor("last_hidden", 1, chunk, width, dynamic=(1,))],
            [tensor("logits", 1, chunk, 50, dynamic=(1,))],
        ),
    )


def walks() -> list[dict[str, Any]]:
    """Two questions about each of two photos, with every call of every graph."""
    cases = []
    for cut in (1, 0):
        graphs = _open_graphs(cut=cut)
        calls: list[list[Any]] = []
        answers = Answers({info.name: SumGraph(info, calls) for info in graphs}, bundle="walk", before=3, first_text=13)
        said = []
        for photo in (1, 2):
            pixels = np.full((1, 3, 2, 2), photo, np.float32)
            seen = answers.see(pixels)
            for question, count in (([5, 6, 7], 4), (list(range(1, 21)), 62)):
                ids = [token.id for token in answers.answer(seen, question, max_new_tokens=count, past_end=True)]
                said.append({"photo": photo, "question": question, "count": count, "ids": ids})
        cases.append(
            {
                "before": 3,
                "first_text": 13,
                "graphs": [msgspec.to_builtins(info) for info in graphs],
                "cache_bytes": answers.cache_bytes,
                "room": answers.room,
                "answers": said,
                "calls": calls,
            }
        )
    return cases


def samplings() -> list[dict[str, Any]]:
    """Which tokens may come out, and how often: shares over many draws, which languages draw differently."""
    random = np.random.default_rng(2)
    cases = []
    for temperature, top_p in ((0.0, 1.0), (1.0, 1.0), (0.7, 0.9), (1.5, 0.5), (0.01, 1.0), (1.0, 0.05)):
        logits = (random.standard_normal(12) * 2).astype(np.float32)
        chance = np.random.default_rng(0)
        sampling = Sampling(temperature=temperature, top_p=top_p)
        drawn = np.bincount([sampling.choose(logits, chance) for _ in range(20_000)], minlength=12) / 20_000
        cases.append(
            {
                "logits": [float(x) for x in logits],
                "temperature": temperature,
                "top_p": top_p,
                "shares": drawn.tolist(),
            }
        )
    tie = [1.0, 3.0, 3.0, 0.0]
    cases.append({"logits": tie, "temperature": 0.0, "top_p": 1.0, "shares": [0.0, 1.0, 0.0, 0.0]})
    return cases


def jobs() -> list[dict[str, Any]]:
    """job.json files, from the least to one with everything."""
    least = JobFile(id="0123456789abcdef", bundle="tiny 0011223344556677", vision="vision_encoder", steps=())
    whole = JobFile(
        id="fedcba9876543210",
        bundle="tiny 0011223344556677",
        vision="vision_encoder_keep64",
        steps=(StepJob(graph="vision_encoder", stored="vision_encoder_keep64", step="vision_encoder"),),
        answer=AnswerJob(question=(5, 6, 7), new_tokens=4),
        threads=2,
        timing=TimingJob(warmup=1, runs=3, answers=2),
        twin=TwinJob(bundle="twin 8899aabbccddeeff", vision="vision_encoder"),
        gate=GateJob(),
    )
    return [msgspec.to_builtins(job) for job in (least, whole)]


def main() -> None:
    VECTORS.mkdir(exist_ok=True)
    for name, made in (
        ("photos", photos()),
        ("tokens", tokens()),
        ("walks", walks()),
        ("samplings", samplings()),
        ("jobs", jobs()),
    ):
        (VECTORS / f"{name}.json").write_text(json.dumps(made, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
