"""Exported folders of small pipelines, for the tests of the torch-free runner."""

import json
import shutil
from pathlib import Path

import openvino
from diffusers import StableDiffusionPipeline

from bksdm.export.formats import Source
from bksdm.export.to_onnx import write
from tiny_models import CONTEXT

UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": CONTEXT,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
PARTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


def export_onnx(pipeline: StableDiffusionPipeline, folder: Path) -> Path:
    folder.mkdir()
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    write(Source("model", pipeline, None, "fp32", side, side), folder)
    about = {"format": "onnx", "precision": "fp32", "height": None, "width": None}
    (folder / "export.json").write_text(json.dumps(about))
    return folder


def as_openvino(onnx: Path, folder: Path) -> Path:
    """The same networks in OpenVINO's form."""
    shutil.copytree(onnx, folder, ignore=shutil.ignore_patterns("model.onnx*"))
    for part in PARTS:
        network = openvino.convert_model(onnx / part / "model.onnx")
        openvino.save_model(network, folder / part / "openvino_model.xml", compress_to_fp16=False)
    about = {"format": "openvino", "precision": "fp32", "height": None, "width": None}
    (folder / "export.json").write_text(json.dumps(about))
    return folder
