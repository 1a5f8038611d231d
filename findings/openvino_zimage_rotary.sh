#!/usr/bin/env bash
# openvino 2026.4.1 with diffusers 0.42.1: convert_model takes the transformer of Flux.1, and fails at that of Z-Image with
# an OpConversionFailure. Z-Image's rotary embedding looks places up in a table of complex numbers and multiplies queries
# and keys by them; the frontend for torch marks complex tensors (ComplexTypeMark) and cannot gather from one.
#
# It matters to whoever serves Z-Image, or lets OpenVINO compute a teacher of its kind, on a CPU: the turn must be written
# in real numbers before the network is traced. The exception is no RuntimeError, so that what falls back on one of those
# goes on failing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu \
    || "$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q openvino==2026.4.1 diffusers==0.42.1 transformers==5.23.0 accelerate
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import openvino
import torch
from diffusers import FluxTransformer2DModel, ZImageTransformer2DModel

warnings.simplefilter("ignore")
torch.manual_seed(0)


class Whole(torch.nn.Module):
    """Tensors in, a tensor out."""

    def __init__(self, network):
        super().__init__()
        self.network = network.eval()

    def forward(self, latents, timestep, captions):
        return torch.stack(self.network([latents[0]], timestep, [captions[0]], return_dict=False)[0])


z = Whole(
    ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 6, 6], axes_lens=[64, 16, 16],
    )
)
given = (torch.randn(1, 4, 1, 8, 8), torch.tensor([0.5]), torch.randn(1, 5, 16))
with torch.no_grad():
    print("torch answers with", tuple(z(*given).shape))

class Flux(torch.nn.Module):
    """The same of Flux.1, which turns by sines and cosines."""

    def __init__(self):
        super().__init__()
        self.network = FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
        ).eval()

    def forward(self, latents, captions, pooled, timestep, places, words):
        return self.network(
            latents, captions, pooled, timestep, places, words, return_dict=False
        )[0]


tokens = (torch.randn(1, 16, 16), torch.randn(1, 5, 16), torch.randn(1, 16), torch.tensor([0.5]))
flux, example = Flux(), (*tokens, torch.zeros(16, 3), torch.zeros(5, 3))
with torch.no_grad():
    converted = openvino.convert_model(flux, example_input=example)
    print("openvino", openvino.__version__, "converts Flux.1's:", len(converted.outputs), "output")
    try:
        openvino.convert_model(z, example_input=given)
    except Exception as error:  # noqa: BLE001 - its class is what is looked at
        print("Z-Image's:", type(error).__name__, "is a RuntimeError:", isinstance(error, RuntimeError))
        print(*[line[:100] for line in str(error).splitlines() if "omplex" in line][:2], sep="\n")
        assert type(error).__name__ == "OpConversionFailure"
        assert "ComplexTypeMark" in str(error)
        assert not isinstance(error, RuntimeError)
    else:
        raise SystemExit("it converts now")
PYTHON
