"""What teaches a subject, and measures how well."""

from dataclasses import KW_ONLY, dataclass

from bksdm.options.shared import Seeded, Training, own_first


@own_first
@dataclass(frozen=True)
class PersonalizeOptions(Training):
    """Teach a model a subject from a few pictures: DreamBooth, by all weights or by a LoRA.

    Attributes:
        model: Folder, .safetensors file, Hub id, or 'emoji'; a teacher or a student.
        images: Folder of pictures of the subject, three to five of them as a rule.
        prompt: Caption of all the pictures, with the identifier in it, such as "a photo of sks dog".
        out: Folder of the run; what is learnt ends in OUT/model or OUT/lora. The same command resumes it.
        identifier: Word that will mean the subject; a rare one.
        class_prompt: Caption of pictures of the subject's kind; by default the prompt without the identifier.
        class_images: Pictures of the kind that the model draws beforehand, so as not to forget it; 0 for none.
        prior_weight: Weight of the loss on those.
        lora: Learn low-rank matrices beside the weights, in a file of their own, in place of all weights.
        rank: Rank of those matrices.
        text_encoder: Teach the text encoder too.
        views: Versions of each picture, cut a little differently; 1 for the pictures alone.
        flip: Mirror every other version.
        steps: Optimizer steps.
        batch_size: Pictures of the subject in a micro-batch, with as many of its kind.
        accumulation: Micro-batches a step.
        lr: Learning rate; by default 1e-6, and 1e-4 with --lora.
        class_steps: Denoising steps of the pictures of the kind; the model's own by default, else 25.
        class_guidance: Their guidance scale; the model's own by default, else 7.5.
        precision: Autocast type, and with --lora that of the weights that stay; auto takes bf16 where it is fast.
        gradient_checkpointing: Save memory for some time.
    """

    model: str
    images: str
    prompt: str
    out: str
    identifier: str = "sks"
    class_prompt: str | None = None
    class_images: int = 200
    prior_weight: float = 1.0
    lora: bool = False
    rank: int = 8
    text_encoder: bool = False
    views: int = 8
    steps: int = 800
    accumulation: int = 1
    lr: float | None = None
    class_steps: int | None = None
    class_guidance: float | None = None
    gradient_checkpointing: bool = False
    _: KW_ONLY
    batch_size: int = 1
    weight_decay: float = 0.01
    checkpoint_every: int = 100


@own_first
@dataclass(frozen=True)
class FidelityOptions(Seeded):
    """Measure how well personalised models draw their subject, and what a prompt asks of it.

    Attributes:
        models: Runs of `bksdm personalize`, of one subject, or models to compare; NAME=MODEL gives a name.
        out: Folder for fidelity.json, grid.png and the pictures; the same command makes only what is missing.
        prompts: File with one prompt a line, in which {subject} stands for the subject, as in DreamBooth's lists.
        images: Folder of pictures of the subject; by default that of the first run.
        subject: Words for the subject; by default those of the first run's prompt from the identifier to a comma.
        kind: Words for its kind, which prompts are held against; by default the subject's without the identifier.
        encoder: CLIP folder or Hub id for the fidelity to subject and prompt, or 'emoji'.
        dino: Folder or Hub id of a DINO network for the fidelity to the subject, such as facebook/dino-vits16.
        images_per_prompt: Pictures of each prompt.
        resamples: Resamples of the bootstrap over prompts.
    """

    models: list[str]
    out: str
    prompts: str
    images: str | None = None
    subject: str | None = None
    kind: str | None = None
    encoder: str = "openai/clip-vit-base-patch32"
    dino: str | None = None
    images_per_prompt: int = 4
    resamples: int = 1000
