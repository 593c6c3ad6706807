"""What every config section is: frozen, strict about names, documented by its attributes' docstrings
(`docstrings.py`)."""

from pydantic import BaseModel, ConfigDict, model_validator

from rlhf.config.renamed import current_fields


class Section(BaseModel):
    """A part of the config. Each field's docstring is its help text."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _current_names(cls, values: object) -> object:
        return current_fields(values, cls.model_fields) if isinstance(values, dict) else values
