"""Bounds of the numbers in a network's description. A description may come from a stranger: no number in it may ask for
more memory or time than any network of ours needs."""

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
