"""The objective of retraining: its terms against the formula, its gradients, and the frozen teacher."""

import copy
from dataclasses import dataclass

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from bksdm.common.randomness import Draws
from bksdm.distill.captions import CaptionPool, Captions
from bksdm.distill.conditions import Conditions
from bksdm.distill.losses import LossWeights
from bksdm.distill.objective import Distillation
from bksdm.families.noise import Corrupted, NoiseSchedule
from bksdm.families.recipe import Tap, load_recipe
from bksdm.options import Taps
from bksdm.pruning.run import prune_unet
from published import RECIPES, taps
from tiny_models import CONTEXT, LATENT, MAX_TOKENS, PICTURE

every_recipe = pytest.mark.parametrize("recipe", RECIPES)


@dataclass
class Setting:
    """An objective with what it is made of."""

    teacher: UNet2DConditionModel
    student: UNet2DConditionModel
    conditions: Conditions
    schedule: NoiseSchedule
    objective: Distillation

    def losses(self, seed: int = 0, batch: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        return self.objective(pixels_and_tokens() if batch is None else batch, Draws(seed, "test"))

    def noisy(self, batch: dict[str, Tensor], seed: int = 0) -> Corrupted:
        draws = Draws(seed, "test")
        return self.schedule.corrupt(self.conditions.latents(batch, draws), draws)


def setting(
    pipeline: StableDiffusionPipeline,
    recipe: str,
    weights: LossWeights | None = None,
    *,
    checkpointing: bool = False,
    teacher_dtype: torch.dtype = torch.float32,
    taps: Taps = "stages",
    **choices: object,
) -> Setting:
    teacher = copy.deepcopy(pipeline.unet)
    student, pruning = prune_unet(teacher, load_recipe(recipe))
    student.train()
    if checkpointing:
        student.enable_gradient_checkpointing()
    teacher.to(teacher_dtype)
    conditions = Conditions(copy.deepcopy(pipeline.vae), copy.deepcopy(pipeline.text_encoder))
    schedule = NoiseSchedule.from_scheduler(pipeline.scheduler)
    chosen = pruning.chosen_taps(taps)
    objective = Distillation(student, teacher.train(), chosen, conditions, schedule, weights, **choices)
    return Setting(teacher, student, conditions, schedule, objective)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels_and_tokens() -> dict[str, Tensor]:
    return {
        "pixel_values": torch.rand(2, 3, PICTURE, PICTURE, generator=rng(1)) * 2 - 1,
        "input_ids": torch.randint(500, (2, MAX_TOKENS), generator=rng(2)),
    }


def latents_and_context() -> dict[str, Tensor]:
    return {
        "latents_mean": torch.randn(2, 4, LATENT, LATENT, generator=rng(3)),
        "latents_std": torch.rand(2, 4, LATENT, LATENT, generator=rng(4)),
        "context": torch.randn(2, MAX_TOKENS, CONTEXT, generator=rng(5)),
    }


def outputs(unet: UNet2DConditionModel, paths: list[str], noisy: Corrupted, context: Tensor) -> list[Tensor]:
    """What a U-Net answers, and what its modules at `paths` give, by hooks of the test's own."""
    seen: dict[str, Tensor] = {}

    def hook_for(path: str) -> object:
        return lambda _module, _args, output: seen.update({path: output[0] if isinstance(output, tuple) else output})

    handles = [unet.get_submodule(path).register_forward_hook(hook_for(path)) for path in paths]
    with torch.no_grad():
        answer = unet(noisy.latents, noisy.timesteps, context).sample
    for handle in handles:
        handle.remove()
    return [answer, *(seen[path] for path in paths)]


def mean_squared_error(first: Tensor, second: Tensor) -> float:
    return float((first.double() - second.double()).square().mean())


@every_recipe
@pytest.mark.parametrize("batch", [pixels_and_tokens(), latents_and_context()], ids=["pixels", "latents"])
def test_all_terms_are_those_of_the_paper(
    teacher: StableDiffusionPipeline, recipe: str, batch: dict[str, Tensor]
) -> None:
    made = setting(teacher, recipe, LossWeights(0.5, 2.0, 3.0))
    losses = {name: value.item() for name, value in made.losses(batch=batch).items()}
    noisy, context = made.noisy(batch), made.conditions.context(batch)
    pairs = taps(recipe)
    taught, *wanted = outputs(made.teacher, [path for path, _ in pairs], noisy, context)
    predicted, *learnt = outputs(made.student, [path for _, path in pairs], noisy, context)

    task, output = mean_squared_error(predicted, noisy.target), mean_squared_error(predicted, taught)
    per_tap = [mean_squared_error(*features) for features in zip(learnt, wanted, strict=True)]
    expected = {"loss": 0.5 * task + 2.0 * output + 3.0 * sum(per_tap), "task": task, "output_kd": output}
    expected |= {"feature_kd": sum(per_tap)}
    expected |= {f"tap/{path}": value for (_, path), value in zip(pairs, per_tap, strict=True)}
    assert losses == pytest.approx(expected, rel=1e-6)


def test_the_target_is_what_the_scheduler_predicts(
    v1_teacher: StableDiffusionPipeline, v2_teacher: StableDiffusionPipeline
) -> None:
    noise = setting(v1_teacher, "base").noisy(latents_and_context())
    velocity = setting(v2_teacher, "base").noisy(latents_and_context())
    assert torch.equal(noise.latents, velocity.latents)
    assert not torch.allclose(noise.target, velocity.target, atol=0.1)


def test_the_paper_weighs_all_terms_alike(v1_teacher: StableDiffusionPipeline) -> None:
    losses = setting(v1_teacher, "tiny").losses()
    assert torch.isclose(losses["loss"], losses["task"] + losses["output_kd"] + losses["feature_kd"])


def test_a_student_that_is_the_teacher_has_the_task_loss_alone(v1_teacher: StableDiffusionPipeline) -> None:
    made = setting(v1_teacher, "base")
    same = [Tap(path, path) for path, _ in taps("base")]
    twin = Distillation(copy.deepcopy(made.teacher), made.teacher, same, made.conditions, made.schedule)
    losses = {name: value.item() for name, value in twin(pixels_and_tokens(), Draws(0, "test")).items()}
    assert losses["output_kd"] == losses["feature_kd"] == 0
    assert losses["loss"] == losses["task"] > 0


def test_losses_are_a_function_of_the_random_numbers(v1_teacher: StableDiffusionPipeline) -> None:
    made = setting(v1_teacher, "base")
    first, again, other = (made.losses(seed)["loss"].item() for seed in (0, 0, 1))
    assert first == again != other


# Gradients


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("recipe", ["small", "tiny"])
def test_every_tap_teaches_what_comes_before_it(
    v1_teacher: StableDiffusionPipeline, recipe: str, checkpointing: bool
) -> None:
    made = setting(v1_teacher, recipe, checkpointing=checkpointing)
    losses = made.losses()
    for _, path in taps(recipe):
        made.student.zero_grad(set_to_none=True)
        losses[f"tap/{path}"].backward(retain_graph=True)
        gradients = [parameter.grad for parameter in made.student.get_submodule(path).parameters()]
        assert all(gradient is not None for gradient in gradients), path
        assert any(gradient.any() for gradient in gradients), path
        assert made.student.conv_in.weight.grad.any(), path
        assert made.student.conv_out.weight.grad is None, path


@pytest.mark.parametrize("term", ["loss", "task", "output_kd"])
def test_the_other_terms_teach_all_parameters(v1_teacher: StableDiffusionPipeline, term: str) -> None:
    made = setting(v1_teacher, "tiny")
    made.losses()[term].backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in made.student.parameters())


@every_recipe
def test_gradient_checkpointing_changes_no_gradient(teacher: StableDiffusionPipeline, recipe: str) -> None:
    plain, checkpointed = setting(teacher, recipe), setting(teacher, recipe, checkpointing=True)
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


def empty() -> Tensor:
    return torch.randn(MAX_TOKENS, CONTEXT, generator=rng(6))


def pool() -> CaptionPool:
    """Five captions, embedded as random numbers."""
    embedded = torch.randn(5, MAX_TOKENS, CONTEXT, generator=rng(7))
    return CaptionPool(torch.arange(5)[:, None], lambda tokens: embedded[tokens[:, 0]], 0)


def many(count: int = 6) -> dict[str, Tensor]:
    return {name: value.repeat(count // 2, *[1] * (value.ndim - 1)) for name, value in latents_and_context().items()}


ALL: dict[str, object] = {"taps": "both", "normalize_features": True, "mask_features": 2.0, "guided_output": 3.0}


def all_choices() -> dict[str, object]:
    return ALL | {"captions": Captions(empty(), dropout=0.3, pool=pool(), rate=1.0)}


def test_choices_that_are_off_leave_every_bit(v1_teacher: StableDiffusionPipeline) -> None:
    plain, off = setting(v1_teacher, "tiny"), setting(v1_teacher, "tiny", captions=Captions(empty()))
    losses, others = plain.losses(), off.losses()
    assert losses.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in losses.items())
    losses["loss"].backward()
    others["loss"].backward()
    for first, second in zip(plain.student.parameters(), off.student.parameters(), strict=True):
        assert torch.equal(first.grad, second.grad)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("recipe", ["base", "tiny"])
def test_every_self_attention_teaches_what_comes_before_it(
    v1_teacher: StableDiffusionPipeline, recipe: str, checkpointing: bool
) -> None:
    made = setting(v1_teacher, recipe, checkpointing=checkpointing, taps="self_attention")
    with torch.no_grad():  # up to its first self-attention, a fresh student is its teacher
        made.student.conv_in.weight *= 1.5
    losses = made.losses()
    paths = [name.removeprefix("tap/") for name in losses if name.startswith("tap/")]
    assert len(paths) == {"base": 10, "tiny": 9}[recipe]
    for path in paths:
        made.student.zero_grad(set_to_none=True)
        losses[f"tap/{path}"].backward(retain_graph=True)
        gradients = [parameter.grad for parameter in made.student.get_submodule(path).parameters()]
        assert all(gradient is not None and gradient.any() for gradient in gradients), path
        assert made.student.conv_in.weight.grad.any(), path
        assert made.student.conv_out.weight.grad is None, path


def test_gradient_checkpointing_changes_no_gradient_of_any_choice(v1_teacher: StableDiffusionPipeline) -> None:
    made = [setting(v1_teacher, "small", checkpointing=on, **all_choices()) for on in (False, True)]
    for one in made:
        one.losses()["loss"].backward()
    saved = dict(made[1].student.named_parameters())
    for name, parameter in made[0].student.named_parameters():
        assert torch.allclose(parameter.grad, saved[name].grad, rtol=1e-4, atol=1e-6), name


def test_self_attentions_are_matched_by_the_formula(v1_teacher: StableDiffusionPipeline) -> None:
    made, batch = setting(v1_teacher, "tiny", taps="self_attention"), latents_and_context()
    losses, noisy = made.losses(batch=batch), made.noisy(batch)
    teachers, students = ([getattr(tap, side) for tap in made.objective.taps] for side in ("teacher", "student"))
    _, *wanted = outputs(made.teacher, teachers, noisy, batch["context"])
    _, *learnt = outputs(made.student, students, noisy, batch["context"])
    for path, first, second in zip(students, learnt, wanted, strict=True):
        assert losses[f"tap/{path}"].item() == pytest.approx(mean_squared_error(first, second), rel=1e-5)


@pytest.mark.parametrize(("recipe", "count"), [("base", 22), ("tiny", 18)])
def test_every_layer_that_stays_is_matched(v1_teacher: StableDiffusionPipeline, recipe: str, count: int) -> None:
    """base: 4 + 8 ResNet blocks, 3 + 6 attentions, and the middle; a fresh student's first layer is its teacher's."""
    losses = setting(v1_teacher, recipe, taps="layers").losses()
    taps = {name: loss.item() for name, loss in losses.items() if name.startswith("tap/")}
    assert len(taps) == count
    assert taps["tap/down_blocks.0.resnets.0"] == 0
    assert losses["feature_kd"].item() == pytest.approx(sum(taps.values()), rel=1e-5)


def test_normalized_taps_do_not_feel_the_scale_of_the_features(v1_teacher: StableDiffusionPipeline) -> None:
    """Convolutions twice as large, in both, double what the stages give that end in them."""
    plain, scaled = (setting(v1_teacher, "small", normalize_features=True) for _ in range(2))
    with torch.no_grad():
        for network in (scaled.teacher, scaled.student):
            upsampler = network.up_blocks[0].upsamplers[0].conv
            upsampler.weight *= 2
            upsampler.bias *= 2
    first, second = (made.losses()["tap/up_blocks.0"].item() for made in (plain, scaled))
    assert first == pytest.approx(second, rel=1e-4)


def test_guided_outputs_are_compared_by_the_formula(v1_teacher: StableDiffusionPipeline) -> None:
    weights = LossWeights(0.5, 2.0, 3.0)
    made = setting(v1_teacher, "tiny", weights, guided_output=3.0, captions=Captions(empty()))
    batch = latents_and_context()
    losses, noisy = made.losses(batch=batch), made.noisy(batch)

    def answer(unet: UNet2DConditionModel) -> Tensor:
        with_caption, without = (outputs(unet, [], noisy, c)[0] for c in (batch["context"], empty().expand(2, -1, -1)))
        return without + 3.0 * (with_caption - without)

    wanted = mean_squared_error(answer(made.student), answer(made.teacher))
    assert losses["guided_kd"].item() == pytest.approx(wanted, rel=1e-4)
    plain = setting(v1_teacher, "tiny", weights).losses(batch=batch)
    for name in plain.keys() - {"loss"}:
        assert losses[name].item() == pytest.approx(plain[name].item(), rel=1e-4), name
    assert losses["loss"].item() == pytest.approx(plain["loss"].item() + 2.0 * wanted, rel=1e-4)


def test_guidance_needs_the_empty_prompt(v1_teacher: StableDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="guided_output needs captions"):
        setting(v1_teacher, "tiny", guided_output=3.0)


def contexts_seen(made: Setting) -> dict[str, Tensor]:
    """The embedded captions that either U-Net is given in a step."""
    seen: dict[str, Tensor] = {}
    for name, unet in (("teacher", made.teacher), ("student", made.student)):
        unet.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[2]}))
    made.losses(batch=many(12))
    return seen


def test_teacher_and_student_see_the_same_captions(v1_teacher: StableDiffusionPipeline) -> None:
    captions = Captions(empty(), dropout=0.3, pool=pool(), rate=0.5)
    seen = contexts_seen(setting(v1_teacher, "tiny", captions=captions))
    assert torch.equal(seen["teacher"], seen["student"])
    assert not torch.equal(seen["teacher"], many(12)["context"])
    dropped = (seen["teacher"] == empty()).flatten(1).all(dim=1)
    assert 0 < int(dropped.sum()) < 12


def test_the_task_leaves_out_pictures_whose_caption_is_replaced(v1_teacher: StableDiffusionPipeline) -> None:
    made = setting(v1_teacher, "tiny", captions=Captions(empty(), pool=pool(), rate=0.0))
    losses = made.losses()
    assert losses["task"] == 0
    assert losses["output_kd"] > 0
    losses["task"].backward()
    assert not any(gradient(parameter).any() for parameter in made.student.parameters())


def test_the_task_keeps_pictures_whose_caption_is_dropped(v1_teacher: StableDiffusionPipeline) -> None:
    batch = latents_and_context()
    dropped = setting(v1_teacher, "tiny", captions=Captions(empty(), dropout=1.0)).losses(batch=batch)
    batch["context"] = empty().expand(2, -1, -1)
    assert dropped["task"].item() == pytest.approx(setting(v1_teacher, "tiny").losses(batch=batch)["task"].item())


def test_the_feature_loss_has_the_weight_that_remains(v1_teacher: StableDiffusionPipeline) -> None:
    left = iter((1.0, 0.25, 0.0))
    made = setting(v1_teacher, "tiny", LossWeights(1, 1, 4), remaining=lambda: next(left))
    for share in (1.0, 0.25, 0.0):
        losses = {name: value.item() for name, value in made.losses().items()}
        expected = losses["task"] + losses["output_kd"] + 4 * share * losses["feature_kd"]
        assert losses["loss"] == pytest.approx(expected, rel=1e-6)


def test_how_draws_are_split_into_batches_does_not_matter_to_any_choice(v1_teacher: StableDiffusionPipeline) -> None:
    made, batch = setting(v1_teacher, "tiny", **all_choices()), many(6)
    whole = made.objective(batch, Draws(0, "test", 10))
    parts = [
        made.objective({name: value[i : i + 2] for name, value in batch.items()}, Draws(0, "test", 10 + i))
        for i in (0, 2, 4)
    ]
    assert len(whole) == 5 + 6 + 9
    for name, value in whole.items():
        assert value.item() == pytest.approx(sum(part[name].item() for part in parts) / 3, rel=1e-4), name


# The teacher


@every_recipe
def test_the_teacher_is_frozen(teacher: StableDiffusionPipeline, recipe: str) -> None:
    made = setting(teacher, recipe)
    before = copy.deepcopy(made.teacher.state_dict())
    made.losses()["loss"].backward()
    for network in (made.teacher, made.conditions.vae, made.conditions.text_encoder):
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(before[key], tensor) for key, tensor in made.teacher.state_dict().items())


def test_the_student_stays_in_training_mode(v1_teacher: StableDiffusionPipeline) -> None:
    made = setting(v1_teacher, "base")
    made.losses()
    assert made.student.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_teacher_may_have_half_precision(v1_teacher: StableDiffusionPipeline, dtype: torch.dtype) -> None:
    exact, rough = setting(v1_teacher, "base"), setting(v1_teacher, "base", teacher_dtype=dtype)
    losses = rough.losses()
    assert all(value.dtype == torch.float32 for value in losses.values())
    for name, value in exact.losses().items():
        assert losses[name].item() == pytest.approx(value.item(), rel=0.1, abs=1e-2), name


def test_autocast_keeps_the_losses_in_float32(v1_teacher: StableDiffusionPipeline) -> None:
    made = setting(v1_teacher, "base", teacher_dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        losses = made.losses()
    losses["loss"].backward()
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    assert {parameter.grad.dtype for parameter in made.student.parameters()} == {torch.float32}
