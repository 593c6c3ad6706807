"""Lets vLLM load the text part of models that read images where torchvision is not installed: modules of such models
import it for image processors, which prompts of text never reach."""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Never

PACKAGE = "torchvision"


def provide_torchvision() -> None:
    """Let this process import torchvision with names that stand for nothing, where it is not installed. May be called
    repeatedly.

    transformers is asked first whether torchvision is installed, and keeps its answer."""
    from transformers.utils.import_utils import is_torchvision_available  # noqa: PLC0415  - this module is light

    if not is_torchvision_available() and not any(isinstance(finder, _EmptyPackage) for finder in sys.meta_path):
        sys.meta_path.append(_EmptyPackage())


class _EmptyPackage(MetaPathFinder, Loader):
    """The last finder that an import asks, so that an installed package comes before."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] == PACKAGE else None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = _Name.__getattr__.__get__(_Name)  # type: ignore[method-assign]


class _Name(type):
    """A class under any name that an annotation or a default value mentions, with such classes as its attributes.
    Called, it raises ImportError."""

    def __getattr__(cls, name: str) -> "_Name":
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})

    def __call__(cls, *args: object, **named: object) -> Never:
        del args, named
        raise ImportError(f"torchvision is not installed: images need its {cls.__name__}.", name=PACKAGE)
