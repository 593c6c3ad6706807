"""What a worker raises reaches the driver with its text, also if it cannot be pickled."""

import pickle

import pydantic
import pytest
from pydantic.dataclasses import dataclass
from ray.exceptions import RayTaskError

from rlhf.actors.actor import Actor
from rlhf.actors.calls import Worker, error_in_worker
from rlhf.actors.portable_errors import ForeignError, is_portable
from rlhf.errors import ModelError, RlhfError


@dataclass
class Settings:
    """As vLLM's configs: an error about it holds arguments that cannot be pickled."""

    heads: int
    size: int

    @pydantic.model_validator(mode="after")
    def divides(self) -> "Settings":
        if self.heads % self.size:
            raise ValueError(f"{self.heads} heads must be divisible by {self.size}")
        return self


class TwoPartsError(Exception):
    """Can be pickled, and not be built again."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


class Bad(Actor):
    def __init__(self) -> None:
        """No folder, no log."""

    def configure(self) -> None:
        Settings(heads=2, size=4)

    def split(self) -> None:
        raise TwoPartsError("one", "two")

    def local(self) -> None:
        class HiddenError(Exception):
            pass

        raise HiddenError("from inside")

    def ours(self) -> None:
        raise ModelError(["one", "two"])

    def plain(self) -> None:
        raise GenerationError("GenerationConfig is invalid:\n- `temperature`: set\n- `top_p`: set")


class GenerationError(ValueError):
    pass


def raised(name: str) -> Exception:
    with pytest.raises(Exception) as error:  # noqa: PT011
        getattr(Bad(), name)()
    return error.value


def told(error: Exception) -> str:
    """The driver's line about an error that a worker raised, after a journey through Ray."""
    sent = RayTaskError("call", "the traceback", error)
    assert type(sent.cause) is type(error), "Ray replaced it"
    again = pickle.loads(pickle.dumps(sent.cause))
    worker = Worker(handle=None, name="rollout 0", node="n", node_id="", pid=1)
    return str(error_in_worker(worker, "start", RayTaskError("call", "the traceback", again)))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("configure", "ValidationError: 1 validation error for Settings"),
        ("configure", "2 heads must be divisible by 4"),
        ("split", "TwoPartsError: one and two"),
        ("local", "HiddenError: from inside"),
        ("plain", "GenerationError: GenerationConfig is invalid: - `temperature`: set - `top_p`: set"),
    ],
)
def test_the_text_arrives(name: str, said: str) -> None:
    error = raised(name)
    assert said in told(error)
    if isinstance(error, ForeignError):
        assert error.__cause__ is not None, "the traceback shows the original"


def test_what_can_be_sent_is_sent_as_it_is() -> None:
    error = raised("ours")
    assert type(error) is ModelError
    assert isinstance(error, RlhfError)
    assert error.problems == ("one", "two")
    assert is_portable(ValueError("x"))
    assert not is_portable(TwoPartsError("a", "b"))
