"""The options of the verbs: one flat dataclass each, which the command line or a caller fills.

Only a verb's own function reads them; what it calls takes plain arguments.
"""

from dataclasses import dataclass, field
from typing import Literal

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Taps = Literal["stages", "self_attention", "both", "layers"]
Runtime = Literal["auto", "torch", "openvino", "onnx"]
ExportFormat = Literal["onnx", "openvino", "coreml", "gguf", "executorch", "ldm", "taesd", "tensorrt", "diffusers"]
UnitScore = Literal["output", "frechet", "clip", "latents"]


@dataclass(frozen=True)
class DescribeOptions:
    """Show which blocks a recipe keeps and removes, parameters and multiply-accumulates.

    Attributes:
        model: Folder, .safetensors file, Hub id, or 'emoji'; a folder may hold only unet/config.json.
        recipe: base, small, tiny; for SDXL base, small, ssd-1b, vega, koala-1b, koala-700m, comfy; or a YAML file;
            without one, the model as it is.
        json: Print one JSON object and nothing else.
    """

    model: str
    recipe: str | None = None
    json: bool = False


@dataclass(frozen=True)
class PruneOptions:
    """Make a student that inherits the teacher's weights.

    Attributes:
        teacher: Folder, .safetensors file, Hub id, or 'emoji'.
        recipe: base, small, tiny, or a YAML file.
        out: Folder for the student, in diffusers format.
        precision: Number format of the weights; keep leaves each network the one that it has in the teacher.
        json: Print one JSON object and nothing else.
    """

    teacher: str
    recipe: str
    out: str
    precision: Literal["keep", "fp32", "bf16", "fp16"] = "keep"
    json: bool = False


@dataclass(frozen=True)
class PrepareOptions:
    """Compute the latents of a data set once, for retraining that is free of the VAE.

    Attributes:
        data: Folder of pictures with metadata.csv or metadata.jsonl (file_name,text) or with a .txt beside each,
            WebDataset .tar or folder of such, .parquet or folder of such, data set saved by Hugging Face's datasets,
            its Hub id, or 'emoji'.
        teacher: Folder, .safetensors file, Hub id, or 'emoji'; its VAE makes the latents.
        out: Folder for the latents; the same command goes on where it stopped.
        resolution: Side of the pictures in pixels; the teacher's own by default.
        flip: Encode mirrored copies too, for a retraining that flips.
        text_embeddings: Keep the embedded captions as well; without them, retraining runs the text encoder.
        storage: Number format on the disk; fp16 takes half the room, and rounds by about the posterior's deviation.
        precision: Type in which the VAE and the text encoder compute; fp32 is what retraining from pictures does.
        batch_size: Pictures at a time.
        shard_size: Pictures a file; what a kill can lose.
        image_column: Column of the pictures, image or file_name by default; in tars, what follows the name of a
            sample, such as edited.jpg.
        text_column: Column of the captions, text, caption or prompt by default; in tars and beside pictures, a
            suffix, txt by default, or an entry of the json.
        split: Part of a data set, by default train or the only one.
        max_broken: Largest share of pictures that may be unreadable; they are skipped and listed in skipped.jsonl.
        workers: Processes that read pictures ahead.
        device: cpu, cuda, mps; auto takes the best there is.
        json: Print one JSON object and nothing else.
    """

    data: str
    teacher: str
    out: str
    resolution: int | None = None
    flip: bool = True
    text_embeddings: bool = False
    storage: Literal["fp32", "fp16"] = "fp32"
    precision: Precision = "fp32"
    batch_size: int = 16
    shard_size: int = 512
    image_column: str | None = None
    text_column: str | None = None
    split: str | None = None
    max_broken: float = 0.1
    workers: int = 2
    device: str = "auto"
    json: bool = False


@dataclass(frozen=True)
class DistillOptions:
    """Retrain a student by its teacher: task, output and feature losses.

    Attributes:
        teacher: Folder, .safetensors file, Hub id, or 'emoji'.
        student: Folder that `bksdm prune` wrote, or a student of others: folder, .safetensors file or Hub id.
        data: Folder that `bksdm prepare` wrote, or pictures as it takes them.
        out: Folder of the run; the student ends in OUT/student. The same command resumes it.
        steps: Optimizer steps.
        batch_size: Pictures in a micro-batch.
        accumulation: Micro-batches a step.
        lr: Learning rate.
        warmup: Steps of linear rise of the learning rate.
        cosine: Let the learning rate fall to zero along a half cosine.
        task_weight: Weight of the error to the noise.
        output_weight: Weight of the error to the teacher's output.
        feature_weight: Weight of the summed error to the teacher's features.
        feature_decay: Let feature_weight fall to zero in a straight line over the run.
        taps: Features to match: outputs of the stages, of the self-attentions that stay, of both, or of layers, that
            is every ResNet block and attention that stays, and the middle block.
        normalize_features: Divide the error of a feature by the mean square of the teacher's, so that no tap dominates.
        mask_features: Leave out of a feature what is more than this many standard deviations, such as 2, off its mean.
        guided_output: Compare the outputs under this guidance scale too, such as 7.5; twice the work of the U-Nets.
        caption_dropout: Share of the captions that become the empty prompt.
        random_conditioning: Rate k, such as 5; at timestep t of T a caption becomes a random one of the pool with
            probability exp(-k (1 - t / T)), and its picture is left out of the task loss.
        caption_pool: File with one caption a line for random_conditioning; captions of the data by default.
        weight_decay: AdamW's decoupled weight decay.
        max_grad_norm: Largest 2-norm of the gradient; 0 for none.
        ema_decay: Decay of the averaged weights, which become the student; 0 for none.
        resolution: Side of the pictures in pixels; the teacher's own by default.
        flip: Mirror every other picture, by chance.
        cache_gb: Latents and text embeddings are computed once and kept in memory if they fit in this many GiB.
        gradient_checkpointing: Save memory by computing activations twice.
        compile_teacher: Compile the teacher first, which takes minutes, and check it against itself.
        shard_teacher: Spread the teacher's weights over the processes (FSDP), where it does not fit on one device.
        precision: Autocast type of the student; auto takes bf16 where the device has it in hardware.
        teacher_precision: Type of the teacher's weights; auto takes that of precision.
        device: cpu, cuda, mps; auto takes the best there is.
        seed: Root of all random numbers.
        workers: Processes that read ahead; by default none for latents, and what there is to spare for pictures.
        log_every: Steps between records in metrics.jsonl.
        sample_every: Steps between sample grids; 0 for none.
        sample_prompts: File with one prompt a line for the sample grids; captions of the data by default.
        sample_guidance: Guidance scale of the sample grids; the teacher's own by default, else 7.5.
        checkpoint_every: Steps between checkpoints.
        keep_checkpoints: How many checkpoints stay.
        plan: Start nothing; foresee memory, work, time and passes over the data.
        peak_tflops: Peak of the device in TFLOP/s, for a plan that measures nothing.
        json: Print one JSON object and nothing else.
    """

    teacher: str
    student: str
    data: str
    out: str
    steps: int = 50_000
    batch_size: int = 64
    accumulation: int = 4
    lr: float = 5e-5
    warmup: int = 0
    cosine: bool = False
    task_weight: float = 1.0
    output_weight: float = 1.0
    feature_weight: float = 1.0
    feature_decay: bool = False
    taps: Taps = "stages"
    normalize_features: bool = False
    mask_features: float | None = None
    guided_output: float | None = None
    caption_dropout: float = 0.0
    random_conditioning: float | None = None
    caption_pool: str | None = None
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999
    resolution: int | None = None
    flip: bool = True
    cache_gb: float = 4.0
    gradient_checkpointing: bool = False
    compile_teacher: bool = False
    shard_teacher: bool = False
    precision: Precision = "auto"
    teacher_precision: Precision = "auto"
    device: str = "auto"
    seed: int = 0
    workers: int | None = None
    log_every: int = 10
    sample_every: int = 500
    sample_prompts: str | None = None
    sample_guidance: float | None = None
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    plan: bool = False
    peak_tflops: float | None = None
    json: bool = False


@dataclass(frozen=True)
class LcmOptions:
    """Teach a retrained student to draw in few steps: latent-consistency distillation.

    Attributes:
        teacher: Folder, .safetensors file, Hub id, or 'emoji'.
        student: Folder that `bksdm prune` or `bksdm distill` wrote, or a student of others.
        data: Folder that `bksdm prepare` wrote, or pictures as it takes them.
        out: Folder of the run; the student ends in OUT/student. The same command resumes it.
        steps: Optimizer steps.
        solver_steps: Timesteps of the teacher's solver (DDIM), of which the student's are chosen later.
        guidance: Guidance scale of the teacher, which the student learns and then draws without; 1 for none. The
            teacher's own by default, else 7.5.
        loss: Distance to the target, a pseudo-Huber or the mean square.
        batch_size: Pictures in a micro-batch.
        accumulation: Micro-batches a step.
        lr: Learning rate.
        warmup: Steps of linear rise of the learning rate.
        cosine: Let the learning rate fall to zero along a half cosine.
        weight_decay: AdamW's decoupled weight decay.
        max_grad_norm: Largest 2-norm of the gradient; 0 for none.
        ema_decay: Decay of the averaged weights, which give the target and become the student; 0 for none.
        resolution: Side of the pictures in pixels; the teacher's own by default.
        flip: Mirror every other picture, by chance.
        cache_gb: Latents and text embeddings are computed once and kept in memory if they fit in this many GiB.
        gradient_checkpointing: Save memory by computing activations twice.
        shard_teacher: Spread the teacher's weights over the processes (FSDP), where it does not fit on one device.
        precision: Autocast type of the student; auto takes bf16 where the device has it in hardware.
        teacher_precision: Type of the teacher's weights; auto takes that of precision.
        device: cpu, cuda, mps; auto takes the best there is.
        seed: Root of all random numbers.
        workers: Processes that read ahead; by default none for latents, and what there is to spare for pictures.
        log_every: Steps between records in metrics.jsonl.
        sample_every: Steps between sample grids; 0 for none.
        sample_prompts: File with one prompt a line for the sample grids; captions of the data by default.
        sample_steps: Denoising steps of the student in the sample grids, and its own from then on.
        checkpoint_every: Steps between checkpoints.
        keep_checkpoints: How many checkpoints stay.
        json: Print one JSON object and nothing else.
    """

    teacher: str
    student: str
    data: str
    out: str
    steps: int = 4000
    solver_steps: int = 50
    guidance: float | None = None
    loss: Literal["huber", "l2"] = "huber"
    batch_size: int = 64
    accumulation: int = 1
    lr: float = 1e-5
    warmup: int = 0
    cosine: bool = False
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    ema_decay: float = 0.95
    resolution: int | None = None
    flip: bool = True
    cache_gb: float = 4.0
    gradient_checkpointing: bool = False
    shard_teacher: bool = False
    precision: Precision = "auto"
    teacher_precision: Precision = "auto"
    device: str = "auto"
    seed: int = 0
    workers: int | None = None
    log_every: int = 10
    sample_every: int = 500
    sample_prompts: str | None = None
    sample_steps: int = 4
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    json: bool = False


StudentOptions = DistillOptions | LcmOptions


@dataclass(frozen=True)
class DecoderOptions:
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
        batch_size: Pictures a step.
        lr: Learning rate.
        warmup: Steps of linear rise of the learning rate.
        cosine: Let the learning rate fall to zero along a half cosine.
        weight_decay: AdamW's decoupled weight decay.
        max_grad_norm: Largest 2-norm of the gradient; 0 for none.
        ema_decay: Decay of the averaged weights, which become the decoder; 0 for none.
        resolution: Side of the pictures in pixels; the teacher's own by default.
        flip: Mirror every other picture, by chance.
        cache_gb: Latents are computed once and kept in memory if they fit in this many GiB.
        precision: Autocast type of the small network; auto takes bf16 where the device has it in hardware.
        device: cpu, cuda, mps; auto takes the best there is.
        seed: Root of all random numbers.
        workers: Processes that read ahead.
        log_every: Steps between records in metrics.jsonl.
        checkpoint_every: Steps between checkpoints.
        keep_checkpoints: How many checkpoints stay.
        json: Print one JSON object and nothing else.
    """

    teacher: str
    data: str
    out: str
    steps: int = 20_000
    channels: int = 64
    blocks: int = 3
    edges_weight: float = 1.0
    latent_noise: float = 0.0
    batch_size: int = 16
    lr: float = 1e-3
    warmup: int = 100
    cosine: bool = True
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    resolution: int | None = None
    flip: bool = True
    cache_gb: float = 4.0
    precision: Precision = "auto"
    device: str = "auto"
    seed: int = 0
    workers: int = 0
    log_every: int = 10
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    json: bool = False


@dataclass(frozen=True)
class PersonalizeOptions:
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
        warmup: Steps of linear rise of the learning rate.
        cosine: Let the learning rate fall to zero along a half cosine.
        weight_decay: AdamW's decoupled weight decay.
        max_grad_norm: Largest 2-norm of the gradient; 0 for none.
        resolution: Side of the pictures in pixels; the model's own by default.
        class_steps: Denoising steps of the pictures of the kind; the model's own by default, else 25.
        class_guidance: Their guidance scale; the model's own by default, else 7.5.
        precision: Autocast type, and with --lora that of the weights that stay; auto takes bf16 where it is fast.
        gradient_checkpointing: Save memory for some time.
        device: cpu, cuda, mps; auto takes the best there is.
        seed: Root of all random numbers.
        log_every: Steps between records in metrics.jsonl.
        checkpoint_every: Steps between checkpoints.
        keep_checkpoints: How many checkpoints stay.
        json: Print one JSON object and nothing else.
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
    flip: bool = True
    steps: int = 800
    batch_size: int = 1
    accumulation: int = 1
    lr: float | None = None
    warmup: int = 0
    cosine: bool = False
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    resolution: int | None = None
    class_steps: int | None = None
    class_guidance: float | None = None
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    device: str = "auto"
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    json: bool = False


@dataclass(frozen=True)
class AdaptOptions:
    """Carry a LoRA, a textual inversion or a ControlNet of a teacher over to its student.

    Attributes:
        adapter: LoRA or textual inversion (.safetensors file, or folder of a LoRA), or folder of a ControlNet.
        model: Folder of the student, that `bksdm prune` or `bksdm distill` wrote.
        teacher: Folder, .safetensors file, Hub id, or 'emoji', that the student was made from.
        out: Folder for what becomes of it.
        json: Print one JSON object and nothing else.
    """

    adapter: str
    model: str
    teacher: str
    out: str
    json: bool = False


@dataclass(frozen=True)
class FidelityOptions:
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
        steps: Denoising steps; each model's own by default, else 25.
        guidance: Guidance scale, 1 for none; each model's own by default, else 7.5.
        seed: Seed of the first picture; picture n has seed + n.
        batch_size: Pictures at a time.
        resamples: Resamples of the bootstrap over prompts.
        device: cpu, cuda, mps; auto takes the best there is.
        json: Print one JSON object and nothing else.
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
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    batch_size: int = 4
    resamples: int = 1000
    device: str = "auto"
    json: bool = False


@dataclass(frozen=True)
class PushOptions:
    """Publish a model on the Hugging Face Hub: what goes there is written to a folder and checked first.

    Attributes:
        model: Folder that `bksdm prune`, `distill`, `lcm` or `personalize` wrote.
        repo: Name on the Hub, such as you/small-sd.
        out: Folder for what is to be uploaded.
        teacher: Model that it was made from, by its name on the Hub; that of the card by default. Its licence holds on.
        license: Licence, as the Hub names them, such as creativeml-openrail-m; the teacher's by default.
        data: What it learnt from, for the card; the data of the run by default.
        scores: scores.json of `bksdm evaluate`, for the card.
        private: Keep the repository private.
        dry_run: Write and check the folder, and upload nothing.
        json: Print one JSON object and nothing else.
    """

    model: str
    repo: str
    out: str
    teacher: str | None = None
    license: str | None = None
    data: str | None = None
    scores: str | None = None
    private: bool = False
    dry_run: bool = False
    json: bool = False


@dataclass(frozen=True)
class DemoOptions:
    """Open a page to try a model on, beside another one if wished; it is reached from this machine alone.

    Attributes:
        model: Folder, .safetensors file, Hub id, or 'emoji'.
        compare: Model that draws the same beside it, such as the teacher.
        steps: Denoising steps that the page begins with; each model's own by default, else 25.
        guidance: Guidance scale that the page begins with, 1 for none; each model's own by default, else 7.5.
        decoder: Folder or Hub id of an AutoencoderTiny that decodes in the place of each model's own; 'emoji' for its.
        host: Address to listen at; 0.0.0.0 opens the page to the network.
        port: Port to listen at.
        waiting: How many may wait while one draws; others are told to come back.
        precision: Type of the weights.
        device: cpu, cuda, mps; auto takes the best there is.
    """

    model: str = "emoji"
    compare: str | None = None
    steps: int | None = None
    guidance: float | None = None
    decoder: str | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    waiting: int = 8
    precision: Precision = "auto"
    device: str = "auto"


TrainingOptions = StudentOptions | DecoderOptions | PersonalizeOptions


@dataclass(frozen=True)
class GenerateOptions:
    """Make pictures from prompts, one seed a picture.

    Attributes:
        model: Folder, .safetensors file, Hub id, 'emoji', or folder that `bksdm export` wrote for onnx or openvino.
        out: Folder for the PNGs and metadata.jsonl; the same command makes only what is missing.
        prompt: One prompt or several.
        prompts: File with one prompt a line, or .csv, .tsv, .jsonl or .parquet with a column text, caption or prompt.
        steps: Denoising steps; the model's own by default, else 25.
        guidance: Guidance scale, 1 for none; the model's own by default, else 7.5.
        seed: Seed of the first picture; picture n has seed + n.
        images_per_prompt: Pictures of each prompt.
        negative_prompt: What the pictures should not show.
        batch_size: Pictures at a time.
        scheduler: Name of a diffusers scheduler, such as DDIMScheduler; the model's own by default.
        height: Height in pixels; the model's own by default.
        width: Width in pixels; the model's own by default.
        image: Picture to start from (image-to-image); its middle, cut to the shape of the output.
        strength: Share of the denoising that is done anew with --image, in (0, 1].
        strengths: Several strengths in the place of one; grid.png then has a row a picture and a column a strength.
        mask: Picture of the size of --image, white where it is painted anew (in-painting); the rest stays as it is.
        lora: LoRA for this model, a .safetensors file or a folder with one.
        lora_scale: How strongly it counts.
        decoder: Folder or Hub id of an AutoencoderTiny that decodes in the place of the model's own; 'emoji' for its.
        runtime: What computes; auto takes torch, and on a CPU OpenVINO where converting saves more time than it takes.
        precision: Of the weights in torch, of the arithmetic in OpenVINO, where auto is fp32. Some CPUs do bf16 faster.
        device: cpu, cuda, mps; auto takes the best there is.
        json: Print one JSON object and nothing else.
    """

    model: str
    out: str
    prompt: list[str] | None = None
    prompts: str | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    images_per_prompt: int = 1
    negative_prompt: str = ""
    batch_size: int = 4
    scheduler: str | None = None
    height: int | None = None
    width: int | None = None
    image: str | None = None
    strength: float = 0.8
    strengths: list[float] | None = None
    mask: str | None = None
    lora: str | None = None
    lora_scale: float = 1.0
    decoder: str | None = None
    runtime: Runtime = "auto"
    precision: Precision = "auto"
    device: str = "auto"
    json: bool = False


@dataclass(frozen=True)
class EvaluateOptions:
    """Score one or several models' pictures against real ones, with uncertainty.

    Attributes:
        models: Folders, .safetensors files, Hub ids, 'emoji', or folders of finished pictures; NAME=MODEL gives a name.
        out: Folder for report.html, scores.json, scores.csv, features and pictures; the same command goes on.
        reference: Real pictures in any layout of data, their statistics as pytorch-fid's .npz, or 'emoji'.
        prompts: File with one prompt a line, a table as of generate, or MS-COCO's captions_val2014.json; the
            reference's captions by default.
        limit: Use no more than the first so many prompts.
        scores: Scores to give, such as frechet_distance, kernel_distance, inception_score, precision, recall,
            clip_score, retrieval_r1, output_error; by default those that the features and the reference allow, and
            no Fréchet distance of fewer pictures than features.
        features: Network whose features are compared, inception or the encoder; the embedded encoder for its art.
        inception_weights: File of the Inception network's weights; downloaded once and verified by default.
        encoder: CLIP folder or Hub id for the captions; ViT-g/14 by default, and for the embedded art its own.
        preparation: How pictures are made ready, paper (through JPEG to 256 px, as the paper's authors did) or none;
            auto takes paper for Inception features.
        distractors: Captions (as prompts) that fill the pool of the retrieval; for the embedded art, its own.
        teacher: Model whose outputs on the same noisy latents are compared.
        images_per_prompt: Pictures of each prompt; two or more give the band from seed to seed.
        steps: Denoising steps; each model's own by default, else 25.
        guidance: Guidance scale, 1 for none; each model's own by default, else 7.5.
        scheduler: Name of a diffusers scheduler, such as DDIMScheduler; each model's own by default.
        seed: Seed of the first picture; picture n has seed + n.
        batch_size: Pictures at a time, at most 64.
        keep_pictures: Keep all pictures; else only those that the report shows.
        resamples: Resamples of the bootstrap over prompts.
        latency: Timed pictures of every model, for the plot of quality against latency; 0 for none.
        decoder: Folder or Hub id of an AutoencoderTiny that decodes in the place of each model's own; 'emoji' for its.
        precision: Type of the weights.
        device: cpu, cuda, mps; auto takes the best there is.
        json: Print one JSON object and nothing else.
    """

    models: list[str]
    out: str
    reference: str = "emoji"
    prompts: str | None = None
    limit: int | None = None
    scores: list[str] | None = None
    features: str | None = None
    inception_weights: str | None = None
    encoder: str | None = None
    preparation: Literal["auto", "paper", "none"] = "auto"
    distractors: str | None = None
    teacher: str | None = None
    images_per_prompt: int = 1
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None
    seed: int = 0
    batch_size: int = 16
    keep_pictures: bool = True
    resamples: int = 200
    latency: int = 3
    decoder: str | None = None
    precision: Precision = "auto"
    device: str = "auto"
    json: bool = False


@dataclass(frozen=True)
class BenchmarkOptions:
    """Measure latency, memory and cost of models side by side.

    Attributes:
        models: One model or several, each a folder, .safetensors file, Hub id, 'emoji', or a folder that `bksdm export`
            wrote for onnx or openvino; the first is compared with.
        out: Folder for benchmark.json and benchmark.csv; the same command measures again.
        batch_sizes: Pictures at a time, one number or several.
        rounds: Timed rounds; in each, every model does everything once.
        warmup: Rounds before those, which do not count.
        steps: Denoising steps of a whole picture; each model's own by default, else 25.
        guidance: Guidance scale, 1 for none, which halves the work of the U-Net; each model's own by default, else 7.5.
        height: Height in pixels; each model's own by default.
        width: Width in pixels; each model's own by default.
        decoder: Folder or Hub id of an AutoencoderTiny; every model is measured with its own decoder, then with this.
        runtimes: What computes: torch, openvino, onnx; a model is converted once for the others, and kept.
        precision: Type of the weights in torch.
        device: cpu, cuda, mps; auto takes the best there is.
        json: Print one JSON object and nothing else.
    """

    models: list[str]
    out: str | None = None
    batch_sizes: list[int] = field(default_factory=lambda: [1, 4])
    rounds: int = 7
    warmup: int = 1
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    decoder: str | None = None
    runtimes: list[Literal["torch", "openvino", "onnx"]] = field(default_factory=lambda: ["torch"])
    precision: Precision = "auto"
    device: str = "auto"
    json: bool = False


@dataclass(frozen=True)
class SensitivityOptions:
    """Measure what each block of the U-Net is worth, and find the recipe that loses least within a budget.

    Attributes:
        teacher: Folder, .safetensors file, Hub id, or 'emoji'.
        data: Captioned pictures, as prepare takes them, for noisy latents, prompts and the real side of the distance.
        out: Folder for the scores, the page and recipe.yaml; the same command goes on where it stopped.
        scores: What is measured, of output, frechet, clip and latents; all by default, and output alone is quick.
        params: Budget of the recipe, as a share of the parameters of the teacher's U-Net.
        gmacs: Budget of the recipe, as a share of the multiply-accumulates of the teacher's U-Net.
        budget_score: Score that the recipe is to lose least of.
        encoder: CLIP folder or Hub id whose features are compared; the embedded one by default.
        pictures: Noisy latents and generated pictures for each block.
        steps: Denoising steps; the teacher's own by default, else 25.
        guidance: Guidance scale, 1 for none; the teacher's own by default, else 7.5.
        scheduler: Name of a diffusers scheduler, such as DPMSolverMultistepScheduler; the teacher's own by default.
        seed: Seed of the first picture, and root of noise and timesteps.
        batch_size: Pictures at a time.
        precision: Type of the weights.
        device: cpu, cuda, mps; auto takes the best there is.
        json: Print one JSON object and nothing else.
    """

    teacher: str
    data: str
    out: str
    scores: list[UnitScore] | None = None
    params: float | None = None
    gmacs: float | None = None
    budget_score: UnitScore = "output"
    encoder: str = "emoji"
    pictures: int = 100
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None
    seed: int = 0
    batch_size: int = 16
    precision: Precision = "auto"
    device: str = "auto"
    json: bool = False


@dataclass(frozen=True)
class ExportOptions:
    """Write a model for another runtime, compared with torch before it is called done.

    Attributes:
        model: Folder, .safetensors file, Hub id, or 'emoji'.
        to: Format; diffusers turns a single file back into a folder, or a folder into one of another precision.
        out: Folder, or file for the formats that are one file (ldm, taesd: .safetensors, gguf: .gguf).
        precision: Of the weights; by default the first that the format has. onnx fp32 fp16 int8; openvino fp32 fp16
            int8 int4 w8a8; coreml fp16 fp32 6bit 4bit; gguf q8_0 q4_0 fp16; executorch fp32; ldm fp32 fp16;
            taesd fp32 fp16; tensorrt fp16 fp32; diffusers keep (each network as it is) fp32 fp16 bf16.
        height: Height in pixels of the pictures that a format of fixed size makes; the model's own by default.
        width: Width in pixels; the model's own by default.
        batch_size: Pictures at a time, for the formats of fixed size.
        attention: How attention is written for Core ML; split_einsum is for the Neural Engine.
        decoder: Folder or Hub id of an AutoencoderTiny that decodes in the place of the model's own, or 'emoji' for
            its; this alone is what taesd writes.
        calibration: File of prompts whose denoising steps w8a8 is fitted to.
        scheduler: Name of a diffusers scheduler, such as DDIMScheduler, in the place of the model's own.
        unpickle: Convert pickled weights to safetensors, reading tensors and running nothing: a folder with .bin --to
            diffusers, a .ckpt file --to ldm. No other command opens them.
        json: Print one JSON object and nothing else.
    """

    model: str
    to: ExportFormat
    out: str
    precision: str | None = None
    height: int | None = None
    width: int | None = None
    batch_size: int = 1
    attention: Literal["original", "split_einsum"] = "original"
    decoder: str | None = None
    calibration: str | None = None
    scheduler: str | None = None
    unpickle: bool = False
    json: bool = False


@dataclass(frozen=True)
class QuickstartOptions:
    """The whole story on the embedded art: describe, prune, distill, generate, evaluate, report.

    Attributes:
        out: Folder for everything; report.html is the result. The same command resumes it.
        teacher: 'emoji', or another model that draws the embedded art: folder, .safetensors file, or Hub id.
        recipe: base, small, tiny, or a YAML file.
        steps: Optimizer steps of the retraining.
        seed: Root of all random numbers.
    """

    out: str = "runs/quickstart"
    teacher: str = "emoji"
    recipe: str = "small"
    steps: int = 100
    seed: int = 0
