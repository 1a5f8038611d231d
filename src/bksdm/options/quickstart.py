"""What tells the whole story."""

from dataclasses import dataclass


@dataclass(frozen=True)
class QuickstartOptions:
    """The whole story on the embedded art: describe, prune, distill, generate, evaluate, report.

    Attributes:
        out: Folder for everything; report.html is the result. The same command resumes it.
        recipe: base, small, tiny, or a YAML file.
        steps: Steps of the retraining, of 32 pictures each; a transformer takes four of 8 for one of them.
        seed: Root of all random numbers.
        teacher: 'emoji', 'emoji-flow', or another model that draws the embedded art: folder, .safetensors file, Hub id.
    """

    out: str = "runs/quickstart"
    recipe: str = "small"
    steps: int = 100
    seed: int = 0
    teacher: str = "emoji"
