"""The objective of retraining, in every family: its terms against the formula, its gradients, the frozen teacher."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from bksdm.common.randomness import Draws
from bksdm.distill.captions import CaptionPool, Captions
from bksdm.distill.conditions import Conditions
from bksdm.distill.losses import LossWeights
from bksdm.distill.objective import Distillation
from bksdm.families import family_of_pipeline
from bksdm.families.noise import Corrupted, NoiseSchedule
from bksdm.families.recipe import Tap, load_recipe
from bksdm.models.pipelines import text_encoders
from bksdm.options.distill import Taps
from bksdm.pruning.inherit import prune_unet
from fast import one_kind, slow
from published import RECIPES, taps
from tiny_models import MAX_TOKENS, PICTURE, asked, random_latents, random_told

SHAPES = [("xl", "ssd-1b"), *(("v1", recipe) for recipe in RECIPES)]
# Others of the same families.
MORE = [("xl", "koala-700m"), *(("v2", recipe) for recipe in RECIPES)]
every_student = pytest.mark.parametrize(("version", "recipe"), [*SHAPES, *(slow(*shape) for shape in MORE)])
# For what the shape of a student hardly changes.
one_student = pytest.mark.parametrize(
    ("version", "recipe"), [("v1", "tiny"), *(slow(*shape) for shape in [*SHAPES, *MORE] if shape != ("v1", "tiny"))]
)


@dataclass
class Setting:
    """An objective with what it is made of."""

    teacher: UNet2DConditionModel
    student: UNet2DConditionModel
    conditions: Conditions
    schedule: NoiseSchedule
    objective: Distillation

    def losses(self, seed: int = 0, batch: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        return self.objective(pixels_and_tokens(self) if batch is None else batch, Draws(seed, "test"))

    def noisy(self, batch: dict[str, Tensor], seed: int = 0) -> Corrupted:
        draws = Draws(seed, "test")
        return self.schedule.corrupt(self.conditions.latents(batch, draws), draws)


@cache
def frozen(pipeline: DiffusionPipeline) -> tuple[UNet2DConditionModel, Conditions]:
    """Copies of a pipeline's networks that no objective changes: teacher and what gives the conditions."""
    encoders = [copy.deepcopy(encoder) for encoder in text_encoders(pipeline)]
    return copy.deepcopy(pipeline.unet), Conditions(family_of_pipeline(pipeline), copy.deepcopy(pipeline.vae), encoders)


def setting(
    pipeline: DiffusionPipeline,
    recipe: str,
    weights: LossWeights | None = None,
    *,
    checkpointing: bool = False,
    teacher_dtype: torch.dtype | None = None,
    taps: Taps = "stages",
    **choices: object,
) -> Setting:
    """An objective of a fresh student; its teacher is that of other tests too, or with a type its own."""
    teacher, conditions = frozen(pipeline)
    student, pruning = prune_unet(teacher, load_recipe(recipe))
    student.train()
    if checkpointing:
        student.enable_gradient_checkpointing()
    if teacher_dtype:
        teacher = copy.deepcopy(teacher).to(teacher_dtype)
    schedule = NoiseSchedule.from_scheduler(pipeline.scheduler)
    chosen = pruning.chosen_taps(taps)
    objective = Distillation(student, teacher.train(), chosen, conditions, schedule, weights, **choices)
    return Setting(teacher, student, conditions, schedule, objective)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels_and_tokens(made: Setting) -> dict[str, Tensor]:
    told = random_told(made.teacher.config)
    encoders = len(made.conditions.encoders)
    return {
        "pixel_values": torch.rand(2, 3, PICTURE, PICTURE, generator=rng(1)) * 2 - 1,
        "input_ids": torch.randint(500, (2, encoders, MAX_TOKENS), generator=rng(2)).squeeze(1),
        **{name: told[name] for name in made.conditions.family.of_picture},
    }


def latents_and_captions(made: Setting) -> dict[str, Tensor]:
    return random_latents() | random_told(made.teacher.config)


def outputs(unet: UNet2DConditionModel, paths: list[str], noisy: Corrupted, told: dict[str, Tensor]) -> list[Tensor]:
    """What a U-Net answers, and what its modules at `paths` give, by hooks of the test's own."""
    seen: dict[str, Tensor] = {}

    def hook_for(path: str) -> object:
        return lambda _module, _args, output: seen.update({path: output[0] if isinstance(output, tuple) else output})

    handles = [unet.get_submodule(path).register_forward_hook(hook_for(path)) for path in paths]
    with torch.no_grad():
        answer = asked(unet, noisy.latents, noisy.timesteps, told)
    for handle in handles:
        handle.remove()
    return [answer, *(seen[path] for path in paths)]


def mean_squared_error(first: Tensor, second: Tensor) -> float:
    return float((first.double() - second.double()).square().mean())


@pytest.mark.parametrize(
    ("sample", "version", "recipe"),
    [
        pytest.param(pixels_and_tokens, "v1", "small", id="pixels-v1-small"),
        pytest.param(latents_and_captions, "v1", "tiny", id="latents-v1-tiny"),
        pytest.param(latents_and_captions, "xl", "ssd-1b", id="latents-xl-ssd-1b"),
        slow(pixels_and_tokens, "xl", "ssd-1b", id="pixels-xl-ssd-1b"),
        slow(latents_and_captions, "v1", "base", id="latents-v1-base"),
        slow(latents_and_captions, "v2", "small", id="latents-v2-small"),
    ],
)
def test_all_terms_are_those_of_the_paper(
    version_teacher: DiffusionPipeline,
    version: str,
    recipe: str,
    sample: Callable[[Setting], dict[str, Tensor]],
) -> None:
    made = setting(version_teacher, recipe, LossWeights(0.5, 2.0, 3.0))
    batch = sample(made)
    losses = {name: value.item() for name, value in made.losses(batch=batch).items()}
    noisy, told = made.noisy(batch), made.conditions.told(batch)
    pairs = taps(recipe, version)
    taught, *wanted = outputs(made.teacher, [path for path, _ in pairs], noisy, told)
    predicted, *learnt = outputs(made.student, [path for _, path in pairs], noisy, told)

    task, output = mean_squared_error(predicted, noisy.target), mean_squared_error(predicted, taught)
    per_tap = [mean_squared_error(*features) for features in zip(learnt, wanted, strict=True)]
    expected = {"loss": 0.5 * task + 2.0 * output + 3.0 * sum(per_tap), "task": task, "output_kd": output}
    expected |= {"feature_kd": sum(per_tap)}
    expected |= {f"tap/{path}": value for (_, path), value in zip(pairs, per_tap, strict=True)}
    assert losses == pytest.approx(expected, rel=1e-6)


def test_the_target_is_what_the_scheduler_predicts(
    v1_teacher: StableDiffusionPipeline, v2_teacher: StableDiffusionPipeline
) -> None:
    noise = setting(v1_teacher, "base").noisy(random_latents())
    velocity = setting(v2_teacher, "base").noisy(random_latents())
    assert torch.equal(noise.latents, velocity.latents)
    assert not torch.allclose(noise.target, velocity.target, atol=0.1)


def test_the_paper_weighs_all_terms_alike(v1_teacher: StableDiffusionPipeline) -> None:
    losses = setting(v1_teacher, "tiny").losses()
    assert torch.isclose(losses["loss"], losses["task"] + losses["output_kd"] + losses["feature_kd"])


def test_a_student_that_is_the_teacher_has_the_task_loss_alone(v1_teacher: StableDiffusionPipeline) -> None:
    made = setting(v1_teacher, "base")
    same = [Tap(path, path) for path, _ in taps("base")]
    twin = Distillation(copy.deepcopy(made.teacher), made.teacher, same, made.conditions, made.schedule)
    losses = {name: value.item() for name, value in twin(pixels_and_tokens(made), Draws(0, "test")).items()}
    assert losses["output_kd"] == losses["feature_kd"] == 0
    assert losses["loss"] == losses["task"] > 0


def test_losses_are_a_function_of_the_random_numbers(v1_teacher: StableDiffusionPipeline) -> None:
    made = setting(v1_teacher, "base")
    first, again, other = (made.losses(seed)["loss"].item() for seed in (0, 0, 1))
    assert first == again != other


# Gradients


@pytest.mark.parametrize(
    ("version", "recipe", "checkpointing"),
    [
        ("v1", "small", True),
        ("v1", "tiny", False),
        ("xl", "ssd-1b", True),
        slow("v1", "small", False),
        slow("v1", "tiny", True),
        slow("xl", "ssd-1b", False),
        *(slow("xl", "small", checkpointing) for checkpointing in (False, True)),
    ],
)
def test_every_tap_teaches_what_comes_before_it(
    version_teacher: DiffusionPipeline, version: str, recipe: str, checkpointing: bool
) -> None:
    made = setting(version_teacher, recipe, checkpointing=checkpointing)
    with torch.no_grad():  # where all layers of its first stages stay, a fresh student is its teacher there
        made.student.conv_in.weight *= 1.5
    losses = made.losses()
    for _, path in taps(recipe, version):
        made.student.zero_grad(set_to_none=True)
        losses[f"tap/{path}"].backward(retain_graph=True)
        gradients = [parameter.grad for parameter in made.student.get_submodule(path).parameters()]
        assert all(gradient is not None for gradient in gradients), path
        assert any(gradient.any() for gradient in gradients), path
        assert made.student.conv_in.weight.grad.any(), path
        assert made.student.conv_out.weight.grad is None, path


@pytest.mark.parametrize("term", ["loss", "task", "output_kd"])
def test_the_other_terms_teach_all_parameters(v1_teacher: StableDiffusionPipeline, term: str) -> None:
    made = setting(v1_teacher, "small")
    made.losses()[term].backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in made.student.parameters())


@one_student
def test_gradient_checkpointing_changes_no_gradient(version_teacher: DiffusionPipeline, recipe: str) -> None:
    plain, checkpointed = (setting(version_teacher, recipe, checkpointing=on) for on in (False, True))
    for made in (plain, checkpointed):
        made.losses()["loss"].backward()
    saved = dict(checkpointed.student.named_parameters())
    for name, parameter in plain.student.named_parameters():
        assert torch.allclose(parameter.grad, saved[name].grad, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize(
    ("weights", "terms"),
    [
        (LossWeights(1, 0, 0), ["task"]),
        (LossWeights(0, 1, 0), ["output_kd"]),
        (LossWeights(0, 0, 1), ["feature_kd"]),
        (LossWeights(1, 0, 1), ["task", "feature_kd"]),
    ],
)
def test_a_weight_of_zero_removes_a_term(
    v1_teacher: StableDiffusionPipeline, weights: LossWeights, terms: list[str]
) -> None:
    weighed, whole = setting(v1_teacher, "tiny", weights), setting(v1_teacher, "tiny")
    losses, wanted = weighed.losses(), whole.losses()
    losses["loss"].backward()
    sum(wanted[term] for term in terms).backward()
    assert losses["loss"].item() == pytest.approx(sum(losses[term].item() for term in terms))
    assert losses.keys() == wanted.keys()
    for first, second in zip(weighed.student.parameters(), whole.student.parameters(), strict=True):
        assert torch.allclose(gradient(first), gradient(second), rtol=1e-5, atol=1e-6)


def gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


# Choices beyond the paper's


def empty(teacher: DiffusionPipeline) -> dict[str, Tensor]:
    return of_captions(teacher, 1, 6)


def of_captions(teacher: DiffusionPipeline, count: int, seed: int) -> dict[str, Tensor]:
    """What random captions give."""
    told = random_told(teacher.unet.config, count, seed)
    return {name: told[name] for name in family_of_pipeline(teacher).of_caption}


def pool(teacher: DiffusionPipeline) -> CaptionPool:
    """Five captions, embedded as random numbers."""
    embedded = of_captions(teacher, 5, 7)
    tokens = torch.arange(5)[:, None]
    return CaptionPool(tokens, lambda chosen: {name: value[chosen[:, 0]] for name, value in embedded.items()}, 0)


def many(made: Setting, count: int = 6) -> dict[str, Tensor]:
    batch = latents_and_captions(made)
    return {name: value.repeat(count // 2, *[1] * (value.ndim - 1)) for name, value in batch.items()}


ALL: dict[str, object] = {"taps": "both", "normalize_features": True, "mask_features": 2.0, "guided_output": 3.0}


def all_choices(teacher: DiffusionPipeline) -> dict[str, object]:
    return ALL | {"captions": Captions(empty(teacher), dropout=0.3, pool=pool(teacher), rate=1.0)}


def test_choices_that_are_off_leave_every_bit(v1_teacher: StableDiffusionPipeline) -> None:
    plain, off = setting(v1_teacher, "small"), setting(v1_teacher, "small", captions=Captions(empty(v1_teacher)))
    losses, others = plain.losses(), off.losses()
    assert losses.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in losses.items())
    losses["loss"].backward()
    others["loss"].backward()
    for first, second in zip(plain.student.parameters(), off.student.parameters(), strict=True):
        assert torch.equal(first.grad, second.grad)


@pytest.mark.parametrize(
    ("version", "recipe", "count", "checkpointing"),
    [
        ("v1", "base", 10, True),
        ("v1", "tiny", 9, False),
        ("xl", "vega", 15, False),
        slow("v1", "base", 10, False),
        slow("v1", "tiny", 9, True),
        slow("xl", "vega", 15, True),
    ],
)
def test_every_self_attention_teaches_what_comes_before_it(
    version_teacher: DiffusionPipeline, recipe: str, count: int, checkpointing: bool
) -> None:
    made = setting(version_teacher, recipe, checkpointing=checkpointing, taps="self_attention")
    with torch.no_grad():  # up to its first self-attention, a fresh student is its teacher
        made.student.conv_in.weight *= 1.5
    losses = made.losses()
    paths = [name.removeprefix("tap/") for name in losses if name.startswith("tap/")]
    assert len(paths) == count
    for path in paths:
        made.student.zero_grad(set_to_none=True)
        losses[f"tap/{path}"].backward(retain_graph=True)
        gradients = [parameter.grad for parameter in made.student.get_submodule(path).parameters()]
        assert all(gradient is not None and gradient.any() for gradient in gradients), path
        assert made.student.conv_in.weight.grad.any(), path
        assert made.student.conv_out.weight.grad is None, path


@one_kind
def test_gradient_checkpointing_changes_no_gradient_of_any_choice(kind_teacher: DiffusionPipeline) -> None:
    made = [setting(kind_teacher, "small", checkpointing=on, **all_choices(kind_teacher)) for on in (False, True)]
    for one in made:
        one.losses()["loss"].backward()
    saved = dict(made[1].student.named_parameters())
    for name, parameter in made[0].student.named_parameters():
        assert torch.allclose(parameter.grad, saved[name].grad, rtol=1e-4, atol=1e-6), name


def test_self_attentions_are_matched_by_the_formula(kind_teacher: DiffusionPipeline) -> None:
    made = setting(kind_teacher, "small", taps="self_attention")
    batch = latents_and_captions(made)
    losses, noisy = made.losses(batch=batch), made.noisy(batch)
    teachers, students = ([getattr(tap, side) for tap in made.objective.taps] for side in ("teacher", "student"))
    _, *wanted = outputs(made.teacher, teachers, noisy, batch)
    _, *learnt = outputs(made.student, students, noisy, batch)
    for path, first, second in zip(students, learnt, wanted, strict=True):
        assert losses[f"tap/{path}"].item() == pytest.approx(mean_squared_error(first, second), rel=1e-5)


@pytest.mark.parametrize(
    ("version", "recipe", "count"), [("v1", "base", 22), ("v1", "tiny", 18), ("xl", "base", 16), ("xl", "ssd-1b", 26)]
)
def test_every_layer_that_stays_is_matched(version_teacher: DiffusionPipeline, recipe: str, count: int) -> None:
    """base: 4 + 8 ResNet blocks, 3 + 6 attentions, and the middle; a fresh student's first layer is its teacher's."""
    losses = setting(version_teacher, recipe, taps="layers").losses()
    taps = {name: loss.item() for name, loss in losses.items() if name.startswith("tap/")}
    assert len(taps) == count
    assert taps["tap/down_blocks.0.resnets.0"] == 0
    assert losses["feature_kd"].item() == pytest.approx(sum(taps.values()), rel=1e-5)


def test_normalized_taps_do_not_feel_the_scale_of_the_features(v1_teacher: StableDiffusionPipeline) -> None:
    """Convolutions twice as large, in both, double what the stages give that end in them."""
    plain, scaled = (
        setting(v1_teacher, "small", teacher_dtype=torch.float32, normalize_features=True) for _ in range(2)
    )
    with torch.no_grad():
        for network in (scaled.teacher, scaled.student):
            upsampler = network.up_blocks[0].upsamplers[0].conv
            upsampler.weight *= 2
            upsampler.bias *= 2
    first, second = (made.losses()["tap/up_blocks.0"].item() for made in (plain, scaled))
    assert first == pytest.approx(second, rel=1e-4)


def test_guided_outputs_are_compared_by_the_formula(kind_teacher: DiffusionPipeline) -> None:
    weights = LossWeights(0.5, 2.0, 3.0)
    made = setting(kind_teacher, "small", weights, guided_output=3.0, captions=Captions(empty(kind_teacher)))
    batch = latents_and_captions(made)
    free = batch | {name: torch.cat([value, value]) for name, value in empty(kind_teacher).items()}
    losses, noisy = made.losses(batch=batch), made.noisy(batch)

    def answer(unet: UNet2DConditionModel) -> Tensor:
        with_caption, without = (outputs(unet, [], noisy, told)[0] for told in (batch, free))
        return without + 3.0 * (with_caption - without)

    wanted = mean_squared_error(answer(made.student), answer(made.teacher))
    assert losses["guided_kd"].item() == pytest.approx(wanted, rel=1e-4)
    plain = setting(kind_teacher, "small", weights).losses(batch=batch)
    for name in plain.keys() - {"loss"}:
        assert losses[name].item() == pytest.approx(plain[name].item(), rel=1e-4), name
    assert losses["loss"].item() == pytest.approx(plain["loss"].item() + 2.0 * wanted, rel=1e-4)


def test_guidance_needs_the_empty_prompt(v1_teacher: StableDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="guided_output needs captions"):
        setting(v1_teacher, "small", guided_output=3.0)


def told_of(made: Setting, batch: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What either U-Net is told in a step."""
    seen: dict[str, dict[str, Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(_module: object, args: tuple[Tensor, ...], named: dict[str, dict[str, Tensor]]) -> None:
            seen[name] = {"context": args[2], **named.get("added_cond_kwargs", {})}

        return see

    networks = {"teacher": made.teacher, "student": made.student}
    hooks = [unet.register_forward_pre_hook(hook(name), with_kwargs=True) for name, unet in networks.items()]
    made.losses(batch=batch)
    for one in hooks:
        one.remove()
    return seen


def test_teacher_and_student_are_told_the_same(kind_teacher: DiffusionPipeline) -> None:
    captions = Captions(empty(kind_teacher), dropout=0.3, pool=pool(kind_teacher), rate=0.5)
    made = setting(kind_teacher, "small", captions=captions)
    batch = many(made, 12)
    seen = told_of(made, batch)
    assert seen["teacher"].keys() == seen["student"].keys() == batch.keys() - {"latents_mean", "latents_std"}
    assert all(torch.equal(value, seen["student"][name]) for name, value in seen["teacher"].items())
    for name, value in empty(kind_teacher).items():
        assert not torch.equal(seen["teacher"][name], batch[name])
        dropped = (seen["teacher"][name] == value).flatten(1).all(dim=1)
        assert 0 < int(dropped.sum()) < 12
    for name in made.conditions.family.of_picture:
        assert torch.equal(seen["teacher"][name], batch[name].float()), "a picture stays what it is"


def test_the_task_leaves_out_pictures_whose_caption_is_replaced(v1_teacher: StableDiffusionPipeline) -> None:
    made = setting(v1_teacher, "small", captions=Captions(empty(v1_teacher), pool=pool(v1_teacher), rate=0.0))
    losses = made.losses()
    assert losses["task"] == 0
    assert losses["output_kd"] > 0
    losses["task"].backward()
    assert not any(gradient(parameter).any() for parameter in made.student.parameters())


def test_the_task_keeps_pictures_whose_caption_is_dropped(kind_teacher: DiffusionPipeline) -> None:
    plain = setting(kind_teacher, "small")
    batch = latents_and_captions(plain)
    dropped = setting(kind_teacher, "small", captions=Captions(empty(kind_teacher), dropout=1.0)).losses(batch=batch)
    batch |= {name: torch.cat([value, value]) for name, value in empty(kind_teacher).items()}
    assert dropped["task"].item() == pytest.approx(plain.losses(batch=batch)["task"].item())


def test_the_feature_loss_has_the_weight_that_remains(v1_teacher: StableDiffusionPipeline) -> None:
    left = iter((1.0, 0.25, 0.0))
    made = setting(v1_teacher, "small", LossWeights(1, 1, 4), remaining=lambda: next(left))
    for share in (1.0, 0.25, 0.0):
        losses = {name: value.item() for name, value in made.losses().items()}
        expected = losses["task"] + losses["output_kd"] + 4 * share * losses["feature_kd"]
        assert losses["loss"] == pytest.approx(expected, rel=1e-6)


@one_kind
def test_how_draws_are_split_into_batches_does_not_matter_to_any_choice(kind_teacher: DiffusionPipeline) -> None:
    made = setting(kind_teacher, "small", **all_choices(kind_teacher))
    batch = many(made, 6)
    whole = made.objective(batch, Draws(0, "test", 10))
    parts = [
        made.objective({name: value[i : i + 2] for name, value in batch.items()}, Draws(0, "test", 10 + i))
        for i in (0, 2, 4)
    ]
    assert len(whole) == 5 + len(made.objective.taps)
    for name, value in whole.items():
        assert value.item() == pytest.approx(sum(part[name].item() for part in parts) / 3, rel=1e-4), name


# The teacher


def test_a_teacher_computed_by_openvino_is_itself_whatever_is_tapped(exported: StableDiffusionPipeline) -> None:
    pytest.importorskip("openvino")
    made = setting(exported, "base", taps="both")
    batch = latents_and_captions(made)
    assert made.objective.compile_teacher(batch, Draws(0, "test"), by_openvino=True) < 1e-4


@one_student
def test_the_teacher_is_frozen(version_teacher: DiffusionPipeline, recipe: str) -> None:
    made = setting(version_teacher, recipe)
    before = copy.deepcopy(made.teacher.state_dict())
    made.losses()["loss"].backward()
    assert not any(parameter.requires_grad for parameter in made.teacher.parameters())
    for network in (made.teacher, made.conditions.vae, *made.conditions.encoders):
        assert not any(module.training for module in network.modules())
        assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(before[key], tensor) for key, tensor in made.teacher.state_dict().items())


def test_the_student_stays_in_training_mode(v1_teacher: StableDiffusionPipeline) -> None:
    made = setting(v1_teacher, "base")
    made.losses()
    assert made.student.training


@one_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_teacher_may_have_half_precision(kind_teacher: DiffusionPipeline, dtype: torch.dtype) -> None:
    exact, rough = setting(kind_teacher, "base"), setting(kind_teacher, "base", teacher_dtype=dtype)
    losses = rough.losses()
    assert all(value.dtype == torch.float32 for value in losses.values())
    for name, value in exact.losses().items():
        assert losses[name].item() == pytest.approx(value.item(), rel=0.1, abs=1e-2), name


@one_kind
def test_autocast_keeps_the_losses_in_float32(kind_teacher: DiffusionPipeline) -> None:
    made = setting(kind_teacher, "base", teacher_dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        losses = made.losses()
    losses["loss"].backward()
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    assert {parameter.grad.dtype for parameter in made.student.parameters()} == {torch.float32}
