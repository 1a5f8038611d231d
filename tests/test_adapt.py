"""Adapters cross the pruning: what changes which layer, on the teacher and on its students."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from bksdm.adapt import adapt
from bksdm.adapters.controlnet import StudentControlNet, load_controlnet
from bksdm.adapters.lora import LORA_FILE, add_lora, merge_lora, read_lora, save_lora, widths
from bksdm.errors import InputError
from bksdm.families import derive, skip_connections
from bksdm.models import load_pipeline
from bksdm.options import AdaptOptions
from bksdm.recipe import load_recipe
from tiny_models import CONTEXT, LATENT, PICTURE, random_inputs
from verbs import Run, make_student

pytest_plugins = ["verbs_fixtures"]

RECIPES = ("base", "small", "tiny")


@pytest.fixture(scope="module")
def students(v1_teacher: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("students")
    return {recipe: make_student(v1_teacher, folder / recipe, recipe) for recipe in RECIPES}


@pytest.fixture(scope="module")
def lora(v1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the teacher's U-Net and text encoder, none of whose matrices is zero."""
    pipeline, folder = load_pipeline(v1_folder), tmp_path_factory.mktemp("lora")
    networks = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    torch.manual_seed(1)
    for parameter in add_lora(networks, 2, seed=0).parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_lora(networks, folder)
    return folder


@pytest.fixture(scope="module")
def controlnet(v1_teacher: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet of the teacher whose residuals are not zero."""
    torch.manual_seed(2)
    made = ControlNetModel.from_unet(v1_teacher.unet, conditioning_embedding_out_channels=(8, 8, 16))
    for block in (*made.controlnet_down_blocks, made.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.2)
    folder = tmp_path_factory.mktemp("controlnet")
    made.save_pretrained(folder)
    return folder


def change(model: Path, lora: Path) -> dict[str, Tensor]:
    """By how much a LoRA changes the weights of a model, of those that it changes."""
    before, after = load_pipeline(model), merge_lora(load_pipeline(model), lora)
    found = {}
    for part in ("unet", "text_encoder"):
        own = dict(getattr(before, part).named_parameters())
        for name, weight in getattr(after, part).named_parameters():
            if not torch.equal(weight, own[name]):
                found[f"{part}.{name}"] = weight.detach() - own[name].detach()
    return found


# LoRAs


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_layer_that_stays_is_changed_as_the_teachers_own(
    students: dict[str, Path],
    lora: Path,
    v1_folder: Path,
    v1_teacher: StableDiffusionPipeline,
    tmp_path: Path,
    recipe: str,
) -> None:
    made = adapt(AdaptOptions(str(lora), str(students[recipe]), str(v1_folder), str(tmp_path / "out")))
    theirs, ours = change(v1_folder, lora), change(students[recipe], made.out)
    pruning = derive(load_recipe(recipe), v1_teacher.unet.config)
    for name, difference in ours.items():
        part, _, rest = name.partition(".")
        there = f"unet.{pruning.teacher_key(rest)}" if part == "unet" else name
        torch.testing.assert_close(difference, theirs.pop(there), atol=1e-5, rtol=1e-3)
    assert {name.removesuffix(".weight") for name in theirs} == set(made.dropped)
    assert made.kept == len(ours)
    assert all(any(name.removeprefix("unet.").startswith(gone) for gone in pruning.removed) for name in made.dropped)


def test_stock_loading_puts_it_on_other_layers_without_a_word(
    students: dict[str, Path], lora: Path, v1_folder: Path, tmp_path: Path
) -> None:
    """What this verb is for: by name alone, layer 1 of an up stage is not the layer that it was."""
    stock = StableDiffusionPipeline.from_pretrained(students["small"], safety_checker=None)
    stock.load_lora_weights(lora)
    carried = adapt(AdaptOptions(str(lora), str(students["small"]), str(v1_folder), str(tmp_path / "out")))
    name = "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q"
    naive = stock.unet.get_submodule(name).lora_B["default_0"].weight
    ours = read_lora(carried.out / LORA_FILE)
    assert not torch.equal(naive, ours[f"unet.{name}.lora_B.weight"])
    theirs = read_lora(lora / LORA_FILE)
    there = name.replace("attentions.1", "attentions.2")
    assert torch.equal(ours[f"unet.{name}.lora_B.weight"], theirs[f"unet.{there}.lora_B.weight"])
    assert carried.moved[f"unet.{there}"] == f"unet.{name}"
    with pytest.raises(InputError, match="layers that this model does not have"):
        merge_lora(load_pipeline(students["small"]), lora)


def test_what_is_carried_is_what_stock_diffusers_takes_whole(
    students: dict[str, Path], lora: Path, v1_folder: Path, tmp_path: Path
) -> None:
    made = adapt(AdaptOptions(str(lora), str(students["tiny"]), str(v1_folder), str(tmp_path / "out")))
    stock = StableDiffusionPipeline.from_pretrained(students["tiny"], safety_checker=None)
    stock.load_lora_weights(made.out)
    ours = merge_lora(load_pipeline(students["tiny"]), made.out)
    with torch.no_grad():
        outputs = [pipeline.unet(*random_inputs()).sample for pipeline in (stock, ours)]
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-3)


def test_alphas_of_kohyas_files_and_of_metadata_count(lora: Path, v1_folder: Path, tmp_path: Path) -> None:
    plain = read_lora(lora / LORA_FILE)
    kohya = {}
    for module in widths(plain):
        if module.startswith("unet."):
            name = f"lora_unet_{module.removeprefix('unet.').replace('.', '_')}"
            kohya[f"{name}.lora_down.weight"] = plain[f"{module}.lora_A.weight"]
            kohya[f"{name}.lora_up.weight"] = plain[f"{module}.lora_B.weight"]
            kohya[f"{name}.alpha"] = torch.tensor(1.0)  # of rank 2
    save_file(kohya, tmp_path / "kohya.safetensors")
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 1, "unet.r": 2})}
    unet = {name: tensor for name, tensor in load_file(lora / LORA_FILE).items() if name.startswith("unet.")}
    save_file(unet, tmp_path / "half.safetensors", metadata=metadata)
    for name in ("kohya", "half"):
        found = read_lora(tmp_path / f"{name}.safetensors")
        assert found.keys() == {key for key in plain if key.startswith("unet.")}
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, plain[key] / (2 if "lora_B" in key else 1))


# Textual inversions


def test_vectors_of_words_go_over_as_they_are(
    done: Run, students: dict[str, Path], v1_folder: Path, tmp_path: Path
) -> None:
    save_file({"<thing>": torch.ones(CONTEXT)}, tmp_path / "thing.safetensors")
    words = ["--model", students["base"], "--teacher", v1_folder, "--out", tmp_path / "out", "--json"]
    assert done("adapt", tmp_path / "thing.safetensors", *words).json["kind"] == "textual_inversion"
    pipeline = StableDiffusionPipeline.from_pretrained(students["base"], safety_checker=None)
    pipeline.load_textual_inversion(tmp_path / "out" / "thing.safetensors", token="<thing>")
    assert "<thing>" in pipeline.tokenizer.get_vocab()


# ControlNets


@pytest.mark.parametrize("recipe", RECIPES)
def test_residuals_are_those_of_the_layers_that_stay(
    students: dict[str, Path],
    controlnet: Path,
    v1_folder: Path,
    v1_teacher: StableDiffusionPipeline,
    tmp_path: Path,
    recipe: str,
) -> None:
    made = adapt(AdaptOptions(str(controlnet), str(students[recipe]), str(v1_folder), str(tmp_path / "out")))
    whole, ours = ControlNetModel.from_pretrained(controlnet), load_controlnet(made.out)
    assert isinstance(ours, StudentControlNet)
    latents, timesteps, context = random_inputs()
    picture = torch.rand(2, 3, PICTURE // 2, PICTURE // 2)  # two halvings, as the picture's eight pixels a latent
    picture = torch.nn.functional.interpolate(picture, size=(LATENT * 4, LATENT * 4))
    with torch.no_grad():
        downs, mid = whole(latents, timesteps, context, picture, return_dict=False)
        taken, middle = ours(latents, timesteps, context, picture, return_dict=False)
    taps = dict(zip(skip_connections(v1_teacher.unet.config), downs, strict=True))
    student = UNet2DConditionModel.from_pretrained(students[recipe] / "unet").eval()
    pruning = derive(load_recipe(recipe), v1_teacher.unet.config)
    outputs = _skips(student, latents, timesteps, context)
    assert list(outputs) == list(skip_connections(student.config))
    for (path, output), residual in zip(outputs.items(), taken, strict=True):
        assert output.shape == residual.shape
        assert torch.equal(residual, taps[pruning.teacher_key(path)])
    if recipe == "tiny":
        assert not middle.any()
        assert "mid_block" in made.dropped
    else:
        assert torch.equal(middle, mid)
    with torch.no_grad():
        plain = student(latents, timesteps, context).sample
        led = student(
            latents, timesteps, context, down_block_additional_residuals=taken, mid_block_additional_residual=middle
        ).sample
    assert (plain - led).abs().max() > 1e-3


def _skips(unet: UNet2DConditionModel, *inputs: Tensor) -> dict[str, Tensor]:
    """What the modules of the skip connections give, in the order in which they do."""
    found: dict[str, Tensor] = {}

    def keep(path: str, output: object) -> None:
        found[path] = output[0] if isinstance(output, tuple) else output

    hooks = [
        unet.get_submodule(path if not path.endswith("downsamplers") else f"{path}.0").register_forward_hook(
            lambda module, given, output, path=path: keep(path, output)
        )
        for path in skip_connections(unet.config)
    ]
    with torch.no_grad():
        unet(*inputs)
    for hook in hooks:
        hook.remove()
    return found


def test_the_stock_pipeline_draws_with_it(
    students: dict[str, Path], controlnet: Path, v1_folder: Path, tmp_path: Path
) -> None:
    made = adapt(AdaptOptions(str(controlnet), str(students["small"]), str(v1_folder), str(tmp_path / "out")))
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        students["small"], controlnet=load_controlnet(made.out), safety_checker=None
    )
    hint = Image.new("RGB", (PICTURE, PICTURE), "red")
    pictures = [
        pipeline(
            "red",
            image=hint,
            num_inference_steps=2,
            controlnet_conditioning_scale=scale,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        for scale in (0.0, 1.0)
    ]
    assert (pictures[0] - pictures[1]).abs().max() > 0.01


def test_a_whole_controlnet_does_not_fit_a_student(students: dict[str, Path], controlnet: Path) -> None:
    student = UNet2DConditionModel.from_pretrained(students["small"] / "unet").eval()
    latents, timesteps, context = random_inputs()
    with torch.no_grad():
        downs, mid = ControlNetModel.from_pretrained(controlnet)(
            latents, timesteps, context, torch.rand(2, 3, 4 * LATENT, 4 * LATENT), return_dict=False
        )
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            student(
                latents, timesteps, context, down_block_additional_residuals=downs, mid_block_additional_residual=mid
            )


# Bad input


def test_adapters_of_others_are_refused(
    students: dict[str, Path], lora: Path, controlnet: Path, v1_folder: Path, v2_folder: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    save_file({"<thing>": torch.ones(CONTEXT + 1)}, tmp_path / "wide.safetensors")
    with pytest.raises(InputError, match=r"has vectors of 33 numbers, and the text encoder of .* takes 32"):
        adapt(AdaptOptions(str(tmp_path / "wide.safetensors"), str(students["base"]), str(v1_folder), out))
    config = json.loads((controlnet / "config.json").read_text())
    other = tmp_path / "other"
    ControlNetModel.from_config(config | {"layers_per_block": 1}).save_pretrained(other)
    with pytest.raises(InputError, match="is not of this teacher: its layers_per_block is 1, and the teacher's 2"):
        adapt(AdaptOptions(str(other), str(students["base"]), str(v1_folder), out))
    with pytest.raises(InputError, match="has no recipe"):
        adapt(AdaptOptions(str(lora), str(v1_folder), str(v1_folder), out))
    with pytest.raises(InputError, match=r"lora .*nothing does not exist"):
        adapt(AdaptOptions(str(tmp_path / "nothing"), str(students["base"]), str(v1_folder), out))
    wide = {
        name: torch.cat([tensor, tensor], dim=1) if "lora_A" in name and "to_q" in name else tensor
        for name, tensor in read_lora(lora / LORA_FILE).items()
    }
    save_file(wide, tmp_path / "another.safetensors")
    with pytest.raises(InputError, match="is of another family"):
        adapt(AdaptOptions(str(tmp_path / "another.safetensors"), str(students["base"]), str(v1_folder), out))
    assert not Path(out).exists()


def test_the_same_command_says_the_same_and_another_is_refused(
    done: Run, run: Run, students: dict[str, Path], lora: Path, v1_folder: Path, tmp_path: Path
) -> None:
    words = ["--teacher", v1_folder, "--out", tmp_path / "out", "--json"]
    first = done("adapt", lora, "--model", students["tiny"], *words).json
    assert done("adapt", lora, "--model", students["tiny"], *words).json == first
    assert first["out"] == str(tmp_path / "out")
    outcome = run("adapt", lora, "--model", students["base"], *words)
    assert outcome.code == 2
    assert "holds another run" in outcome.said[0]
