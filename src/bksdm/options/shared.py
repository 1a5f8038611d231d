"""What the options of several verbs have in common; each part is said once."""

from dataclasses import dataclass
from inspect import signature
from typing import Literal, TypeVar

from bksdm.runtime.spared import Spared

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Stored = Literal["auto", "fp32", "bf16", "fp16", "fp8"]
Optimizer = Literal["adamw", "muon"]
Kind = TypeVar("Kind")


def own_first(kind: type[Kind]) -> type[Kind]:
    """A dataclass whose fields stand in the order of its arguments: its own before those that it shares."""
    fields = vars(kind)["__dataclass_fields__"]
    fields.update({name: fields.pop(name) for name in signature(kind).parameters})
    return kind


@dataclass(frozen=True, kw_only=True)
class Printing:
    """What a verb that prints a result takes.

    Attributes:
        json: Print one JSON object and nothing else.
    """

    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Computing:
    """What a verb that computes takes.

    Attributes:
        device: cpu, cuda, mps; auto takes the best there is.
    """

    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class Drawing(Computing):
    """What a verb that draws takes.

    Attributes:
        steps: Denoising steps; each model's own by default, else its family's usual: 25 for Stable Diffusion.
        guidance: Guidance scale, 1 for none (of Z-Image 0); each model's own by default, else its family's usual: 7.5
            for Stable Diffusion.
    """

    steps: int | None = None
    guidance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sparing(Drawing):
    """What a verb that draws with less work takes.

    Attributes:
        guidance_interval: Two noise levels, such as 0.3 5, between which guidance is given; at others the U-Net is
            called once in the place of twice.
        reuse: Compute the inside of the U-Net in every so many steps, such as 3, and in the others its outermost stage
            alone, on what the inside gave last.
        pool_keys: In the self-attentions of the U-Net's outermost stage, where tokens are most, take keys and values
            from means over squares of so many tokens a side, such as 2.
    """

    guidance_interval: list[float] | None = None
    reuse: int | None = None
    pool_keys: int | None = None

    def spared(self) -> Spared:
        """As one value; `InputError` as `Spared.asked` has it."""
        return Spared.asked(self.guidance_interval, self.reuse, self.pool_keys)


@dataclass(frozen=True, kw_only=True)
class Seeded(Drawing, Printing):
    """What a verb that draws many takes.

    Attributes:
        seed: Seed of the first picture; picture n has seed + n.
        batch_size: Pictures at a time.
    """

    seed: int = 0
    batch_size: int = 4


@dataclass(frozen=True, kw_only=True)
class Training(Computing, Printing):
    """What a verb that trains takes.

    Attributes:
        batch_size: Pictures in a micro-batch.
        warmup: Steps of linear rise of the learning rate.
        cosine: Let the learning rate fall to zero along a half cosine.
        weight_decay: Decoupled weight decay.
        max_grad_norm: Largest 2-norm of the gradient; 0 for none.
        resolution: Side of the pictures in pixels; the model's own by default.
        flip: Mirror every other picture, by chance.
        precision: Autocast type of what learns; auto takes bf16 where the device has it in hardware.
        seed: Root of all random numbers.
        log_every: Steps between records in metrics.jsonl.
        checkpoint_every: Steps between checkpoints.
        keep_checkpoints: How many checkpoints stay.
    """

    batch_size: int = 64
    warmup: int = 0
    cosine: bool = False
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    resolution: int | None = None
    flip: bool = True
    precision: Precision = "auto"
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 500
    keep_checkpoints: int = 2


@dataclass(frozen=True, kw_only=True)
class StudentTraining(Training):
    """What a verb that trains a student by its teacher takes.

    Attributes:
        accumulation: Micro-batches a step.
        optimizer: What steps the weights: adamw; or muon, which takes matrices alone, with adamw for all else.
        cache_gb: Latents and text embeddings are computed once and kept in memory if they fit in this many GiB.
        gradient_checkpointing: Save memory by computing activations twice.
        shard_teacher: Spread the teacher's weights over the processes (FSDP), where it does not fit on one device.
        offload_teacher: Keep the teacher's weights in this machine's memory; each layer visits the device to compute.
        teacher_precision: Type of the teacher's weights; auto takes that of precision. fp8 keeps those of linear layers
            and convolutions in 8 bits and widens one layer at a time.
        lora_rank: Let matrices of this rank beside linear layers and convolutions, and the norms, learn alone, for a
            student that does not fit as a whole; in the end they are merged into it. By default all weights learn.
        student_precision: Type of the weights that do not learn; auto takes that of precision. fp8 keeps those of
            linear layers in 8 bits.
        workers: Processes that read ahead; by default none for latents, and what there is to spare for pictures.
        sample_every: Steps between sample grids; 0 for none.
        sample_prompts: File with one prompt a line for the sample grids; captions of the data by default.
    """

    accumulation: int = 1
    optimizer: Optimizer = "adamw"
    cache_gb: float = 4.0
    gradient_checkpointing: bool = False
    shard_teacher: bool = False
    offload_teacher: bool = False
    teacher_precision: Stored = "auto"
    lora_rank: int | None = None
    student_precision: Stored = "auto"
    workers: int | None = None
    sample_every: int = 500
    sample_prompts: str | None = None
