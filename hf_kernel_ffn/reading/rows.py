"""A table as a list of named tuples."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from ..checkpoint_code.errors import MissingPackage

if TYPE_CHECKING:
    import pandas

Row = TypeVar("Row", bound=tuple)


class Rows(list[Row]):
    """Named tuples of one kind, in order."""

    def to_pandas(self) -> pandas.DataFrame:
        """The table with a column per field. MissingPackage if pandas is not installed."""
        try:
            import pandas
        except ImportError as error:
            raise MissingPackage(
                "to_pandas needs pandas: pip install 'hf-kernel-ffn[read]'"
            ) from error
        return pandas.DataFrame(self)
