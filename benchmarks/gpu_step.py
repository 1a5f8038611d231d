"""Where does a full-size step's time go on a GPU, and what does compiling the student bring?

    python benchmarks/gpu_step.py --batch-size 64

Prints seconds a step of our loop and of its parts, the operators that take most, seconds with the teacher compiled and
with both, and how far the compiled student's gradients are from its own.
"""

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from train_throughput import SIZES, Bench

from bksdm.common.randomness import Draws
from bksdm.distill.conditions import Conditions
from bksdm.distill.objective import Distillation
from bksdm.distill.state import Ema
from bksdm.families.noise import NoiseSchedule
from bksdm.models.pipelines import quiet_libraries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", default="sd", choices=SIZES)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    quiet_libraries()
    size, device, count = SIZES[arguments.size], torch.device(arguments.device), arguments.batch_size
    bench = Bench.of(size, "base", count, device)
    teacher = bench.pipeline.unet.to(device, torch.bfloat16).to(memory_format=torch.channels_last)
    student = copy.deepcopy(bench.student).to(device).train().to(memory_format=torch.channels_last)
    mean = torch.randn(count, 4, size.latent, size.latent, device=device)
    batch = {"latents_mean": mean, "latents_std": mean.abs()}
    batch["context"] = torch.randn(count, size.tokens, size.text_width, device=device)
    conditions = Conditions.of(bench.pipeline)
    schedule = NoiseSchedule.from_scheduler(bench.pipeline.scheduler)
    objective = Distillation(student, teacher, bench.pruning.taps, conditions, schedule)

    def losses() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return objective(batch, Draws(0, "noise"))["loss"]

    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5, fused=True)
    ema, parameters = Ema(student, 0.9999), list(student.parameters())

    def step() -> None:
        torch.autograd.backward(losses())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(parameters, 1000)

    report("as it is", step, count, device)
    for part, run in {
        "draws": lambda: Draws(0, "noise").normal(mean.shape).to(device),
        "teacher": lambda: taught(objective, batch),
        "optimizer and average": lambda: (optimizer.step(), ema.update(parameters, 1000)),
    }.items():
        report(part, run, count, device)
    profile(step, device)

    own = gradients(student, losses)
    began = time.perf_counter()
    teacher.compile(dynamic=False)
    report("compiled teacher", step, count, device)
    student.compile(dynamic=False)
    step()
    print(f"compiled after {time.perf_counter() - began:.0f} s", flush=True)
    report("compiled teacher and student", step, count, device)
    now = gradients(student, losses)
    again = gradients(student, losses)
    print(f"gradients differ by {apart(own, now)}; of one call and the next by {apart(now, again)}", flush=True)


def taught(objective: Distillation, batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        objective._all_taught(objective._question(batch, Draws(0, "noise")))


def report(name: str, step: Callable[[], object], count: int, device: torch.device, steps: int = 5) -> None:
    for _ in range(2):
        step()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    seconds = (time.perf_counter() - began) / steps
    held = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    print(f"{name}: {seconds:.4f} s, {count / seconds:.1f} images/s, {held:.1f} GiB", flush=True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def profile(step: Callable[[], None], device: torch.device) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        step()
        synchronize(device)
    spent = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
    operators = [event for event in found.key_averages() if event.key.startswith("aten::")]
    total = sum(getattr(event, spent) for event in operators)
    for event in sorted(operators, key=lambda event: -getattr(event, spent))[:20]:
        own = getattr(event, spent)
        print(f"  {event.key}: {own / 1000:.1f} ms, {100 * own / total:.1f} %, {event.count} calls", flush=True)


def gradients(student: nn.Module, losses: Callable[[], Tensor]) -> list[Tensor]:
    student.zero_grad(set_to_none=True)
    torch.autograd.backward(losses())
    found = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    student.zero_grad(set_to_none=True)
    return found


def apart(ones: list[Tensor], others: list[Tensor]) -> str:
    """Of all parameters' relative 2-norms of a difference, the median and the largest."""
    far = sorted(float((b - a).norm() / a.norm().clamp(min=1e-12)) for a, b in zip(ones, others, strict=True))
    return f"{far[len(far) // 2]:.1e} (median), {far[-1]:.1e} (largest)"


if __name__ == "__main__":
    main()
