"""What all sections of the parameters share."""

from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _refuse_bool(value: Any) -> Any:
    """Pydantic would read true as 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "must be a number")
    return value


Integer: TypeAlias = Annotated[int, BeforeValidator(_refuse_bool)]
Number: TypeAlias = Annotated[float, BeforeValidator(_refuse_bool)]
Positive: TypeAlias = Annotated[Integer, Field(ge=1)]
Word: TypeAlias = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
