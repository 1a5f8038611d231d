"""`bksdm personalize`: from a model and a few pictures of a subject to a model, or a LoRA, that draws it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from bksdm.common.devices import channels_last_is_faster, choose_device, choose_precision, plain_attention_is_faster
from bksdm.common.errors import InputError
from bksdm.common.progress import bar, say
from bksdm.common.prompts import say_cut
from bksdm.common.runs import check_free, files_digest, open_run, replace_folder, write_text
from bksdm.data.names import list_pictures
from bksdm.data.pictures import open_picture, sides, to_pixels, was_flagged
from bksdm.distill.conditions import Conditions, framed, repeated
from bksdm.distill.follow import check_not_negative, check_steps, check_training, end_of, ended, follow, losses_of
from bksdm.distill.state import Checkpoints, TrainState
from bksdm.families import family_of_pipeline
from bksdm.families.family import Told
from bksdm.generate.run import generate
from bksdm.models.adapters.training import add_lora, check_peft, save_lora
from bksdm.models.card import drawing_call, personal_card
from bksdm.models.configs import check_ready
from bksdm.models.drawing import drawing, drawing_defaults
from bksdm.models.folders import fingerprint
from bksdm.models.pipelines import (
    Origin,
    check_text_to_image,
    cutting,
    denoiser,
    image_size,
    load_pipeline,
    pixels_a_side,
    save_pipeline,
    text_encoders,
    tokenizing,
)
from bksdm.options.generate import GenerateOptions
from bksdm.options.personalize import PersonalizeOptions
from bksdm.personalize.objective import Personalization
from bksdm.personalize.subject import SubjectSamples, encoded, read_subject, view
from bksdm.pruning.inherit import save_student
from bksdm.pruning.told import recipe_of
from bksdm.runtime.defaults import as_files

STEPS_FILE = "training.json"
_MAY_CHANGE = (
    "batch_size",
    "accumulation",
    "device",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "gradient_checkpointing",
    "json",
)
_LR, _LORA_LR = 1e-6, 1e-4
_ON_CARD = (
    "prompt",
    "class_prompt",
    "class_images",
    "prior_weight",
    "rank",
    "text_encoder",
    "views",
    "flip",
    "steps",
    "batch_size",
    "accumulation",
    "lr",
    "seed",
)


@dataclass(frozen=True)
class Learner:
    """A pipeline and what of it learns.

    Attributes:
        pipeline: On its device.
        networks: The networks that learn, or hold what learns, by their names.
        model: What is trained and kept in checkpoints.
    """

    pipeline: DiffusionPipeline
    networks: dict[str, nn.Module]
    model: nn.Module


def personalize(options: PersonalizeOptions) -> Path:
    """Teach a model a subject; the same options again go on where the run stopped.

    Returns:
        The folder of what was learnt: `OUT/model`, a diffusers pipeline, or, with `lora`, `OUT/lora`.

    Raises:
        InputError: An option, the model or the pictures are unfit; see the message.
        Interrupted: The run was asked to stop and can go on.
    """
    check_ready("personalize", options.model)
    options, lr = _resolved(options)
    run, device = Path(options.out), choose_device(options.device)
    precision = choose_precision(options.precision, device, training=True)
    subject = read_subject(options.images)
    settings = dataclasses.asdict(options) | {
        "model_content": fingerprint(options.model),
        "images_content": files_digest(list_pictures(Path(options.images))),
    }
    may_change = _MAY_CHANGE if options.cosine else (*_MAY_CHANGE, "steps")
    check_free(run, "personalize", settings, may_change)
    checkpoints = Checkpoints(run / "checkpoints", options.keep_checkpoints)
    check_steps(options, checkpoints)
    pipeline = load_pipeline(options.model)
    check_text_to_image(pipeline, options.model)
    family = family_of_pipeline(pipeline)
    schedule = family.noise_schedule(pipeline.scheduler)  # says where it cannot be learnt by
    open_run(run, "personalize", settings, may_change, {"device": str(device), "precision": str(precision)})
    if len(subject) == 1:
        say("one picture shows the subject in one place only, and that will be learnt with it; give three to five")

    kind = _draw_kind(options)  # before anything is learnt
    samples = _samples(options, pipeline.to(device), subject, kind)
    learner = _learner(options, pipeline, device, precision)
    state = TrainState(
        learner.model,
        torch.optim.AdamW(learner.model.parameters(), lr=lr, weight_decay=options.weight_decay, fused=True),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
    )
    checkpoints.restore(state)
    if state.step < options.steps:
        objective = Personalization(
            denoiser(pipeline),
            schedule,
            _told(options, learner, device),
            options.prior_weight,
            family,
        )
        follow(
            options,
            state,
            objective,
            samples,
            checkpoints,
            title="personalizing",
            told=lambda values: losses_of(values, ("task", "prior") if kind else ("task",)),
            device=device,
            precision=precision,
        )
    made = run / ("lora" if options.lora else "model")
    if end_of(made / STEPS_FILE) != state.step:
        _save(made, learner, state, options)
    return made


def _resolved(options: PersonalizeOptions) -> tuple[PersonalizeOptions, float]:
    """The options, checked, with what they leave open filled in, and the learning rate of these."""
    check_training(options)
    how = drawing(options.model, options.class_steps, options.class_guidance)
    options = dataclasses.replace(options, class_steps=how.steps, class_guidance=how.guidance)
    for name in ("rank", "views", "class_steps"):
        if getattr(options, name) < 1:
            raise InputError(f"{name} is {getattr(options, name)}; give at least 1")
    for name in ("class_images", "prior_weight", "class_guidance"):
        check_not_negative(options, name)
    if options.identifier not in options.prompt.split():
        raise InputError(
            f"prompt {options.prompt!r} does not have the identifier {options.identifier!r}; put it before the name of "
            f"the subject's kind, as in 'a photo of {options.identifier} dog', or name yours with --identifier"
        )
    if options.lora:
        check_peft()
    kind = " ".join(word for word in options.prompt.split() if word != options.identifier)
    lr = options.lr if options.lr is not None else _LORA_LR if options.lora else _LR
    class_prompt = options.class_prompt if options.class_prompt is not None else kind
    return dataclasses.replace(options, class_prompt=class_prompt, lr=lr), lr


def _draw_kind(options: PersonalizeOptions) -> list[Image.Image]:
    """Pictures of the subject's kind as the model draws it so far; those that are there are not drawn again."""
    if not options.class_images:
        return []
    assert options.class_prompt is not None
    paths = generate(
        GenerateOptions(
            options.model,
            str(Path(options.out) / "class_images"),
            prompt=[options.class_prompt],
            images_per_prompt=options.class_images,
            steps=options.class_steps,
            guidance=options.class_guidance,
            seed=options.seed,
            height=options.resolution,
            width=options.resolution,
            runtime="torch",
            device=options.device,
        )
    )
    flagged = {path for path in paths if was_flagged(path)}
    if len(flagged) == len(paths):
        raise InputError(
            f"the model's safety checker has made every picture of {options.class_prompt!r} black; give another "
            f"--class_prompt, or --class_images 0"
        )
    return [open_picture(path) for path in paths if path not in flagged]


def _samples(
    options: PersonalizeOptions,
    pipeline: DiffusionPipeline,
    subject: dict[str, Image.Image],
    kind: list[Image.Image],
) -> SubjectSamples:
    """The latents of all views and of the pictures of the kind; the VAE is done with after that."""
    size, device = options.resolution or image_size(pipeline), pipeline.vae.device
    names = [f"{name}, view {number}" for name in subject for number in range(options.views)]
    views = [
        view(picture, size, number, options.seed, flip=options.flip)
        for picture in subject.values()
        for number in range(options.views)
    ]
    conditions = Conditions.of(pipeline)
    with bar(len(views) + len(kind), "encoding pictures") as progress:

        def posterior(pixels: Tensor) -> tuple[Tensor, Tensor]:
            found = conditions.posterior(pixels.to(device))
            progress.advance(len(pixels))
            return found

        of_kind = encoded([to_pixels(picture, size) for picture in kind], posterior) if kind else None
        samples = SubjectSamples(names, encoded(views, posterior), of_kind)
    pipeline.vae.to("cpu")
    return samples


def _learner(
    options: PersonalizeOptions, pipeline: DiffusionPipeline, device: torch.device, precision: torch.dtype
) -> Learner:
    """The pipeline with what learns in float32, set up to compute as fast as it can."""
    family = family_of_pipeline(pipeline)
    networks: dict[str, nn.Module] = {family.denoiser: denoiser(pipeline)}
    if options.text_encoder:
        networks |= dict(zip(family.encoders, text_encoders(pipeline), strict=True))
    for network in networks.values():
        network.train()
        network.requires_grad_(not options.lora)
        if options.lora:
            network.to(precision)
        if options.gradient_checkpointing:
            _checkpoint_gradients(network)
    if channels_last_is_faster(device, precision):
        denoiser(pipeline).to(memory_format=torch.channels_last)
    if plain_attention_is_faster(device, precision):
        family_of_pipeline(pipeline).attend(denoiser(pipeline), plainly=True)
    if options.lora:
        return Learner(pipeline, networks, add_lora(networks, family.projections, options.rank, options.seed))
    return Learner(pipeline, networks, nn.ModuleDict(networks))


def _checkpoint_gradients(network: nn.Module) -> None:
    """Compute activations again in the backward pass; diffusers and transformers of every age have a name for it."""
    names = ("enable_gradient_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
    getattr(network, next(name for name in names if hasattr(network, name)))()


def _told(options: PersonalizeOptions, learner: Learner, device: torch.device) -> Callable[[], Told]:
    """What the U-Net is told of subject and kind; computed once where the text encoders do not learn."""
    pipeline, prompts = learner.pipeline, (options.prompt, options.class_prompt or "")
    family, encoders = family_of_pipeline(pipeline), text_encoders(pipeline)
    say_cut(prompts, cutting(pipeline))
    tokenize, size = tokenizing(pipeline), sides(options.resolution or image_size(pipeline))
    tokens = torch.stack([tokenize(text) for text in prompts]).to(device)
    picture = repeated(framed(family, size, device), len(prompts))
    if options.text_encoder:
        return lambda: family.embedded(encoders, tokens) | picture
    with torch.no_grad():
        fixed = family.embedded(encoders, tokens) | picture
    return lambda: fixed


def _save(folder: Path, learner: Learner, state: TrainState, options: PersonalizeOptions) -> None:
    """What was learnt, whole or not at all."""
    shown: dict[str, Any] = {name: getattr(options, name) for name in _ON_CARD if options.lora or name != "rank"}
    own, family = drawing_defaults(options.model), family_of_pipeline(learner.pipeline)
    config, pixels = denoiser(learner.pipeline).config, pixels_a_side(learner.pipeline)
    call = drawing_call(family, config, pixels, own)
    files = {
        "README.md": personal_card(options.model, family, options.prompt, shown, lora=options.lora, call=call),
        STEPS_FILE: ended(state.step),
    }
    if options.lora:
        try:
            with replace_folder(folder) as partial:
                save_lora(learner.networks, partial, family, recipe_of(options.model))
                for name, text in files.items():
                    write_text(partial / name, text)
        except OSError as error:
            raise InputError(f"cannot write {folder}: {error.strerror or error}; choose another --out") from error
        return
    files |= as_files(own)
    pipeline, recipe = learner.pipeline.to("cpu"), recipe_of(options.model)
    for network in learner.networks.values():
        network.eval()
    origin = Origin.of(pipeline, tuple(learner.networks))
    if recipe is None:
        save_pipeline(pipeline, folder, files, origin)
    else:
        save_student(pipeline, recipe, files.pop("README.md"), folder, files, origin)
