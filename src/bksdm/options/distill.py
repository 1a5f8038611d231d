"""What trains a student, or a small decoder, by a teacher."""

from dataclasses import KW_ONLY, dataclass
from typing import Literal

from bksdm.options.shared import StudentTraining, Training, own_first

Taps = Literal["stages", "self_attention", "both", "layers"]


@own_first
@dataclass(frozen=True)
class DistillOptions(StudentTraining):
    """Retrain a student by its teacher: task, output and feature losses.

    Attributes:
        teacher: Folder, .safetensors file, Hub id, 'emoji' or 'emoji-flow'.
        student: Folder that `bksdm prune` wrote, or a student of others: folder, .safetensors file or Hub id.
        data: Folder that `bksdm prepare` wrote, or pictures as it takes them.
        out: Folder of the run; the student ends in OUT/student. The same command resumes it.
        steps: Optimizer steps.
        lr: Learning rate.
        task_weight: Weight of the error to the noise.
        output_weight: Weight of the error to the teacher's output.
        feature_weight: Weight of the summed error to the teacher's features.
        feature_decay: Let feature_weight fall to zero in a straight line over the run.
        taps: Features to match: outputs of the stages, of the self-attentions that stay, of both, or of layers, that is
            every ResNet block and attention that stays, and the middle block.
        normalize_features: Divide the error of a feature by the mean square of the teacher's, so that no tap dominates.
        mask_features: Leave out of a feature what is more than this many standard deviations, such as 2, off its mean.
        feature_directions: Compare the direction of every token or pixel of a feature alone, not its length.
        caption_features: Match what becomes of the caption's tokens too, in transformers.
        teacher_inputs: Give each block of a transformer what the teacher has where it begins, so that it learns its own
            part alone and no error of those before it.
        timesteps: How noise levels of flow matching are drawn before they are shifted: even, or logit_normal, with more
            of them in the middle.
        guided_output: Compare the outputs under this guidance scale too, such as 7.5; twice the work of the U-Nets.
        caption_dropout: Share of the captions that become the empty prompt.
        random_conditioning: Rate k, such as 5; at timestep t of T a caption becomes a random one of the pool with
            probability exp(-k (1 - t / T)), and its picture is left out of the task loss.
        caption_pool: File with one caption a line for random_conditioning; captions of the data by default.
        cutmix: Share of the pictures that show a rectangle of another, and are left out of the task loss.
        ema_decay: Decay of the averaged weights, which become the student; 0 for none.
        compile_teacher: Compile the teacher first, which takes minutes, and check it against itself; by OpenVINO where
            that is installed, on a CPU in float32, and else by torch.
        sample_guidance: Guidance scale of the sample grids; the teacher's own by default, else its family's usual.
        plan: Start nothing; foresee memory, work, time and passes over the data.
        peak_tflops: Peak of the device in TFLOP/s, for a plan that measures nothing.
    """

    teacher: str
    student: str
    data: str
    out: str
    steps: int = 50_000
    lr: float = 5e-5
    task_weight: float = 1.0
    output_weight: float = 1.0
    feature_weight: float = 1.0
    feature_decay: bool = False
    taps: Taps = "stages"
    normalize_features: bool = False
    mask_features: float | None = None
    feature_directions: bool = False
    caption_features: bool = False
    teacher_inputs: bool = False
    timesteps: Literal["even", "logit_normal"] = "even"
    guided_output: float | None = None
    caption_dropout: float = 0.0
    random_conditioning: float | None = None
    caption_pool: str | None = None
    cutmix: float = 0.0
    ema_decay: float = 0.9999
    compile_teacher: bool = False
    sample_guidance: float | None = None
    plan: bool = False
    peak_tflops: float | None = None
    _: KW_ONLY
    accumulation: int = 4


@own_first
@dataclass(frozen=True)
class LcmOptions(StudentTraining):
    """Teach a retrained student to draw in few steps: consistency distillation.

    Attributes:
        teacher: Folder, .safetensors file, Hub id, 'emoji' or 'emoji-flow'.
        student: Folder that `bksdm prune` or `bksdm distill` wrote, or a student of others.
        data: Folder that `bksdm prepare` wrote, or pictures as it takes them.
        out: Folder of the run; the student ends in OUT/student. The same command resumes it.
        steps: Optimizer steps.
        solver_steps: Timesteps of the teacher's solver (DDIM, or Euler's in flow matching).
        guidance: Guidance scale of the teacher, which the student learns and then draws without. The
            teacher's own by default, else its family's usual.
        loss: Distance to the target, a pseudo-Huber or the mean square.
        lr: Learning rate.
        ema_decay: Decay of the averaged weights, which give the target and become the student; 0 for none.
        sample_steps: Denoising steps of the student in the sample grids, and its own from then on. In flow matching it
            is taught for that many: their noise levels are kept in its folder.
    """

    teacher: str
    student: str
    data: str
    out: str
    steps: int = 4000
    solver_steps: int = 50
    guidance: float | None = None
    loss: Literal["huber", "l2"] = "huber"
    lr: float = 1e-5
    ema_decay: float = 0.95
    sample_steps: int = 4


@own_first
@dataclass(frozen=True)
class DecoderOptions(Training):
    """Train a small decoder of latents by the teacher's own, for short schedules, where decoding is most of the work.

    Attributes:
        teacher: Folder, .safetensors file, Hub id, or 'emoji'; its VAE teaches.
        data: Folder that `bksdm prepare` wrote, or pictures as it takes them; captions do not matter.
        out: Folder of the run; the decoder ends in OUT/decoder. The same command resumes it.
        steps: Optimizer steps.
        channels: Of every layer of the small network.
        blocks: Blocks of three convolutions at each size but the largest, which has one.
        edges_weight: Weight of the error of edges beside that of pixels, which has 1.
        latent_noise: Most noise on the latents, as a standard deviation; latents of few steps are no perfect encodings.
        lr: Learning rate.
        ema_decay: Decay of the averaged weights, which become the decoder; 0 for none.
        cache_gb: Latents are computed once and kept in memory if they fit in this many GiB.
        workers: Processes that read ahead.
    """

    teacher: str
    data: str
    out: str
    steps: int = 20_000
    channels: int = 64
    blocks: int = 3
    edges_weight: float = 1.0
    latent_noise: float = 0.0
    lr: float = 1e-3
    ema_decay: float = 0.999
    cache_gb: float = 4.0
    workers: int = 0
    _: KW_ONLY
    batch_size: int = 16
    warmup: int = 100
    cosine: bool = True
    weight_decay: float = 0.0
