"""Desktop outputs and the pruner on a device that is not the CPU: nothing is mixed, everything comes out alike."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WALK = """
import sys
from pathlib import Path

import numpy as np
import torch

import export.golden
from benchmarks.cuda import smooth
from export.checkpoints import FolderCheckpoint
from export.golden import make_golden
from export.models.prompt import SampleText
from pruning import PruneSpec, TokenPruner, reference
from tests.pretend_gpu import NAME, PretendGpu, register
from tests.tiny_llava import TINY, write_tiny

register()
export.golden.ANSWER_TOKENS = 3
torch.set_grad_enabled(False)
device, spec = torch.device(NAME, 0), PruneSpec(grid=(4, 4), keep=5)
keys, hidden = smooth(spec.grid, 12, 1), smooth(spec.grid, 300, 2)
expected = reference.prune(keys, hidden, spec)
with PretendGpu() as watch:
    there = keys.to(device), hidden.to(device)
    pruner = TokenPruner(spec).to(device)
    for prune in (lambda k, h: reference.prune(k, h, spec), pruner, pruner.select_unread):
        tokens, indices = prune(*there)[:2]
        assert tokens.device == indices.device == device
        assert torch.equal(indices.cpu().long(), expected[1])
        assert torch.allclose(tokens.cpu(), expected[0], atol=1e-5)
    try:
        there[0] + keys
    except RuntimeError as error:
        assert "expected all tensors on one device" in str(error)
    else:
        raise AssertionError("two devices were mixed, and nobody minded")
print("pruner", len(watch.seen))

text = SampleText(ids=(7, 11, 13, 8), question=(9, 4, 31))
checkpoint = FolderCheckpoint(write_tiny(Path(sys.argv[1])), TINY)
pixels = np.random.default_rng(4).standard_normal((1, 3, 58, 58), dtype=np.float32)
for cut, framed in ((2, True), (0, False)):
    wanted = {"cut": cut, "framed": framed, "pixel_values": pixels, "text": text}
    here = make_golden(checkpoint, TINY, spec, **wanted)
    with PretendGpu() as watch:
        there = make_golden(checkpoint, TINY, spec, **wanted, device=NAME)
    assert here.keys() == there.keys()
    for name, array in here.items():
        np.testing.assert_allclose(there[name], array, rtol=1e-4, atol=1e-5, err_msg=name)
    print("golden", len(watch.seen))
"""


def test_nothing_is_mixed_with_the_cpu(root: Path, tmp_path: Path) -> None:
    """In a process of its own, which a device that torch has come to know stays in."""
    walked = subprocess.run(
        [sys.executable, "-c", WALK, str(tmp_path)], cwd=root, capture_output=True, text=True, check=False
    )
    assert walked.returncode == 0, walked.stderr[-3000:]
    words = walked.stdout.split()
    assert words[::2] == ["pruner", "golden", "golden"]
    assert all(int(count) > 500 for count in words[1::2])
