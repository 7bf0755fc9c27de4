"""The methods: which class, with which options, and how to put it into a backbone."""

import copy
import dataclasses
import inspect
import pkgutil
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass
from timm.models.vision_transformer import VisionTransformer

from dhtm.harness.core.errors import UserError, explain, one_line
from dhtm.reducer import Reducer
from dhtm.vit import patch


@dataclass(frozen=True)
class Method:
    """A token reduction method with its options.

    Attributes:
        name: in tables, figures and directories.
        target: the dotted path of its class, a :class:`dhtm.Reducer`.
        knob: the option that is varied to reach a target cost; None if it has none.
        checkpoint: None for the backbone's own weights, "trained" for those that were trained with the method, or a file.
        options: arguments of the class, including layers; the class's defaults for those that are not given.

    Raises:
        UserError: the class does not exist.
    """

    name: str
    target: str
    knob: str | None = None
    checkpoint: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "options", {**self.defaults(), **self.options})

    def __hash__(self):
        return hash(repr(self))

    def _class(self) -> type[Reducer]:
        with explain(f"method={self.name}: no class {self.target}"):
            return pkgutil.resolve_name(self.target)

    def defaults(self) -> dict[str, Any]:
        """Return the class's default for each option that has one."""
        arguments = inspect.signature(self._class()).parameters.values()
        return {argument.name: argument.default for argument in arguments if argument.default is not argument.empty}

    @property
    def setting(self) -> Any:
        """The value of the knob; None if the method has none."""
        return self.options.get(self.knob) if self.knob else None

    @property
    def knobs(self) -> dict[str, Any]:
        """All options but the layers."""
        return {key: value for key, value in self.options.items() if key != "layers"}

    @property
    def place(self) -> Path:
        """The path of the method's trained weights below the backbone's folder, without an ending."""
        return Path(f"{self.name}_{self.knob}_{self.setting}" if self.knob else self.name)

    def reducer(self) -> Reducer:
        """Make the reducer.

        Raises:
            UserError: the class does not take these options.
        """
        try:
            return self._class()(**self.options)
        except Exception as error:  # a class of the user's own may raise anything
            raise UserError(f"method={self.name}: {one_line(error)}") from error

    def unusual_options(self) -> str:
        """Return the options that differ from the class's defaults, as "k=40 linkage=size", for a run's name."""
        defaults = self.defaults()
        return " ".join(f"{name}={value}" for name, value in self.knobs.items() if value != defaults.get(name))

    def put_into(self, model: VisionTransformer, backbone_name: str) -> VisionTransformer:
        """Patch a copy of a model with the method; raises the errors of :meth:`patch`."""
        return self.patch(copy.deepcopy(model), backbone_name)

    def patch(self, model: VisionTransformer, backbone_name: str) -> VisionTransformer:
        """Patch a model with the method.

        Raises:
            UserError: the model cannot be patched with it.
        """
        reducer = self.reducer()
        try:
            return patch(model, reducer)
        except (ValueError, TypeError) as error:
            raise UserError(f"backbone={backbone_name}, method={self.name}: {one_line(error)}") from error


def knob_text(knob: str | None, value: float | list[float] | None) -> str:
    """Return a knob and its value for readers, as "k = 40"; "" for a method without one."""
    if not isinstance(knob, str):  # a data frame has NaN for no knob
        return ""
    if isinstance(value, list):
        return f"{knob} = {', '.join(f'{one:g}' for one in value)}"
    return f"{knob} by layer" if value is None or value != value else f"{knob} = {value:g}"


UNMERGED = Method("unmerged", "dhtm.DHTM", options={"k": 0, "layers": "all"})  # as configs/method/unmerged.yaml
