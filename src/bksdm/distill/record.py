"""What a training run leaves for people: `metrics.jsonl` and TensorBoard files."""

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from bksdm.common.progress import say
from bksdm.common.runs import read_lines, write_text

_RECENT = 20  # records
_STANDS_OUT = 3.0


class Record:
    """The losses of a run, one line a record. A resumed run first drops what came after its checkpoint.

    A line whose highest loss stands out of the losses before it has `spike`: how many times their median it is.

    Arguments:
        metrics: The JSON-lines file.
        tensorboard: Folder of the event files.
        step: Where the run goes on.
    """

    def __init__(self, metrics: Path, tensorboard: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - much to import, for the one that writes

        self._metrics = metrics
        kept = [line for line in read_metrics(metrics) if line["step"] <= step]
        write_text(metrics, "".join(json.dumps(line) + "\n" for line in kept))
        self._recent = deque((line["loss"] for line in kept), maxlen=_RECENT)
        self._tensorboard = SummaryWriter(str(tensorboard), purge_step=step + 1 if step else None)

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        usual = statistics.median(self._recent) if len(self._recent) == _RECENT else math.inf
        spike = {"spike": values["loss_max"] / usual} if values["loss_max"] > _STANDS_OUT * usual else {}
        self._recent.append(values["loss"])
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values, **spike}) + "\n")
        if spike:
            say(f"step {step}: the loss rose to {values['loss_max']:.3g}, {spike['spike']:.1f} times its recent median")
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        self._tensorboard.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The whole lines of a `metrics.jsonl`."""
    return read_lines(path)
