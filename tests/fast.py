"""Which cases of a test run in the fast suite: where the same code answers for all, one does, and others are slow."""

import pytest

Param = type(pytest.param())


def slow(*values: object, **named: str) -> Param:
    """A case for the long checks."""
    return pytest.param(*values, marks=pytest.mark.slow, **named)


# One model of Stable Diffusion's, and one of SDXL's that asks nothing new of what a test looks at.
one_kind = pytest.mark.parametrize("kind", ["v1", slow("shallow_xl", id="xl")], indirect=True)
# One family of transformers, which is the quickest.
one_flow = pytest.mark.parametrize("flow_kind", ["z", slow("flux"), slow("klein")], indirect=True)
