"""What a type checker is told: a tensor, unless more is asked for."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SNIPPET = """\
import torch
import tensorattn as ta

q = torch.randn(2, 3, 4, 8)
layer = ta.TensorAttention(8, 2, modes="h w", causal="h")
reveal_type(ta.additive_attention(q, q, q, order=2))  # Tensor
reveal_type(ta.kao_qkv(q, q, q, order=2, centered=True))  # Tensor
reveal_type(ta.additive_attention(q, q, q, order=2, return_lse=True))  # AttentionResult
reveal_type(ta.flattened_attention(q, q, q, order=2, return_attention=True))  # AttentionResult
reveal_type(layer(q))  # Tensor
reveal_type(layer.summarize(q))  # Summary
reveal_type(ta.TensorTransformerBlock(8, 2, modes="h w")(q))  # Tensor
reveal_type(ta.SinCosPositions(8, modes="h w")(q))  # Tensor
reveal_type(ta.AttentionStream(layer)(q))  # Tensor
reveal_type(ta.outer_sum(ta.mode_averages(q, order=2)))  # Tensor
ta.additive_attention(q, q, q)  # error: order is missing
"""


@pytest.mark.thorough
def test_mypy_sees_what_a_call_returns(tmp_path):
    (tmp_path / "snippet.py").write_text(SNIPPET)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(ROOT / "pyproject.toml"),
        str(tmp_path / "snippet.py"),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    told = dict(re.findall(r"snippet\.py:(\d+): (?:note: Revealed type is|error:) (.*)", ran.stdout))
    wanted = {str(n): line.split("# ")[1] for n, line in enumerate(SNIPPET.splitlines(), 1) if "# " in line}
    assert told.keys() == wanted.keys(), ran.stdout
    for line, kind in wanted.items():
        assert ("No overload" if "error" in kind else kind) in told[line]
