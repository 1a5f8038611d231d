"""What a program makes of a denoiser."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Reader:
    """What a program makes of a U-Net.

    Attributes:
        program: Its name.
        file: What it is given: a folder of diffusers, or a single file with the original names.
        answer: yes, no, or under which condition.
        seen: What that rests on: run, or code that was read and not run.
        why: The reason, where there is something to say.
    """

    program: str
    file: str
    answer: str
    seen: str
    why: str = ""

    def __str__(self) -> str:
        seen = "run" if self.seen == "run" else "from its code, not run"
        return f"{self.program}, {self.file}: {self.answer}{f', {self.why}' if self.why else ''} ({seen})"

    def to_dict(self) -> dict[str, str]:
        """Plain values."""
        return asdict(self)
