#!/usr/bin/env bash
# lycoris-lora 4.1.3, which is the format's own library, reads three kinds of its own files otherwise than they were trained.
#   - LoKr: the scale alpha / rank is applied once in the forward pass and twice in what is merged.
#   - (IA)^3: a file cannot be made a module again (TypeError).
#   - DoRA with norms by input (wd_on_out=False): likewise (RuntimeError).
# It matters to whoever merges or converts LyCORIS files by its modules; its functions of matrices are right.
# Seen on 2026-11-27 with torch 2.13.0. Exits with 1 if any of this changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 lycoris-lora==4.1.3
"$folder/venv/bin/python" - <<'PY'
import importlib.metadata

import torch
from lycoris.modules import get_module, make_module
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from torch import nn

print("lycoris-lora", importlib.metadata.version("lycoris-lora"), "torch", torch.__version__)
torch.manual_seed(0)
layer = nn.Linear(64, 64, bias=False)


def again(name, tensors):
    """A module made of a file's tensors."""
    kind, parts = get_module(tensors, name)
    return make_module(kind, parts, name, layer)


w1, a, b = torch.randn(8, 8), torch.randn(8, 2), torch.randn(2, 8)
lokr = again("x", {"x.lokr_w1": w1, "x.lokr_w2_a": a, "x.lokr_w2_b": b, "x.alpha": torch.tensor(1.0)})
change = torch.kron(w1, a @ b) * 1.0 / 2
x = torch.randn(3, 64)
with torch.no_grad():
    forward = float(((lokr(x) - layer(x)) / (x @ change.T)).mean())
    merged = float((lokr.get_diff_weight()[0] / change).mean())
print(f"LoKr, alpha 1, rank 2: forward pass {forward:.3f} and merged {merged:.3f} times alpha / rank * (w1 x w2)")

trained = IA3Module("y", layer)
found = {"(IA)^3": {f"y.{key}": value for key, value in trained.state_dict().items()}}
trained = LoConModule("z", layer, weight_decompose=True, wd_on_out=False)
found["DoRA by input"] = {f"z.{key}": value for key, value in trained.state_dict().items()}
errors = {}
for what, tensors in found.items():
    try:
        again(next(iter(tensors)).split(".")[0], tensors)
    except (TypeError, RuntimeError) as error:
        errors[what] = type(error).__name__
    print(f"{what}, saved and read again: {errors.get(what, 'read')}")
same = abs(forward - 1) < 1e-3 and abs(merged - 0.5) < 1e-3 and errors == {"(IA)^3": "TypeError", "DoRA by input": "RuntimeError"}
raise SystemExit(not same)
PY
