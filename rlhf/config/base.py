"""What every config section is: frozen, strict about names, documented by its attributes' docstrings."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the config. Each field's docstring is its help text."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )
