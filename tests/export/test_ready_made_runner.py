"""ExecuTorch's own multimodal runner, as its wheel ships it, answers from one program as transformers does."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from export.checkpoints import FolderCheckpoint, RandomCheckpoint
from export.dropin.multimodal_runner import write_for_runner
from export.families.family import ModelEntry
from export.families.llava.family import LLAVA
from export.golden import make_golden
from export.graphs.ready_made import build_ready_made_graphs
from export.graphs.vision import build_vision_encoder
from export.models.pocket import POCKET, pocket_folder
from export.models.prompt import read_prompt
from export.quantize import SCHEMES, quantize
from pruning import PruneSpec
from pruning.vlm_pruner.settings import Settings
from runtime.bundle import GraphInfo
from runtime.errors import CheckpointError, ExportError
from runtime.prompt import QUESTION, Tokenizer
from tests.talkative import talkative
from tests.tiny_llava import CONFIG, TINY, in_fp32, write_tiny

TOKENS = 16  # of an answer
TEXT_TOKENS = 96  # room behind the image
QUESTIONS = ("What is in this picture?", "How many people are there, and what are they doing?")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One export. pocket has as many key heads as query heads, tiny has fewer."""

    entry: ModelEntry
    spec: PruneSpec | None
    quant: str | None = None

    def __str__(self) -> str:
        return f"{self.entry.name}-{self.keep}-{self.quant or 'fp32'}"

    @property
    def keep(self) -> int:
        return self.spec.keep if self.spec else self.entry.geometry.image_tokens


CASES = [
    Case(entry=POCKET, spec=PruneSpec(keep=64)),
    Case(entry=POCKET, spec=None),
    # A limit that everything is below, and batches of the whole image: few steps, so that lowering takes seconds.
    Case(
        entry=POCKET,
        spec=PruneSpec(keep=64, settings=Settings(threshold=2.0, token_batch=64, steps=4)),
        quant="8da4w-g32",
    ),
    Case(entry=TINY, spec=PruneSpec(grid=(4, 4), keep=6, settings=Settings(pivots=2, threshold=2.0, steps=4))),
]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A program, what it was made from, and what the converter said about its methods."""

    case: Case
    checkpoint: FolderCheckpoint
    folder: Path
    tokenizer_file: Path
    file: Path
    methods: dict[str, GraphInfo]
    constants_bytes: int

    @property
    def longest(self) -> int:
        """Tokens that the runner may pass at once."""
        return int(self.methods["text_decoder"].inputs[0].shape[1])

    def runner(self) -> Any:
        """A new runner over the program, with an empty cache."""
        return _llm().MultimodalRunner(str(self.file), str(self.tokenizer_file))

    def ids(self, pieces: Sequence[str]) -> list[int]:
        """The ids of an answer from the pieces that the runner gave to its callback."""
        spelt = _spelt(self.tokenizer_file)
        return [spelt.index(piece) for piece in pieces]

    def prompt(self, question: str) -> tuple[list[int], list[int]]:
        """The ids before the image and those behind it."""
        info = read_prompt(self.checkpoint.folder, self.checkpoint.geometry, self.case.entry)
        if info.suffix_text is None:  # tiny has no tokenizer
            return list(info.prefix_ids), [7 + len(question), 40, 31, 22, 13]
        return list(info.prefix_ids), Tokenizer(self.tokenizer_file, info).question_ids(question)


def _llm() -> Any:
    """The module of the runner, with the operators registered that the programs need."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces on import that it is experimental
        from executorch.extension.llm import runner
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 - the import registers

    return runner


def _greedy(*, num_bos: int = 0) -> Any:
    return _llm().GenerationConfig(max_new_tokens=TOKENS, temperature=0.0, echo=False, num_bos=num_bos)


def _spelt(tokenizer_file: Path) -> list[str]:
    """The text of each token."""
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    tokenizer = HuggingFaceTokenizer.from_file(str(tokenizer_file))
    return [tokenizer.decode([number], skip_special_tokens=False) for number in range(tokenizer.get_vocab_size())]


def _write_checkpoint(entry: ModelEntry, folder: Path) -> Path:
    """Writes the checkpoint into `folder` and gives the path of a tokenizer.

    Pocket is a talkative one. tiny gets the first of pocket's
    tokens, control characters, punctuation and digits: exactly as many as it has logits, because the runner takes the
    best of as many as its tokenizer has tokens.
    """
    pocket = pocket_folder()
    if entry is TINY:
        write_tiny(folder)
        settings = json.loads((pocket / "tokenizer.json").read_text())
        vocab = settings["model"]["vocab"]
        settings["model"]["vocab"] = {
            text: number for text, number in vocab.items() if number < TINY.geometry.text.vocab
        }
        settings["model"]["merges"] = []
        (folder.parent / "tokenizer.json").write_text(json.dumps(settings))
        return folder.parent / "tokenizer.json"
    return talkative(folder) / "tokenizer.json"


@pytest.fixture(scope="module", params=CASES, ids=str)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    case: Case = request.param
    out_dir = tmp_path_factory.mktemp(str(case))
    folder = out_dir / "checkpoint"
    tokenizer_file = _write_checkpoint(case.entry, folder)
    checkpoint = FolderCheckpoint(folder, case.entry)
    vision = build_vision_encoder(checkpoint, case.entry, case.spec, cut=0, framed=False)
    graphs = write_for_runner(
        checkpoint,
        case.entry,
        vision,
        out_dir,
        quant_text=case.quant,
        text_tokens=TEXT_TOKENS,
        arithmetic=in_fp32,
    )
    (file,) = {out_dir / graph.file for graph in graphs}
    return Exported(
        case=case,
        checkpoint=checkpoint,
        folder=folder,
        tokenizer_file=tokenizer_file,
        file=file,
        methods={graph.name: graph for graph in graphs},
        constants_bytes=sum(constant.numel() * constant.element_size() for constant in vision.buffers()),
    )


@pytest.fixture(scope="module")
def pixels(exported: Exported) -> torch.Tensor:
    """Something with structure, in the range of a normalised photo: (1, 3, H, W)."""
    side = exported.case.entry.geometry.pixel_values[-1]
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    waves = torch.stack([torch.sin(9 * x * y), torch.cos(5 * x + y), torch.sin(3 * y * y - 7 * x)])
    return (waves + 0.3 * torch.randn(3, side, side, generator=torch.Generator().manual_seed(1)))[None]


class Desktop:
    """transformers' LLaVA, its projected image features pruned by the paper's loop."""

    def __init__(self, exported: Exported, pixels: torch.Tensor) -> None:
        from transformers import LlavaForConditionalGeneration

        self.case = case = exported.case
        model: Any = LlavaForConditionalGeneration.from_pretrained(exported.folder, dtype=torch.float32)
        model.eval()
        self.decoder, self.head = model.model.language_model, torch.nn.Sequential(model.lm_head)
        golden = make_golden(
            exported.checkpoint, case.entry, case.spec, cut=0, framed=False, pixel_values=pixels.numpy()
        )
        self.image = torch.from_numpy(golden["vision_encoder.out.image_features"])
        assert self.image.shape[1] == case.keep
        if case.quant is not None:
            quantize(self.decoder, case.quant)
            quantize(self.head, case.quant)

    @torch.no_grad()
    def answer(self, prefix: Sequence[int], suffix: Sequence[int]) -> list[int]:
        """The ids of the greedy answer; positions are contiguous."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.decoder.config)
        embeds = self._embeds(prefix, suffix)
        said: list[int] = []
        while len(said) < TOKENS and 2 not in said:
            hidden = self.decoder(inputs_embeds=embeds, past_key_values=cache).last_hidden_state
            said.append(int(self.head(hidden[:, -1]).argmax()))
            embeds = self.decoder.embed_tokens(torch.tensor([said[-1:]]))
        return said

    def check(self, prefix: Sequence[int], suffix: Sequence[int], said: list[int]) -> None:
        """Asserts that an answer is this desktop's.

        Where activations are rounded to 8 bits, an embedding that is off in its last bit rounds some of them the other
        way, and processors sum in their own order: then each token must be the best one, given those before it, as far
        as logits are determined at all.
        """
        if self.case.quant is None:
            assert said == self.answer(prefix, suffix)
            return
        assert len(said) == TOKENS
        logits = self._logits(prefix, suffix, said)
        rounded = [self._logits(prefix, suffix, said, seed=seed) for seed in range(4)]
        undetermined = 2 * max(float((other - logits).abs().max()) for other in rounded)
        best = logits.max(dim=1, keepdim=True).values
        allowed = logits >= best - undetermined
        assert allowed.float().mean() < 0.01  # of the vocabulary: what said anything else would not pass
        assert allowed[torch.arange(TOKENS), torch.tensor(said)].all(), (said, logits.argmax(dim=1).tolist())

    def _embeds(self, prefix: Sequence[int], suffix: Sequence[int]) -> torch.Tensor:
        before, behind = (self.decoder.embed_tokens(torch.tensor([ids])) for ids in (prefix, suffix))
        return torch.cat([before, self.image, behind], dim=1)

    @torch.no_grad()
    def _logits(
        self, prefix: Sequence[int], suffix: Sequence[int], said: list[int], *, seed: int | None = None
    ) -> torch.Tensor:
        """(TOKENS, vocabulary): what each token of an answer was chosen by; `seed` moves the last bits of the input."""
        embeds = torch.cat([self._embeds(prefix, suffix), self.decoder.embed_tokens(torch.tensor([said[:-1]]))], dim=1)
        if seed is not None:
            embeds = embeds * (1 + 1e-7 * torch.randn(embeds.shape, generator=torch.Generator().manual_seed(seed)))
        hidden = self.decoder(inputs_embeds=embeds).last_hidden_state[0, -len(said) :]
        logits: torch.Tensor = self.head(hidden)
        return logits


@pytest.fixture(scope="module")
def desktop(exported: Exported, pixels: torch.Tensor) -> Desktop:
    return Desktop(exported, pixels)


@pytest.mark.slow
@pytest.mark.parametrize("question", QUESTIONS)
def test_answers_as_transformers(exported: Exported, desktop: Desktop, pixels: torch.Tensor, question: str) -> None:
    llm = _llm()
    prefix, suffix = exported.prompt(question)
    inputs = [llm.make_token_input(prefix), llm.make_image_input(pixels), llm.make_token_input(suffix)]
    pieces: list[str] = []
    stats: list[Any] = []
    exported.runner().generate(inputs, _greedy(), pieces.append, stats.append)
    said = exported.ids(pieces)
    assert len(said) == TOKENS
    assert len(set(said)) > 3
    desktop.check(prefix, suffix, said)
    assert stats[0].num_prompt_tokens == len(prefix) + exported.case.keep + len(suffix)


@pytest.mark.slow
def test_photo_first_question_later(exported: Exported, desktop: Desktop, pixels: torch.Tensor) -> None:
    llm, runner = _llm(), exported.runner()
    for question in QUESTIONS:
        pieces: list[str] = []
        prefix, suffix = exported.prompt(question)
        runner.reset()  # what the cache holds from before must not show
        runner.prefill([llm.make_token_input(prefix), llm.make_image_input(pixels)])
        runner.generate([llm.make_token_input(suffix)], _greedy(), pieces.append)
        desktop.check(prefix, suffix, exported.ids(pieces))


@pytest.mark.slow
def test_text_through_the_runners_own_tokenizer(exported: Exported, desktop: Desktop, pixels: torch.Tensor) -> None:
    info = read_prompt(exported.checkpoint.folder, exported.checkpoint.geometry, exported.case.entry)
    if info.prefix_text is None or info.suffix_text is None:
        assert exported.case.entry is TINY  # has no tokenizer
        return
    llm = _llm()
    pieces: list[str] = []
    behind = info.suffix_text.replace(QUESTION, QUESTIONS[0])
    inputs = [llm.make_text_input(info.prefix_text), llm.make_image_input(pixels), llm.make_text_input(behind)]
    exported.runner().generate(inputs, _greedy(num_bos=1), pieces.append)
    desktop.check(*exported.prompt(QUESTIONS[0]), exported.ids(pieces))


@pytest.mark.slow
def test_batch_of_the_transformers_processor(exported: Exported) -> None:
    """The processor writes 576 image tokens whatever is kept; the runner takes them as one image."""
    if exported.case.entry is TINY:
        return  # has no processor
    from transformers import AutoProcessor

    loader: Any = AutoProcessor
    processor = loader.from_pretrained(exported.folder)
    content = [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    photo = torch.randint(0, 256, (3, 300, 500), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    batch = processor(images=photo, text=text, return_tensors="pt")
    image_id = exported.checkpoint.geometry.image_token_id
    assert int((batch["input_ids"] == image_id).sum()) == 576
    pieces: list[str] = []
    exported.runner().generate_hf(batch, _greedy(), image_token_id=image_id, token_callback=pieces.append)
    Desktop(exported, batch["pixel_values"]).check(*exported.prompt(QUESTIONS[0]), exported.ids(pieces))


@pytest.mark.slow
def test_delegate_takes_all_but_cache_and_lookup(exported: Exported) -> None:
    coverage = {name: graph.coverage[0] for name, graph in exported.methods.items()}
    outside = {name: {op.op for op in taken.outside} for name, taken in coverage.items()}
    assert list(coverage) == ["vision_encoder", "token_embedding", "text_decoder"]
    assert coverage["vision_encoder"].partitions == 1
    assert coverage["vision_encoder"].outside_nodes <= 1  # the indices become int64
    assert outside["token_embedding"] == {"aten.embedding"}
    # Attention looks at the cache, which the delegate cannot hold: one piece before the first, one behind each, and the
    # output matrix, which is only asked about the last token.
    layers = exported.checkpoint.geometry.text.layers
    assert coverage["text_decoder"].partitions == layers + 2
    assert sum(run > 0 for run in coverage["text_decoder"].runs) == layers + 2
    assert coverage["token_embedding"].runs == (-1,)
    assert not {op for op in outside["text_decoder"] if "mm" in op or "linear" in op or "mul" in op}
    attention = [op.count for op in coverage["text_decoder"].outside if op.op == "llama.custom_sdpa"]
    assert attention == [layers]


@pytest.mark.slow
def test_weights_are_stored_once(exported: Exported) -> None:
    data, quant = exported.file.read_bytes(), exported.case.quant
    size_bytes = exported.constants_bytes
    matrices = 0
    for name in exported.checkpoint.names():
        tensor = exported.checkpoint.tensor(name).float()
        if quant and tensor.dim() == 2 and name.startswith(("layers.", "lm_head.")):
            group = SCHEMES[quant].group
            assert group
            size_bytes += tensor.numel() // 2 + tensor.numel() // group * 2  # 4 bits each, 16 for a group's scale
            continue
        size_bytes += tensor.numel() * 4
        if tensor.dim() == 2:
            matrices += 1
            assert data.count(tensor.numpy().tobytes()) <= 1, name
    assert matrices > 10
    assert len(data) < size_bytes + 300_000  # the instructions of three methods


@pytest.mark.slow
def test_what_the_runner_refuses(exported: Exported, pixels: torch.Tensor) -> None:
    """Nothing that does not fit is answered, and nothing crashes."""
    llm, longest, vocab = _llm(), [5] * exported.longest, exported.case.entry.geometry.text.vocab
    context = len(exported.prompt(QUESTIONS[0])[0]) + exported.case.keep + TEXT_TOKENS
    past_the_end = [llm.make_token_input(longest)] * (context // len(longest) + 1)
    for inputs in (
        [llm.make_token_input([*longest, 5])],
        past_the_end,
        [llm.make_image_input(pixels[:, :, 1:].contiguous())],
        [llm.make_image_input(pixels.to(torch.uint8))],
        [llm.make_token_input([vocab])],
    ):
        with pytest.raises(RuntimeError, match="Generation failed"):
            exported.runner().generate(inputs, _greedy())


@pytest.mark.parametrize("kv_heads", [2, 6])
def test_graphs_equal_transformers(kv_heads: int) -> None:
    from transformers import LlavaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    text = {**CONFIG["text_config"], "num_key_value_heads": kv_heads}
    entry = ModelEntry(
        name="tiny", family=LLAVA, summary="for tests", hub_id=None, config={**CONFIG, "text_config": text}
    )
    checkpoint = RandomCheckpoint(entry, seed=2)
    assert checkpoint.geometry.text.heads == 6
    config: Any = LlavaConfig.from_dict(dict(checkpoint.config))
    theirs: Any = LlamaForCausalLM(config.text_config)
    theirs.eval()
    theirs.load_state_dict(
        {name: checkpoint.tensor(name.removeprefix("model.")).float() for name, _ in theirs.named_parameters()}
    )
    ids = torch.randint(4, checkpoint.geometry.text.vocab, (1, 60), generator=torch.Generator().manual_seed(0))
    embedding, decoder = build_ready_made_graphs(checkpoint, tokens=32, context=60)
    start = 0
    with torch.no_grad():
        expected = theirs(ids).logits
        for count in (20, 1, 32, 1, 1, 5):
            embeds = embedding(ids[:, start : start + count])
            logits = decoder(embeds, torch.tensor([start]))
            start += count
            assert logits.shape == (1, 1, checkpoint.geometry.text.vocab)
            torch.testing.assert_close(logits[0, 0], expected[0, start - 1], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("tokens", "context", "message"),
    [(0, 10, "tokens=0"), (20, 10, "tokens=20 and context=10"), (10, 257, "<= 256.*--text-tokens")],
)
def test_sizes_that_do_not_fit(tokens: int, context: int, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        build_ready_made_graphs(RandomCheckpoint(TINY, seed=2), tokens=tokens, context=context)


def test_vision_graph_with_the_prompt_in_it_is_refused(tmp_path: Path) -> None:
    checkpoint = RandomCheckpoint(TINY, seed=2)
    vision = build_vision_encoder(checkpoint, TINY, None)
    with pytest.raises(ExportError, match="take --cut 0"):
        write_for_runner(checkpoint, TINY, vision, tmp_path, quant_text=None, text_tokens=8, arithmetic=in_fp32)
    assert not list(tmp_path.iterdir())


def test_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model")
    shutil.copy(pocket_folder() / "tokenizer.json", folder)
    checkpoint = FolderCheckpoint(folder, TINY)
    vision = build_vision_encoder(checkpoint, TINY, None, cut=0, framed=False, prefix_ids=[1])
    with pytest.raises(CheckpointError, match=f"{POCKET.geometry.text.vocab} tokens, but the model 64 logits"):
        write_for_runner(checkpoint, TINY, vision, tmp_path, quant_text=None, text_tokens=8, arithmetic=in_fp32)
