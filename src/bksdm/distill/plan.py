"""`bksdm distill --plan`: what a run will take, before anything starts.

Memory and work are found by running the step once on tensors that have shapes and no data, and following what
is alive at every moment; time, by running a few steps on this device with random weights of the right
shapes, on which neither time nor memory depends. Only configs are read.
"""

import contextlib
import dataclasses
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from diffusers import PNDMScheduler, SchedulerMixin
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from bksdm.common.devices import keep_in, peak_inside
from bksdm.common.processes import processes
from bksdm.common.progress import bar
from bksdm.common.randomness import Draws
from bksdm.data.stream import Batch
from bksdm.distill.captions import Captions
from bksdm.distill.data import Fields, Latents, Pictures
from bksdm.distill.loop import optimize
from bksdm.distill.optimizers import moments
from bksdm.distill.pair import Formats, Pair, changes_captions, learner
from bksdm.families import family_of
from bksdm.families.recipe import Config, Pruning
from bksdm.models.configs import context_tokens, load_config, load_denoiser_config, load_scheduler_config
from bksdm.models.pipelines import denoiser, text_encoders
from bksdm.models.single_file import build_scheduler
from bksdm.options.distill import DistillOptions

_MEASURED_STEPS = 3
_UTILISATION = 0.4  # of a device's peak; what retraining reaches on tensor cores
# What a process holds besides tensors: libraries, and work space of kernels.
_OVERHEAD = {"cpu": 0.75 * 2**30, "cuda": 0.3 * 2**30}
_ROOM = 0.95  # share of the memory that a run may fill
_CARDS = (8, 12, 16, 24, 32, 48, 80, 141)  # what GPUs have, in GB


@dataclass(frozen=True)
class Memory:
    """Estimated peak of one process, in bytes.

    Attributes:
        batch_size: Pictures in a micro-batch.
        gradient_checkpointing: Whether activations are computed twice.
        held: Weights of all networks, the average, the optimizer's moments.
        working: Activations and gradients, where they are most.
        overhead: What is not tensors.
    """

    batch_size: int
    gradient_checkpointing: bool
    held: int
    working: int
    overhead: int

    @property
    def total(self) -> int:
        return self.held + self.working + self.overhead


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        device: Its name, and its memory in bytes.
        teacher_params, student_params: Of the U-Nets.
        pictures: In the data.
        steps: Optimizer steps.
        samples_per_step: Of all processes.
        flops_per_step: Floating-point operations of all processes, backward pass included.
        memory: By micro-batch size, without and with gradient checkpointing.
        seconds_per_step: Measured, or from a stated peak; None where neither could be.
        measured_memory: Peak of the measured steps in bytes, for the options as they are.
    """

    device: str
    device_memory: int
    teacher_params: int
    student_params: int
    pictures: int
    steps: int
    samples_per_step: int
    flops_per_step: int
    memory: tuple[Memory, ...]
    chosen: Memory
    seconds_per_step: float | None = None
    measured_memory: int | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The object that `--plan --json` prints."""
        values = dataclasses.asdict(self)
        values["memory"] = [{**dataclasses.asdict(row), "total": row.total} for row in self.memory]
        values["chosen"] |= {"total": self.chosen.total}
        return values | {"passes": self.passes, "seconds": self.seconds, "card_gb": self.card}

    @property
    def card(self) -> int | None:
        """The least GB of a GPU that the run would fit on as it is; None where it fits on none."""
        return next((size for size in _CARDS if self.chosen.total < _ROOM * size * 2**30), None)

    @property
    def passes(self) -> float:
        """How often each picture is seen."""
        return self.steps * self.samples_per_step / self.pictures

    @property
    def seconds(self) -> float | None:
        """Of the whole run."""
        return None if self.seconds_per_step is None else self.seconds_per_step * self.steps

    def text(self) -> str:
        lines = [
            f"teacher  {self.teacher_params / 1e6:8.1f} M parameters",
            f"student  {self.student_params / 1e6:8.1f} M parameters",
            f"a step   {self.samples_per_step} pictures, {self.flops_per_step / 1e12:.4g} TFLOP",
            f"data     {self.pictures:,} pictures, each seen {self.passes:.4g} times in {self.steps:,} steps",
            "",
            f"peak memory of a process, estimated; {self.device} has {_gib(self.device_memory)}",
            f"{'micro-batch':>12} {'as it is':>12} {'with --gradient_checkpointing':>31}",
        ]
        for size in dict.fromkeys(row.batch_size for row in self.memory):
            plain, saving = (row for row in self.memory if row.batch_size == size)
            lines.append(f"{size:>12} {self._shown(plain):>12} {self._shown(saving):>31}")
        fits = f"a card of {self.card} GB holds it" if self.card else f"no card of up to {_CARDS[-1]} GB holds it"
        lines.append(f"as it is asked for, {fits}")
        if self.measured_memory:
            lines.append(f"measured {_gib(self.measured_memory)}, estimated {_gib(self.chosen.total)}")
        lines.append("")
        if self.seconds is not None:
            lines.append(f"time     {self.seconds_per_step:.3g} s a step, {_hours(self.seconds)} in all")
        return "\n".join([*lines, *([self.note] if self.note else [])])

    def _shown(self, row: Memory) -> str:
        return _gib(row.total) + ("" if row.total < _ROOM * self.device_memory else " (!)")


@dataclass(frozen=True)
class _Shapes:
    """All that a run's cost depends on, besides its options."""

    teacher: Config
    pruning: Pruning
    networks: Mapping[str, Config]
    fields: Fields
    scheduler: SchedulerMixin
    length: int

    @classmethod
    def of(cls, options: DistillOptions, pruning: Pruning, data: Pictures | Latents) -> "_Shapes":
        teacher, length = load_denoiser_config(options.teacher), context_tokens(options.teacher)
        networks = {name: load_config(options.teacher, name) for name in ("vae", *family_of(teacher).encoders)}
        fields = data.fields(teacher, networks["vae"], length)
        return cls(teacher, pruning, networks, fields, _scheduler(options.teacher), length)

    def student(self, formats: Formats) -> nn.Module:
        with _default_dtype(formats.computing(formats.student_precision)):
            made: nn.Module = family_of(self.teacher).build(self.pruning.student_config)
        return made

    def pair(self, formats: Formats, student: nn.Module | None = None) -> Pair:
        """Both models with random weights; what is kept in 8 bits is as it is while it computes."""
        family = family_of(self.teacher)
        with _default_dtype(formats.computing(formats.teacher_precision)):
            made = {family.denoiser: family.build(self.teacher)}
        made |= {name: family.build(config, name) for name, config in self.networks.items()}
        besides = dict.fromkeys(family.tokenizers) | {"scheduler": self.scheduler}
        pipeline = family.assembled(made | besides, {}, family.pipeline)
        return Pair(pipeline, student or self.student(formats), self.pruning, formats)

    def kept(self, formats: Formats) -> tuple[int, int]:
        """Bytes of the weights of the teacher's denoiser and of the student's, as they are kept."""
        family, found = family_of(self.teacher), []
        for config, kept, learns in (
            (self.teacher, formats.teacher_precision, False),
            (self.pruning.student_config, formats.student_precision, True),
        ):
            network = family.outline(config)
            keep_in(network, kept, formats.precision, learns=learns)
            found.append(_bytes(network))
        return found[0], found[1]

    @property
    def tokens(self) -> tuple[int, ...]:
        """Shape of the tokens of a caption."""
        return family_of(self.teacher).token_shape(self.length)

    def captions(self, pair: Pair, options: DistillOptions) -> Captions | None:
        """What becomes of the captions, with a pool of one: its size does not matter."""
        tokens = torch.zeros(2, *self.tokens, dtype=torch.long)
        return pair.captions(options, tokens) if changes_captions(options) else None

    def batch(self, size: int, device: torch.device | str = "cpu") -> Batch:
        """Random numbers of the right shapes; tokens are all the same."""
        whole = {"input_ids"}
        return {
            name: torch.zeros(size, *shape, dtype=torch.long, device=device)
            if name in whole
            else torch.rand(size, *shape, device=device)
            for name, shape in self.fields.items()
        }


def plan(options: DistillOptions, pruning: Pruning, data: Pictures | Latents) -> Plan:
    """Foresee a run.

    Arguments:
        options: Its options.
        pruning: What the student's recipe gives for the teacher.
        data: What it learns from.
    """
    formats, group = Formats.choose(options), processes()
    shapes = _Shapes.of(options, pruning, data)
    simulate = _Simulation(shapes, options, formats)
    wanted = (options.batch_size, options.gradient_checkpointing)
    sizes = sorted({max(1, options.batch_size // 4), max(1, options.batch_size // 2), options.batch_size, 1})
    cases = [(size, saving) for size in sizes for saving in (False, True)]
    found: dict[tuple[int, bool], tuple[Memory, int]] = {}
    with bar(len(cases), "step without data") as progress:
        for case in cases:
            found[case] = simulate(*case)
            progress.advance()
    chosen, flops = found[wanted]
    name, device_memory = _device(formats.device)
    foreseen = Plan(
        device=name,
        device_memory=device_memory,
        teacher_params=simulate.params["teacher"],
        student_params=simulate.params["student"],
        pictures=len(data),
        steps=options.steps,
        samples_per_step=options.batch_size * options.accumulation * group.count,
        flops_per_step=flops * options.accumulation * group.count,
        memory=tuple(memory for memory, _ in found.values()),
        chosen=chosen,
    )
    if options.peak_tflops:
        seconds = foreseen.flops_per_step / group.count / (options.peak_tflops * 1e12 * _UTILISATION)
        note = f"reckoned with {_UTILISATION:.0%} of {options.peak_tflops:g} TFLOP/s"
        return dataclasses.replace(foreseen, seconds_per_step=seconds, note=note)
    if chosen.total > _ROOM * device_memory:
        return dataclasses.replace(foreseen, note="not measured: it would not fit in the memory of this device")
    seconds, memory = measure(shapes, options, formats)
    return dataclasses.replace(foreseen, seconds_per_step=seconds, measured_memory=memory)


class _Simulation:
    """The step on tensors without data."""

    def __init__(self, shapes: _Shapes, options: DistillOptions, formats: Formats) -> None:
        self._shapes = shapes
        self._options = options
        # On the CPU whatever the device is: attention there keeps for the backward pass what fused attention keeps.
        self._formats = dataclasses.replace(formats, device=torch.device("cpu"))
        self._device = formats.device
        self._overhead = int(_OVERHEAD.get(formats.device.type, _OVERHEAD["cpu"]))
        self._kept = shapes.kept(self._formats)
        self.params: dict[str, int] = {}

    def __call__(self, batch_size: int, saving: bool) -> tuple[Memory, int]:
        """Memory of a process, and floating-point operations of a micro-batch."""
        options, precision = self._options, self._formats.precision
        with no_init_weights(), init_empty_weights(include_buffers=False):
            empty = self._shapes.student(self._formats)
        params, learns = _count(empty), learner(empty, options)
        with FakeTensorMode(allow_non_fake_inputs=True):
            with no_init_weights():
                pair = self._shapes.pair(self._formats, empty)
            _fill(pair.student)
            self.params = {"teacher": _count(denoiser(pair.teacher)), "student": params}
            pair.student.train()
            if saving:
                pair.student.enable_gradient_checkpointing()
            objective = pair.objective(options, self._shapes.captions(pair, options))
            batch = self._shapes.batch(batch_size)
            besides = (pair.teacher.vae, *text_encoders(pair.teacher))
            networks = (denoiser(pair.teacher), *besides, pair.student)
            held = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
            flops = FlopCounterMode(display=False)
            flops.mod_tracker = _NoModules()
            with flops, _Alive([*held, *batch.values()]) as alive:
                with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                    losses = objective(batch, Draws(0, "plan"))
                torch.autograd.backward(losses["loss"])
        taught, student = self._kept
        taught //= processes().count if options.shard_teacher else 1
        if options.offload_teacher:  # a layer that computes, and one that is on its way
            taught = min(taught, 2 * max(map(_own_bytes, denoiser(pair.teacher).modules())))
        embedded = set(pair.family.of_caption) <= batch.keys()
        stay = besides[:1] if embedded and self._device.type != "cpu" else besides  # text encoders leave a device
        frozen = taught + sum(map(_bytes, stay)) + (student if learns is not empty else 0)
        copies = 1 + bool(options.ema_decay)  # weights, and their average
        bytes_held = frozen + copies * _bytes(learns) + 4 * moments(learns, options.optimizer)
        return Memory(batch_size, saving, bytes_held, alive.most, self._overhead), flops.get_total_flops()


def _fill(network: nn.Module) -> None:
    """Give weights of the meta device memory of the CPU; in tensors without data that is none."""
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(torch.empty_like(weight, device="cpu"), weight.requires_grad))


class _NoModules(ModuleTracker):
    """Follows no modules: the hooks that do keep alive what is computed a second time under checkpointing."""

    def __enter__(self) -> "_NoModules":
        return self

    def __exit__(self, *given: object) -> None:
        pass


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows how many bytes of tensors are alive, besides those that were there before."""

    def __init__(self, before: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return output

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def measure(shapes: _Shapes, options: DistillOptions, formats: Formats) -> tuple[float, int | None]:
    """Seconds of a step of this process, and the most memory in bytes that it held, where the system tells."""
    pair = shapes.pair(formats)
    pair.set_up(
        gradient_checkpointing=options.gradient_checkpointing,
        shard_teacher=options.shard_teacher,
        offload_teacher=options.offload_teacher and formats.device.type != "cpu",
    )
    objective = pair.objective(options, shapes.captions(pair, options))
    state = pair.fresh_state(options)
    batch = shapes.batch(options.batch_size, formats.device)
    micro, whole = [], []
    with peak_inside(formats.device) as peak:
        for number in range(_MEASURED_STEPS):
            began = time.perf_counter()
            with torch.autocast(formats.device.type, formats.precision, enabled=formats.precision != torch.float32):
                losses = objective(batch, Draws(number, "plan"))
            torch.autograd.backward(state.scaler.scale(losses["loss"]))
            float(losses["loss"].detach())  # waits for the device
            micro.append(time.perf_counter() - began)
            float(optimize(state, 0.0, options.max_grad_norm))
            whole.append(time.perf_counter() - began)
    seconds = min(whole) + (options.accumulation - 1) * min(micro)
    return seconds, peak.bytes


def _scheduler(model: str) -> SchedulerMixin:
    """That of a model; the usual one of Stable Diffusion where it does not say."""
    config = load_scheduler_config(model)
    if config is None:
        return PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    return build_scheduler(config, model)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New weights have this type inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _device(device: torch.device) -> tuple[str, int]:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    return str(device), psutil.virtual_memory().total


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _bytes(network: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters())


def _own_bytes(module: nn.Module) -> int:
    """Of the weights that are a module's own."""
    return sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _hours(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"
