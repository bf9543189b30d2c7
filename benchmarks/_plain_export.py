"""MiniLM as ``torch.onnx.export`` gives it by default: what a user has who calls no tool but the exporter.

    python benchmarks/_plain_export.py TARGET.onnx

The module pools and normalizes as modelops' own conversion of the folder does, and is loaded as transformers loads it:
with torch's fused attention.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

MODEL = Path(__file__).resolve().parents[1] / "examples" / "minilm" / "model"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Sentence(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        hidden = self.model(input_ids, attention_mask, token_type_ids).last_hidden_state
        kept = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * kept).sum(1) / kept.sum(1).clamp(min=1e-9), dim=-1)


def main(target: str) -> None:
    module = Sentence(transformers.AutoModel.from_pretrained(MODEL).eval()).eval()
    ids = torch.randint(1000, 20000, (2, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=512)}
    torch.onnx.export(
        module,
        (ids, mask, torch.zeros_like(ids)),
        target,
        input_names=list(INPUTS),
        output_names=["sentence_embedding"],
        dynamic_shapes=dict.fromkeys(INPUTS, dims),
        external_data=False,
    )


if __name__ == "__main__":
    main(sys.argv[1])
