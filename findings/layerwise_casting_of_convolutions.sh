#!/usr/bin/env bash
# diffusers 0.42.1, torch 2.13.0: weights that are kept in 8 bits by layerwise casting go through a backward pass with
# gradient checkpointing where they are linear, and not where they are convolutions: the step ends in a CheckpointError,
# for the backward pass of a convolution keeps the weight itself, which is narrow again by then. Without
# checkpointing both have the gradients of the widened weights.
#
# It matters to whoever trains a LoRA beside a frozen U-Net in 8 bits, where memory is short and checkpointing is on:
# transformers train, U-Nets do not. Leaving convolutions wide (skip_modules_classes) mends it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy --index-url https://download.pytorch.org/whl/cpu \
    || "$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/pip" install -q diffusers==0.42.1 accelerate==1.15.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from diffusers.hooks import apply_layerwise_casting
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

KINDS = {
    "linear": (lambda: nn.Linear(8, 8), (2, 8)),
    "convolution": (lambda: nn.Conv2d(8, 8, 3, padding=1), (2, 8, 4, 4)),
}
torch.manual_seed(0)
found = {}
for kind, (layer, shape) in KINDS.items():
    narrow = nn.Sequential(layer(), layer()).requires_grad_(False)
    apply_layerwise_casting(narrow, torch.float8_e4m3fn, torch.float32)
    wide = nn.Sequential(layer(), layer()).requires_grad_(False)
    wide.load_state_dict({name: tensor.float() for name, tensor in narrow.state_dict().items()})
    given = [torch.ones(shape, requires_grad=True) for _ in range(3)]
    narrow(given[0]).square().sum().backward()
    wide(given[1]).square().sum().backward()
    assert torch.equal(given[0].grad, given[1].grad), kind
    try:
        checkpoint(narrow, given[2], use_reentrant=False).square().sum().backward()
        assert torch.equal(given[2].grad, given[1].grad), kind
        found[kind] = "gradients"
    except CheckpointError as error:
        found[kind] = "CheckpointError"
        assert "float8_e4m3fn" in str(error), error
    print(f"{kind}: the gradients of wide weights; with checkpointing {found[kind]}")
assert found == {"linear": "gradients", "convolution": "CheckpointError"}, found
PYTHON
