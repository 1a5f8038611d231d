"""Flux.1, FLUX.2 and Z-Image: which blocks stay, what a student inherits, how it answers, learns and draws."""

import dataclasses
import functools
import inspect
import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bksdm.common.assets import asset
from bksdm.common.errors import InputError
from bksdm.common.randomness import Draws
from bksdm.distill.conditions import Conditions
from bksdm.distill.losses import LossWeights
from bksdm.distill.objective import Distillation
from bksdm.distill.run import foresee
from bksdm.families import bypassed, derive, family_of, family_of_pipeline, recipe_without, recipes_between, units
from bksdm.families.recipe import Recipe, load_recipe
from bksdm.generate.requests import Request
from bksdm.generate.sampling import sample
from bksdm.models.configs import load_denoiser_config
from bksdm.models.drawing import drawing
from bksdm.models.pipelines import check_multiple, cutting, load_pipeline, pixels_of_a_token, tokenizing
from bksdm.options.distill import DistillOptions
from bksdm.pruning.budget import Budget
from bksdm.pruning.inherit import prune_unet
from bksdm.pruning.taps import Features
from bksdm.runtime.defaults import SAMPLING_FILE, Defaults
from fast import one_flow
from followed import followed
from tiny_flow import (
    BUILDS,
    SIDE,
    build_flux2_dev_pipeline,
    build_z_pipeline,
    draw,
    inputs,
    stacks,
)
from verbs import Run

pytest_plugins = ["verbs_fixtures", "flow_fixtures"]
pytestmark = pytest.mark.usefixtures("without_charts")

ALL = BUILDS | {"dev": build_flux2_dev_pipeline}
DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"
# Blocks of the tiny teachers that stay by recipe half, from the paper's pattern by hand.
HALF = {
    "flux": {DOUBLE: (0, 3), SINGLE: (0, 2, 5)},
    "klein": {DOUBLE: (0, 2), SINGLE: (0, 1, 4)},
    "dev": {DOUBLE: (0, 2), SINGLE: (0, 1, 4)},
    "z": {"layers": (0, 2, 5)},
}


def config_of(name: str, **changed: Any) -> dict[str, Any]:
    """What a class of diffusers is where nothing is said, with some of it changed."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    usual = {item.name: item.default for item in parameters if item.default is not inspect.Parameter.empty}
    return json.loads(json.dumps({"_class_name": name, **usual, **changed}))


FLUX = config_of("FluxTransformer2DModel", guidance_embeds=True)
KLEIN = config_of(
    "Flux2Transformer2DModel",
    num_layers=5,
    num_single_layers=20,
    num_attention_heads=24,
    joint_attention_dim=7680,
    guidance_embeds=False,
)
Z = config_of("ZImageTransformer2DModel")
HALF_SINGLE = "name: mine\nblocks: {single_transformer_blocks: 1/2}\n"
# Counted by diffusers' own classes on the meta device.
FIGURES = {
    "flux": (FLUX, "", 11_901_408_320),
    "flux-lite": (FLUX, "flux-lite", 8_163_264_064),
    "flux-mini": (FLUX, "flux-mini", 3_179_199_552),
    "klein": (KLEIN, "", 3_875_544_576),
    "klein half of the single": (KLEIN, HALF_SINGLE, 2_648_708_096),
    "z": (Z, "", 6_154_908_736),
    "z half": (Z, "half", 3_441_253_696),
}


# Which blocks


@pytest.mark.parametrize("name", FIGURES)
def test_describe_gives_the_figures(done: Run, tmp_path: Path, name: str) -> None:
    config, recipe, params = FIGURES[name]
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    if "\n" in recipe:
        (tmp_path / "mine.yaml").write_text(recipe)
        recipe = str(tmp_path / "mine.yaml")
    described = done("describe", tmp_path, *(("--recipe", recipe) if recipe else ()), "--json").json
    assert described["transformer"]["params"] == params
    whole = FIGURES[name.replace("-", " ").split()[0]][2]
    assert described["teacher_transformer"]["params"] == whole


def test_describe_draws_what_goes(done: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FLUX))
    text = done("describe", tmp_path, "--recipe", "flux-lite").out
    assert "8/19  [B] . [B] . [B] .  . [B] .  .  . [B] .  . [B] . [B] . [B]" in text
    assert "8163.3 M parameters" in text


def test_the_regular_pattern_is_the_papers_for_half_of_dit() -> None:
    config = config_of("ZImageTransformer2DModel", n_layers=28)
    kept = [int(path.split(".")[1]) for path in derive(load_recipe("half"), config).key_map.values()]
    assert kept == [*range(0, 14, 2), *range(15, 28, 2)]


@pytest.mark.parametrize("depth", range(1, 12))
def test_the_regular_pattern_keeps_as_many_as_asked_and_both_ends(depth: int) -> None:
    config = config_of("ZImageTransformer2DModel", n_layers=depth)
    for count in range(1, depth + 1):
        pruning = derive(Recipe("x", blocks=count), config)
        kept = [int(path.split(".")[1]) for path in pruning.key_map.values()]
        assert len(kept) == count == pruning.student_config["n_layers"]
        assert kept == sorted(set(kept))
        assert kept[0] == 0
        assert count == 1 or kept[-1] == depth - 1
        assert set(kept) | {int(path.split(".")[1]) for path in pruning.removed} == set(range(depth))


def test_features_are_matched_with_what_the_next_block_that_stays_took() -> None:
    pruning = derive(Recipe("x", blocks=(0, 3, 4)), config_of("ZImageTransformer2DModel", n_layers=7))
    assert [(tap.teacher, tap.student) for tap in pruning.taps] == [
        ("layers.2", "layers.0"),
        ("layers.3", "layers.1"),
        ("layers.6", "layers.2"),
    ]
    assert [(tap.teacher, tap.student) for tap in pruning.layer_taps] == [
        ("layers.0", "layers.0"),
        ("layers.3", "layers.1"),
        ("layers.4", "layers.2"),
    ]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (0, "it keeps 0 blocks of layers, which has 30; keep 1 to 30"),
        (31, "it keeps 31 blocks of layers, which has 30"),
        ((0, 30), "it keeps block 30 of layers, which has 30"),
        ((3, 1), "name each once, in order"),
        ((29, -1), "name each once, in order"),
        (((DOUBLE, 3),), f"it names the blocks {DOUBLE}, and there are layers"),
    ],
)
def test_a_recipe_that_does_not_fit(blocks: Any, message: str) -> None:
    with pytest.raises(InputError, match="recipe 'x' does not fit this teacher") as refused:
        derive(Recipe("x", blocks=blocks), Z)
    assert message in str(refused.value)


def test_the_two_kinds_of_flux_2_are_told_apart() -> None:
    assert family_of(KLEIN).name == "FLUX.2 klein"
    assert family_of(config_of("Flux2Transformer2DModel")).name == "FLUX.2"
    assert family_of({key: value for key, value in KLEIN.items() if key != "_class_name"}).name == "FLUX.2 klein"


def test_recipes_of_the_other_kind_are_refused(done: Run, run: Run, v1_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(Z))
    outcome = run("describe", tmp_path, "--recipe", "base")
    assert outcome.code == 2
    assert "it says which layers of a U-Net stay (down), and this is a transformer" in outcome.said[-1]
    outcome = run("describe", v1_folder, "--recipe", "half")
    assert outcome.code == 2
    assert "it says which blocks of a transformer stay, and this is a U-Net" in outcome.said[-1]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("SD3Transformer2DModel", "dual_attention_layers"),
        ("QwenImageTransformer2DModel", "text encoder that looks at pictures"),
        ("ChromaTransformer2DModel", "modulations of all blocks"),
        ("PixArtTransformer2DModel", "PixArt"),
        ("HunyuanDiT2DModel", "only go in pairs"),
        ("CogView4Transformer2DModel", "is a CogView4Transformer2DModel"),
    ],
)
def test_others_are_refused_with_the_reason(run: Run, tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(name)))
    outcome = run("describe", tmp_path)
    assert outcome.code == 2
    assert reason in outcome.said[-1]


def test_units_budgets_and_what_lies_between(flow_teacher: DiffusionPipeline) -> None:
    config = dict(flow_teacher.transformer.config)
    found = units(config)
    assert len(found) == sum(map(len, own_stacks(flow_teacher).values()))
    assert [unit.name for unit in found if not unit.removable] == [f"{path} 0" for path in own_stacks(flow_teacher)]
    budget = Budget.of(config, "params")
    choice = budget.choose(0.9, {unit.name: float(number) for number, unit in enumerate(found)}, "mine")
    assert choice.share <= 0.9
    assert recipe_without(config, choice.removed, "mine") == choice.recipe
    between = recipes_between(config, derive(load_recipe("half"), config).student_config, "mine")
    regular = derive(load_recipe("half"), config).key_map
    assert [derive(recipe, config).key_map == regular for recipe in between] == [True, False]


# What a student inherits


def own_stacks(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """The stacks that recipes shorten."""
    return {name: blocks for name, blocks in stacks(pipeline.transformer).items() if "refiner" not in name}


@pytest.mark.parametrize("name", ALL)
def test_every_tensor_is_the_teachers(done: Run, tmp_path: Path, name: str) -> None:
    flow_teacher = ALL[name]()
    flow_teacher.save_pretrained(tmp_path / "teacher")
    done("prune", tmp_path / "teacher", "--recipe", "half", "--out", tmp_path / "student")
    student = DiffusionPipeline.from_pretrained(tmp_path / "student")
    theirs, ours = flow_teacher.transformer.state_dict(), student.transformer.state_dict()
    for key, tensor in ours.items():
        path, _, rest = key.partition(".")
        if path in HALF[name]:
            number, _, inside = rest.partition(".")
            key = f"{path}.{HALF[name][path][int(number)]}.{inside}"  # noqa: PLW2901
        assert torch.equal(tensor, theirs[key]), key
    assert {path: len(blocks) for path, blocks in own_stacks(student).items()} == {
        path: len(kept) for path, kept in HALF[name].items()
    }
    for part in (tmp_path / "teacher").iterdir():
        if part.is_dir() and part.name != "transformer":
            assert {file.name for file in part.iterdir()} <= {
                file.name for file in (tmp_path / "student" / part.name).iterdir()
            }
    smaller, _ = prune_unet(flow_teacher.transformer, load_recipe("half"))
    flow_teacher.transformer = smaller
    assert np.array_equal(draw(student), draw(flow_teacher))


def test_the_teacher_without_blocks_is_the_pruned_student(flow_teacher: DiffusionPipeline) -> None:
    network, config = flow_teacher.transformer, dict(flow_teacher.transformer.config)
    gone = [unit for unit in units(config) if unit.removable][::2]
    student, _ = prune_unet(network, recipe_without(config, frozenset(unit.name for unit in gone), "x"))
    whole = answer(flow_teacher, network)
    with bypassed(network, gone):
        assert torch.equal(answer(flow_teacher, network), answer(flow_teacher, student))
    assert torch.equal(answer(flow_teacher, network), whole)


def test_a_student_is_a_teacher(done: Run, flow_folder: Path, tmp_path: Path) -> None:
    done("prune", flow_folder, "--recipe", "two-thirds", "--out", tmp_path / "once")
    done("prune", tmp_path / "once", "--recipe", "half", "--out", tmp_path / "twice")
    assert (
        load_pipeline(tmp_path / "twice").transformer.config["_sample_size"]
        == load_pipeline(flow_folder).transformer.config["_sample_size"]
    )


# What it answers, and draws


@torch.no_grad()
def answer(pipeline: DiffusionPipeline, network: Any) -> Tensor:
    return family_of_pipeline(pipeline).answer(network, *inputs(pipeline))


class Asked(Exception):  # noqa: N818
    """What a pipeline asked its transformer first."""


def asked_by(pipeline: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def forward(*args: Any, **kwargs: Any) -> None:
        raise Asked(args, kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.transformer, "forward", forward)
        with pytest.raises(Asked) as asked:
            draw(
                pipeline,
                "a green car",
                height=SIDE,
                width=16,
                guidance_scale=0.0 if is_z(pipeline) else 3.5,
                max_sequence_length=512,
            )
    return asked.value.args


def is_z(pipeline: DiffusionPipeline) -> bool:
    return isinstance(pipeline, diffusers.ZImagePipeline)


def test_it_is_asked_what_its_pipeline_asks(flow_teacher: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    family, given = family_of_pipeline(flow_teacher), {}
    theirs, named = asked_by(flow_teacher, monkeypatch)
    told = Conditions.of(flow_teacher).embedded(tokenizing(flow_teacher)("a green car")[None])

    def network(*args: Any, **kwargs: Any) -> Any:
        given.update(args=args, kwargs=kwargs)
        return flow_teacher.transformer(*args, **kwargs)

    network.config = flow_teacher.transformer.config
    if is_z(flow_teacher):
        latents, timesteps = theirs[0][0].squeeze(1)[None], 1000 - 1000 * theirs[1]
        with torch.no_grad():
            found = family.answer(network, latents, timesteps, told)
            wanted = -flow_teacher.transformer(*theirs, return_dict=False)[0][0].squeeze(1)[None]
    else:
        packed, rows, columns = named["hidden_states"], SIDE // 8, 2
        latents = packed.transpose(1, 2).reshape(1, -1, rows, columns)
        if isinstance(flow_teacher, diffusers.FluxPipeline):
            latents = flow_teacher._unpack_latents(packed, SIDE, 16, flow_teacher.vae_scale_factor)
        with torch.no_grad():
            found = family.answer(network, latents, named["timestep"] * 1000, told)
            wanted = flow_teacher.transformer(**named)[0]
        wanted = (
            flow_teacher._unpack_latents(wanted, SIDE, 16, flow_teacher.vae_scale_factor)
            if isinstance(flow_teacher, diffusers.FluxPipeline)
            else wanted.transpose(1, 2).reshape(1, -1, rows, columns)
        )
        assert torch.equal(given["kwargs"]["img_ids"], named["img_ids"])
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("size", [(SIDE, SIDE), (SIDE, 16)])
def test_pictures_are_those_of_stock_diffusers(flow_teacher: DiffusionPipeline, size: tuple[int, int]) -> None:
    asked = [Request("red apple", 3), Request("a green car on a hill", 4)]
    (found,) = sample(flow_teacher, asked, steps=3, guidance=2.0, height=size[0], width=size[1])
    wanted = flow_teacher(
        prompt=[one.prompt for one in asked],
        generator=[torch.Generator().manual_seed(one.seed) for one in asked],
        num_inference_steps=3,
        guidance_scale=2.0,
        height=size[0],
        width=size[1],
    ).images
    for one, other in zip(found, wanted, strict=True):
        assert np.array_equal(np.array(one), np.array(other))


def test_latents_of_pictures_come_back(flow_teacher: DiffusionPipeline) -> None:
    family, pixels = family_of_pipeline(flow_teacher), torch.rand(1, 3, SIDE, SIDE) * 2 - 1
    mean, std = Conditions.of(flow_teacher).posterior(pixels)
    assert mean.shape == std.shape == inputs(flow_teacher)[0][:1].shape
    with torch.no_grad():
        own = flow_teacher.vae.encode(pixels).latent_dist
    if hasattr(flow_teacher.vae, "bn"):
        ours = flow_teacher._patchify_latents(own.mean)
        center, spread = (
            flow_teacher.vae.bn.running_mean,
            flow_teacher.vae.bn.running_var + flow_teacher.vae.config.batch_norm_eps,
        )
        ours = (ours - center.view(1, -1, 1, 1)) / spread.sqrt().view(1, -1, 1, 1)
        torch.testing.assert_close(mean, ours)
    else:
        torch.testing.assert_close(
            family.for_vae(flow_teacher.vae, packed(flow_teacher, mean), (SIDE, SIDE)), own.mean, rtol=1e-5, atol=1e-5
        )


def packed(pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Latents as the pipeline gives them at the end."""
    if isinstance(pipeline, diffusers.FluxPipeline):
        return pipeline._pack_latents(latents, *latents.shape)
    return latents


# How it learns


def test_the_forward_process_is_that_of_flow_matching(flow_teacher: DiffusionPipeline) -> None:
    schedule = family_of_pipeline(flow_teacher).noise_schedule(flow_teacher.scheduler)
    latents, noise = torch.randn(4, 2, 4, 6), Draws(0, "x", 0).normal((4, 2, 4, 6))
    levels = scheduled(flow_teacher, 24 if isinstance(flow_teacher, diffusers.Flux2KleinPipeline) else 6)
    noisy = schedule.corrupt(latents, Draws(0, "x", 0))
    level = (noisy.timesteps / 1000).view(-1, 1, 1, 1)
    assert len(set(noisy.timesteps.tolist())) == 4
    assert all(((levels - one).abs() < 1e-6).any() for one in level.flatten())
    torch.testing.assert_close(noisy.latents, (1 - level) * latents + level * noise)
    torch.testing.assert_close(noisy.target, noise - latents)
    clean, rest = schedule.parted(noisy.latents, noisy.timesteps, noisy.target)
    torch.testing.assert_close(clean, latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rest, noise, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(schedule.mixed(clean, rest, noisy.timesteps), noisy.latents, rtol=1e-4, atol=1e-5)


def scheduled(pipeline: DiffusionPipeline, tokens: int) -> Tensor:
    """The levels of stock diffusers in 1000 even steps, for so many tokens and, of FLUX.2, pictures of 50 steps."""
    scheduler = pipeline.scheduler
    if not scheduler.config.use_dynamic_shifting:
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 1000, 1000))
        return scheduler.sigmas[:-1]
    mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    if isinstance(pipeline, diffusers.Flux2KleinPipeline):
        mu = compute_empirical_mu(tokens, 50)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 1000, 1000), mu=mu)
    return scheduler.sigmas[:-1]


def test_levels_may_be_those_of_a_logit_normal() -> None:
    pipeline = build_z_pipeline()
    schedule = family_of_pipeline(pipeline).noise_schedule(pipeline.scheduler, "logit_normal")
    latents = torch.zeros(4000, 1, 2, 2)
    levels = schedule.corrupt(latents, Draws(0, "x", 0)).timesteps / 1000
    before = levels / (3 - 2 * levels)  # as they were drawn
    normal = torch.logit(before)
    assert abs(float(normal.mean())) < 0.06
    assert abs(float(normal.std()) - 1) < 0.05


def test_captions_of_z_image_are_as_long_in_half_precision() -> None:
    flow_teacher, lengths = build_z_pipeline(), list[list[int]]()
    latents, timesteps, _ = inputs(flow_teacher)
    tokens = torch.stack([tokenizing(flow_teacher)(text) for text in ("red", "a green car " * 100)])
    told = Conditions.of(flow_teacher).embedded(tokens)

    def network(latents: Any, timesteps: Any, captions: Any, **_: Any) -> Any:
        lengths.append([len(caption) for caption in captions])
        return (latents,)

    for dtype in (torch.float32, torch.bfloat16):
        half = {name: value.to(dtype) for name, value in told.items()}
        family_of_pipeline(flow_teacher).answer(network, latents.to(dtype), timesteps, half)
    assert lengths[0] == lengths[1]
    assert 256 < lengths[0][1] <= 512


def test_what_is_cut_off_a_prompt_is_not_drawn() -> None:
    """Pipelines read 512 tokens whatever the tokenizer says, and what is taught and exported is its beginning."""
    pipeline = build_z_pipeline()
    pipeline.tokenizer.model_max_length = 24
    long = ["red apple " * 30 + end for end in ("", "a green car")]
    assert all(cutting(pipeline)(prompt) for prompt in long)
    one, other = next(sample(pipeline, [Request(prompt, 3) for prompt in long], steps=1, guidance=2.0))
    assert np.array_equal(np.array(one), np.array(other))


def test_other_schedulers_are_refused() -> None:
    with pytest.raises(InputError, match="EulerDiscreteScheduler is none of flow matching"):
        family_of(Z).noise_schedule(EulerDiscreteScheduler())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_are_the_formulas(flow_teacher: DiffusionPipeline, checkpointing: bool) -> None:
    family = family_of_pipeline(flow_teacher)
    student, pruning = prune_unet(flow_teacher.transformer, load_recipe("half"))
    student.train()
    if checkpointing:
        student.enable_gradient_checkpointing()
    schedule, conditions = family.noise_schedule(flow_teacher.scheduler), Conditions.of(flow_teacher)
    weighted = LossWeights(1.0, 0.5, 2.0)
    objective = Distillation(student, flow_teacher.transformer, pruning.taps, conditions, schedule, weighted)
    latents, _, told = inputs(flow_teacher)
    batch = {"latents_mean": latents, "latents_std": torch.zeros_like(latents), **told}
    losses = objective(batch, Draws(0, "noise", 0))

    noisy = schedule.corrupt(conditions.latents(batch, Draws(0, "noise", 0)), drawn_after_latents(latents))
    seen: dict[tuple[str, str], Tensor] = {}
    pictures = slice(16) if is_z(flow_teacher) else slice(-16, None)  # tokens: 4 by 4, the caption's after or before

    def see(key: tuple[str, str], _: nn.Module, args: Any, output: Any) -> None:
        seen[key] = (output[1] if isinstance(output, tuple) else output)[:, pictures].double()

    handles = [
        network.get_submodule(path).register_forward_hook(functools.partial(see, (side, path)))
        for side, network, paths in (
            ("teacher", flow_teacher.transformer, [tap.teacher for tap in pruning.taps]),
            ("student", student, [tap.student for tap in pruning.taps]),
        )
        for path in paths
    ]
    with torch.no_grad():
        wanted = family.answer(flow_teacher.transformer, noisy.latents, noisy.timesteps, told)
        found = family.answer(student, noisy.latents, noisy.timesteps, told)
    for handle in handles:
        handle.remove()
    found, wanted = found.double(), wanted.double()
    task = (found - noisy.target).square().mean()
    output = (found - wanted).square().mean()
    features = sum(
        (seen["teacher", tap.teacher] - seen["student", tap.student]).square().mean() for tap in pruning.taps
    )
    for name, value in {"task": task, "output_kd": output, "feature_kd": features}.items():
        assert float(losses[name].detach()) == pytest.approx(float(value), rel=1e-6), name
    assert float(losses["loss"].detach()) == pytest.approx(float(task + 0.5 * output + 2 * features), rel=1e-6)
    losses["loss"].backward()
    assert all(parameter.grad is not None for name, parameter in student.named_parameters() if "layers" in name)


@one_flow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_given_what_the_teacher_has_learn_their_own_part_alone(
    flow_teacher: DiffusionPipeline, checkpointing: bool
) -> None:
    """So that each comes to what the teacher would without those blocks alone that it stands for."""
    family, whole = family_of_pipeline(flow_teacher), flow_teacher.transformer
    student, pruning = prune_unet(whole, load_recipe("half"))
    student.train()
    if checkpointing:
        student.enable_gradient_checkpointing()
    schedule, conditions = family.noise_schedule(flow_teacher.scheduler), Conditions.of(flow_teacher)
    objective = Distillation(student, whole, pruning.taps, conditions, schedule, teacher_inputs=True)
    latents, _, told = inputs(flow_teacher)
    batch = {"latents_mean": latents, "latents_std": torch.zeros_like(latents), **told}
    losses = objective(batch, Draws(0, "noise", 0))
    noisy = schedule.corrupt(conditions.latents(batch, Draws(0, "noise", 0)), drawn_after_latents(latents))

    def features(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
        """What comes out of these modules of the teacher, of the picture."""
        found: dict[str, Tensor] = {}

        def see(path: str, module: nn.Module, _: Any, output: Any) -> None:
            found[path] = family.feature(module, output, noisy.latents)

        handles = [module.register_forward_hook(functools.partial(see, path)) for path, module in modules.items()]
        with torch.no_grad():
            family.answer(whole, noisy.latents, noisy.timesteps, told)
        for handle in handles:
            handle.remove()
        return found

    wanted = features({tap.student: whole.get_submodule(tap.teacher) for tap in pruning.taps})
    for tap in pruning.taps:
        stays = pruning.key_map[tap.student]
        path, first, last = *stays.rsplit(".", 1), tap.teacher.rsplit(".", 1)[1]
        skipped = {f"{path}.{number}" for number in range(int(first) + 1, int(last) + 1)}
        block = {tap.student: whole.get_submodule(stays)}
        with family.bypassed(whole, [unit for unit in family.units(whole.config) if skipped & set(unit.paths)]):
            own = features(block)[tap.student]
        value = (own - wanted[tap.student]).square().mean()
        assert float(losses[f"tap/{tap.student}"].detach()) == pytest.approx(float(value), rel=1e-5), tap

    for before, tap in pairwise(pruning.taps):
        parameters = list(student.get_submodule(before.student).parameters())
        learnt = torch.autograd.grad(losses[f"tap/{tap.student}"], parameters, retain_graph=True, allow_unused=True)
        assert set(learnt) == {None}, tap
    losses["loss"].backward()
    assert all(parameter.grad is not None for name, parameter in student.named_parameters() if "layers" in name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--taps", "layers"], "teacher_inputs gives what the teacher has between stages, and taps is layers; leave"),
        (["--feature_weight", 0], "teacher_inputs leaves features alone to teach all blocks but the last, and feature"),
    ],
)
def test_inputs_of_the_teacher_go_with_features_between_blocks(
    run: Run, z_folder: Path, tmp_path: Path, words: list[object], message: str
) -> None:
    given = ["--student", z_folder, "--data", tmp_path, "--out", tmp_path / "run", "--teacher_inputs", *words]
    outcome = run("distill", z_folder, *given)
    assert outcome.code == 2
    assert message in outcome.said[0]


@pytest.mark.parametrize("captions", [False, True])
def test_features_are_those_of_the_picture_and_of_the_caption_where_it_is_wanted(
    flow_teacher: DiffusionPipeline, captions: bool
) -> None:
    family, network = family_of_pipeline(flow_teacher), flow_teacher.transformer
    latents, timesteps, told = inputs(flow_teacher)
    z = ["layers.0", "layers.0.attention"]
    paths = z if is_z(flow_teacher) else [f"{DOUBLE}.0", f"{SINGLE}.0", f"{DOUBLE}.0.attn"]
    seen: dict[str, Any] = {}

    def see(path: str, *given: Any) -> None:
        seen[path] = given[-1]

    handles = [
        network.get_submodule(path).register_forward_hook(functools.partial(see, path), with_kwargs=False)
        for path in paths
    ]
    features, read = Features(network, paths), functools.partial(family.feature, latents=latents, captions=captions)
    with torch.no_grad(), features.recording(read) as found:
        family.answer(network, latents, timesteps, told)
    features.remove()
    for handle in handles:
        handle.remove()
    for path in paths:
        out = seen[path]
        if isinstance(out, tuple):  # picture and caption apart; attentions give the picture first
            caption, picture = reversed(out[:2]) if path.endswith("attn") else out[:2]
            whole = torch.cat([caption, picture], dim=1)
        else:
            whole, picture = out, out[:, :16] if is_z(flow_teacher) else out[:, -16:]
        assert picture.shape[1] == 16
        assert torch.equal(found[path], whole if captions else picture), path


def drawn_after_latents(latents: Tensor) -> Draws:
    """The random numbers that a batch has left when its latents were drawn."""
    draws = Draws(0, "noise", 0)
    draws.normal(latents.shape)
    return draws


@one_flow
def test_a_run_goes_on_to_the_same_bits(done: Run, flow_folder: Path, flow_data: Path, tmp_path: Path) -> None:
    done("prune", flow_folder, "--recipe", "half", "--out", tmp_path / "student")
    words = ("distill", "--teacher", flow_folder, "--student", tmp_path / "student", "--data", flow_data)
    words += ("--batch_size", 2, "--accumulation", 1, "--sample_every", 0, "--lr", 1e-3)
    done(*words, "--out", tmp_path / "whole", "--steps", 2)
    done(*words, "--out", tmp_path / "parts", "--steps", 1)
    done(*words, "--out", tmp_path / "parts", "--steps", 2)
    whole, parts = (weights(tmp_path / run / "student") for run in ("whole", "parts"))
    before = weights(tmp_path / "student")
    assert whole.keys() == parts.keys() == before.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not any(torch.equal(whole[name], before[name]) for name in whole if name.endswith("to_q.weight"))
    done("generate", tmp_path / "whole" / "student", "--prompt", "red", "--steps", 2, "--out", tmp_path / "pictures")
    assert Image.open(tmp_path / "pictures" / "00000.png").size == (SIDE, SIDE)


def weights(student: Path) -> dict[str, Tensor]:
    (file,) = (student / "transformer").glob("*.safetensors")
    return load_file(file)


@one_flow
def test_prepared_data_and_what_blocks_are_worth(done: Run, flow_folder: Path, flow_data: Path, tmp_path: Path) -> None:
    done("prune", flow_folder, "--recipe", "half", "--out", tmp_path / "student")
    done("prepare", flow_data, "--teacher", flow_folder, "--text_embeddings", "--out", tmp_path / "latents")
    words = ("distill", "--teacher", flow_folder, "--student", tmp_path / "student", "--data", tmp_path / "latents")
    done(*words, "--batch_size", 2, "--accumulation", 1, "--sample_every", 0, "--steps", 1, "--out", tmp_path / "run")
    words = ("sensitivity", flow_folder, "--data", flow_data, "--scores", "output", "--pictures", 4)
    found = done(*words, "--out", tmp_path / "worth", "--json").json
    assert len(found["units"]) == len(units(load_pipeline(flow_folder).transformer.config))


@pytest.mark.slow
def test_a_run_is_foreseen(done: Run, flow_folder: Path, flow_data: Path, tmp_path: Path) -> None:
    """Its parameters, and the memory that a real step follows."""
    done("prune", flow_folder, "--recipe", "half", "--out", tmp_path / "student")
    words = {"teacher": flow_folder, "student": tmp_path / "student", "data": flow_data, "out": tmp_path / "run"}
    options = DistillOptions(**{name: str(path) for name, path in words.items()}, batch_size=1, accumulation=3)
    found = foresee(dataclasses.replace(options, peak_tflops=1.0))
    teacher, student = (load_pipeline(words[name]).transformer for name in ("teacher", "student"))
    assert (found.teacher_params, found.student_params) == (teacher.num_parameters(), student.num_parameters())
    assert found.samples_per_step == 3
    plain, saving = (row.working for row in found.memory if row.batch_size == 1)
    assert saving < plain
    assert found.seconds > 0
    assert found.chosen.working == pytest.approx(followed(options), rel=0.05)


# What is refused


VERBS: dict[str, Callable[[Path, Path], tuple[object, ...]]] = {
    "personalize": lambda model, out: ("personalize", model, "--images", out, "--prompt", "sks a", "--out", out),
    "benchmark": lambda model, out: ("benchmark", model),
    "demo": lambda model, out: ("demo", model),
    "decoder": lambda model, out: ("decoder", "--teacher", model, "--data", "emoji/train", "--out", out),
    "generate --image": lambda model, out: ("generate", model, "--prompt", "a", "--image", out, "--out", out),
}


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_not_ready_says_so(run: Run, flow_folder: Path, tmp_path: Path, verb: str) -> None:
    outcome = run(*VERBS[verb](flow_folder, tmp_path / "out"))
    assert outcome.code == 2, outcome.err
    name = family_of(load_denoiser_config(flow_folder)).name
    assert f"model {flow_folder} is of {name}, for which there is no {verb} yet" in outcome.said[-1]
    assert not (tmp_path / "out").exists()


@one_flow
def test_a_student_of_another_depth(run: Run, done: Run, flow_folder: Path, flow_data: Path, tmp_path: Path) -> None:
    done("prune", flow_folder, "--recipe", "half", "--out", tmp_path / "half")
    shutil.copy(asset("recipes", "two-thirds.yaml"), tmp_path / "half" / "recipe.yaml")
    words = ("distill", "--teacher", flow_folder, "--student", tmp_path / "half", "--data", flow_data)
    outcome = run(*words, "--out", tmp_path / "run")
    assert outcome.code == 2
    assert "was not made from teacher" in outcome.said[-1]


def test_without_a_text_encoder(run: Run, flow_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for part in flow_folder.iterdir():
        if part.name != "text_encoder":
            (copy / part.name).symlink_to(part)
    outcome = run("prune", copy, "--recipe", "half", "--out", tmp_path / "student")
    assert outcome.code == 2
    assert f"{copy} has no folder text_encoder" in outcome.said[-1]


@one_flow
def test_weights_in_eight_bits(run: Run, flow_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(flow_folder, copy)
    (file,) = (copy / "transformer").glob("*.safetensors")
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    outcome = run("prune", copy, "--recipe", "half", "--out", tmp_path / "student")
    assert outcome.code == 2
    assert "in the number format F8_E4M3, which is not read; give a model in bf16, fp16 or fp32" in outcome.said[-1]
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (
            functools.partial(BUILDS["flux"], guidance_embeds=False),
            "is told of no guidance, as few-step models are",
        ),
        (functools.partial(BUILDS["klein"], is_distilled=True), "the teacher says that it is distilled"),
    ],
)
def test_a_few_step_teacher_is_remarked_on_and_taken(
    build: Callable[[], DiffusionPipeline], said: str, done: Run, tmp_path: Path
) -> None:
    build().save_pretrained(tmp_path / "teacher")
    outcome = done("prune", tmp_path / "teacher", "--recipe", "half", "--out", tmp_path / "student")
    (line,) = (line for line in outcome.said if said in line)
    assert "a student learns at all of them" in line


@one_flow
def test_teachers_of_many_steps_are_not_remarked_on(done: Run, flow_folder: Path, tmp_path: Path) -> None:
    outcome = done("prune", flow_folder, "--recipe", "half", "--out", tmp_path / "student")
    assert not [line for line in outcome.said if "few" in line]


def test_a_gguf_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "z-image-Q4_K_M.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    outcome = run("prune", tmp_path / "z-image-Q4_K_M.gguf", "--recipe", "half", "--out", tmp_path / "student")
    assert outcome.code == 2
    assert "is not a .safetensors file or a folder; other files are not loaded" in outcome.said[-1]


@pytest.mark.parametrize("blocks", ["0", "[]", "{layers: 0}"])
def test_a_recipe_that_drops_everything(run: Run, tmp_path: Path, blocks: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(Z))
    (tmp_path / "none.yaml").write_text(f"name: none\nblocks: {blocks}\n")
    outcome = run("describe", tmp_path, "--recipe", tmp_path / "none.yaml")
    assert outcome.code == 2
    assert len(outcome.said) == 1
    assert "keep 1 to 30" in outcome.said[0] or "those that stay" in outcome.said[0]


@pytest.mark.parametrize(("guidance", "told"), [(0.5, "green"), (0, None)])
def test_pictures_say_what_they_were_kept_away_from(
    done: Run, z_folder: Path, tmp_path: Path, guidance: float, told: str | None
) -> None:
    """From guidance 0 on, where Z-Image has it."""
    words = ["--prompt", "red", "--negative_prompt", "green", "--steps", 1, "--guidance", guidance]
    done("generate", z_folder, *words, "--out", tmp_path)
    with Image.open(tmp_path / "00000.png") as picture:
        assert json.loads(picture.text["bksdm"]).get("negative_prompt") == told


def test_negative_prompts(flow_teacher: DiffusionPipeline) -> None:
    pictures = sample(flow_teacher, [Request("red", 0)], steps=1, guidance=2.0, negative_prompt="green")
    if is_z(flow_teacher):
        assert next(pictures)
    else:
        with pytest.raises(InputError, match="takes no negative prompt; leave it out"):
            next(pictures)


def test_schedulers_of_timesteps_are_not_offered(run: Run, z_folder: Path, tmp_path: Path) -> None:
    outcome = run("generate", z_folder, "--prompt", "red", "--scheduler", "LCMScheduler", "--out", tmp_path / "o")
    assert outcome.code == 2
    assert "unknown scheduler 'LCMScheduler'; give one of FlowMatchEulerDiscreteScheduler" in outcome.err
    assert not (tmp_path / "o").exists()


def test_sizes_are_multiples_of_what_becomes_a_token(run: Run, z_folder: Path, tmp_path: Path) -> None:
    """With a VAE that makes a latent of 8 by 8 pixels, as those of the published models."""
    pipeline = build_z_pipeline()
    pipeline.vae_scale_factor = 8
    check_multiple(pixels_of_a_token(pipeline), height=48, width=None)
    with pytest.raises(InputError, match="width is 40; give a multiple of 16 for this model"):
        check_multiple(pixels_of_a_token(pipeline), height=48, width=40)


def test_a_file_that_tells_half_leaves_the_rest_to_the_family(z_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(z_folder, tmp_path / "z"))
    (folder / SAMPLING_FILE).write_text('{"num_inference_steps": 2}')
    assert drawing(folder) == Defaults(2, 5.0)


def test_families_are_drawn_as_their_pipelines_are(flow_teacher: DiffusionPipeline) -> None:
    """Steps and guidance are those of diffusers where neither user nor model says."""
    usual, asked = family_of_pipeline(flow_teacher).usual, inspect.signature(type(flow_teacher).__call__).parameters
    wanted = (asked["num_inference_steps"].default, asked["guidance_scale"].default)
    assert (usual.steps, usual.guidance) == wanted
