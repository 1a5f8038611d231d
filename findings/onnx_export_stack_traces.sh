#!/usr/bin/env bash
# torch 2.13.0 with onnxscript: what torch.onnx.export(dynamo=True) writes for a text encoder of transformers is mostly
# where in Python each value came from. Every node has metadata_props with a stack trace, the names and classes of all
# modules around it, and the line of FX; with the weights in a file beside the graph, these are most of the graph, which
# loads and computes the same without them.
#
# It matters to whoever ships models to browsers and phones: a small network's graph is several times as large, and it
# names the folders of the machine that exported it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu \
    || "$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.23.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import contextlib
import io
import os

import numpy as np
import onnx
import onnxruntime
import torch
from transformers import CLIPTextConfig, CLIPTextModel

torch.manual_seed(0)
config = CLIPTextConfig(
    vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, attn_implementation="eager"
)


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = CLIPTextModel(config).eval()

    def forward(self, input_ids):
        return self.encoder(input_ids).last_hidden_state



tokens = torch.randint(0, 99, (1, 77))
with contextlib.redirect_stdout(io.StringIO()):
    torch.onnx.export(Encoder().eval(), (tokens,), "whole.onnx", dynamo=True, external_data=True, input_names=["input_ids"])
model = onnx.load("whole.onnx", load_external_data=False)
traces = [entry.value for node in model.graph.node for entry in node.metadata_props if "stack_trace" in entry.key]
for part in (*model.graph.node, *model.graph.initializer, *model.graph.value_info, *model.graph.input, *model.graph.output):
    part.doc_string = ""
    del part.metadata_props[:]
onnx.save(model, "bare.onnx")
whole, bare = (os.path.getsize(name) for name in ("whole.onnx", "bare.onnx"))
answers = [onnxruntime.InferenceSession(name).run(None, {"input_ids": tokens.numpy()})[0] for name in ("whole.onnx", "bare.onnx")]
print("torch", torch.__version__, "onnx", onnx.__version__)
print(f"graph {whole} bytes, {bare} without metadata: {whole / bare:.1f} times; {len(traces)} of {len(model.graph.node)} nodes have a trace")
print("a trace names the folder of the installation:", any("site-packages" in trace for trace in traces))
assert np.array_equal(*answers), "the metadata changes what is computed"
assert whole > 2 * bare, "graphs are lean now"
assert any("site-packages" in trace for trace in traces)
PYTHON
