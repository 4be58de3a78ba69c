"""Bounds of the numbers in the description of a network, which may come from a stranger: they limit the memory and time
that a description can cost."""

from typing import Annotated

from pydantic import Field

Width = Annotated[int, Field(ge=1, le=65_536)]
Widths = Annotated[tuple[Width, ...], Field(min_length=1, max_length=64)]
Side = Annotated[int, Field(ge=1, le=65_536)]
Mean = Annotated[float, Field(ge=-1e6, le=1e6)]
Deviation = Annotated[float, Field(ge=1e-6, le=1e6)]
Means = Annotated[tuple[Mean, ...], Field(min_length=1, max_length=65_536)]
Deviations = Annotated[tuple[Deviation, ...], Field(min_length=1, max_length=65_536)]
MAX_CLASSES = 1_000_000
MAX_NETWORKS = 100_000
MAX_BLOCKS = 256
MAX_PIXELS = 2**28  # numbers of one image, C x H x W
