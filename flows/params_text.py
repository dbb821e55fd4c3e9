"""A text as a part of several sections."""

from typing import Self

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from flows.params_section import Section, Word
from surgeon.errors import TextError
from surgeon.text import TextSpec, check_spec


class TextParams(Section):
    """A text; see `surgeon.text.TextSpec`."""

    source: Word = "python-docs"
    split: Word | None = None
    column: Word | None = None
    revision: Word | None = None

    def spec(self) -> TextSpec:
        """Returns the same as the library names it."""
        return TextSpec(self.source, self.split, self.column, self.revision)

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            check_spec(self.spec())
        except TextError as error:
            raise PydanticCustomError("text", "{reason}", {"reason": str(error)}) from error
        return self
