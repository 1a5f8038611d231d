"""GGUF: what stable-diffusion.cpp could not hold is refused in words, and its crashes too; ExecuTorch against torch."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel

from bksdm.export import sd_cpp, to_executorch, to_gguf
from bksdm.export.formats import Source
from bksdm.export.parity import check_parity
from bksdm.families import derive
from bksdm.families.recipe import load_recipe
from tiny_models import V1_UNET, V2_UNET, build_pipeline, build_tokenizer

SD14 = json.loads((Path(__file__).parent / "data" / "unet_sd_v1.4.json").read_text())
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
BETAS = {"steps_offset": 1, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
HAS_EXECUTORCH = all(importlib.util.find_spec(name) for name in ("executorch", "torchao"))


def full_size(unet: dict, text: dict | None = None, prediction_type: str = "epsilon") -> Source:
    """A pipeline with these configs whose weights take no memory."""
    with torch.device("meta"):
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL(**VAE),
            text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT | (text or {}))),
            tokenizer=build_tokenizer(),
            unet=UNet2DConditionModel.from_config(unet),
            scheduler=PNDMScheduler(**BETAS, prediction_type=prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return Source("m", pipeline, None, "q8_0", 512, 512)


def student(recipe: str) -> dict:
    return derive(load_recipe(recipe), SD14).student_config


# GGUF


@pytest.mark.parametrize("unet", [SD14, student("tiny")], ids=["teacher", "tiny"])
def test_whole_models_and_tiny_go_into_a_file(unet: dict) -> None:
    assert to_gguf.why_not(full_size(unet)) is None


@pytest.mark.parametrize(("recipe", "part"), [("base", "a middle block"), ("small", "no middle block")])
def test_base_and_small_are_refused_with_a_way_out(recipe: str, part: str) -> None:
    reason = to_gguf.why_not(full_size(student(recipe)))
    assert reason is not None
    assert part in reason
    assert "--recipe tiny" in reason


def test_other_text_encoders_and_schedules_are_refused() -> None:
    narrow = to_gguf.why_not(full_size(SD14, text={"hidden_size": 128, "num_attention_heads": 4}))
    assert narrow is not None
    assert "hidden_size 128" in narrow
    velocity = to_gguf.why_not(full_size(SD14, prediction_type="v_prediction"))
    assert velocity is not None
    assert "prediction_type v_prediction" in velocity
    rescaled = full_size(SD14)
    rescaled.pipeline.scheduler = DDIMScheduler(**BETAS, rescale_betas_zero_snr=True)
    assert "rescale_betas_zero_snr True" in (to_gguf.why_not(rescaled) or "")


def test_text_encoder_weights_have_the_names_that_are_looked_for(tmp_path: Path) -> None:
    to_gguf.write_weights(build_pipeline(V1_UNET), tmp_path)
    with safe_open(tmp_path / "text_encoder" / "model.safetensors", "pt") as weights:
        assert all(name.startswith("text_model.") for name in weights.keys())  # noqa: SIM118
        assert "text_model.embeddings.token_embedding.weight" in set(weights.keys())
    with safe_open(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", "pt") as weights:
        assert weights.get_tensor("conv_in.weight").dtype == torch.float16
        assert weights.get_tensor("conv_in.bias").dtype == torch.float32


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import os; os.abort()", r"crashed \(SIGABRT\)$"),
        (
            "import sys; sys.exit('load\\nerror: no such thing\\nbye')",
            r"failed \(exit code 1\): error: no such",
        ),
    ],
)
def test_a_process_that_fails_becomes_one_line(program: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message) as found:
        sd_cpp.run([sys.executable, "-c", program])
    assert "\n" not in str(found.value)


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    source = dataclasses.replace(full_size(SD14), pipeline=build_pipeline(V1_UNET))
    with pytest.raises(RuntimeError, match=r"^stable-diffusion\.cpp "):  # not installed, or a model it cannot read
        to_gguf.check(tmp_path / "missing.gguf", source)
    assert not list(tmp_path.iterdir())


# ExecuTorch


def test_programs_take_one_prompt_and_two_latents_a_picture() -> None:
    made = to_executorch.fixed_components(build_pipeline(V1_UNET), 32, 64, 3)
    shapes = {name: list(next(iter(component.inputs.values())).shape) for name, component in made.items()}
    assert shapes == {
        "text_encoder": [1, 8],
        "unet": [6, 4, 8, 16],
        "vae_decoder": [3, 4, 8, 16],
        "vae_encoder": [3, 3, 32, 64],
    }


@pytest.mark.slow
@pytest.mark.skipif(not HAS_EXECUTORCH, reason="needs executorch and torchao")
@pytest.mark.parametrize("unet", [V1_UNET, V2_UNET], ids=["v1", "v2"])
def test_executorch_is_torch_to_within_two_of_255(unet: dict, tmp_path: Path) -> None:
    pipeline = build_pipeline(unet)
    source = Source("m", pipeline, None, "fp32", 32, 32)
    to_executorch.write(source, tmp_path)
    networks = to_executorch.ExecutorchNetworks(tmp_path, 1)
    assert check_parity(pipeline, networks, 32, 32).largest <= 2
    pixels = np.random.default_rng(0).uniform(-1, 1, (3, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        moments = pipeline.vae.encode(torch.from_numpy(pixels)).latent_dist.parameters
    np.testing.assert_allclose(networks.moments(pixels), moments.numpy(), atol=1e-4)
    assert "`unet/model.pte` | `sample` float32 [2, 4, 8, 8]" in (tmp_path / "README.md").read_text()
