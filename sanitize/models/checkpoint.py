"""Trained networks as artifacts: weights as safetensors beside the description of the network. No pickle.

A checkpoint may come from a stranger. Its description is bounded, the code it names runs only where the caller allows
it, and names, shapes and dtypes of the weights are compared before anything larger than the files is built.
"""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property
from typing import Any, Self

from pydantic import ValidationError
from torch import Tensor, nn

from sanitize.artifacts import Artifact, Part, first_problem
from sanitize.errors import ArtifactError, ConfigError
from sanitize.models.architectures import Architecture
from sanitize.models.config import ModelConfig
from sanitize.models.factory import factory_of, only_installed, refuse_unless_installed
from sanitize.models.weights import as_safetensors, load_into, refuse_misfits

_MAX_DESCRIPTION = 1 << 20  # bytes of config.json
_MAX_HEADER = 100 << 20  # bytes of the header of a safetensors file; the format allows no more


class Checkpoint(Artifact):
    """A trained network: `model.safetensors`, `config.json` (ModelConfig), `history.json`.

    Attributes:
        own_factory: function in the user's own configuration that built the network; it may run again.
        trust_code: allow any function in the description, if it is in an installed package.
    """

    own_factory: str | None = None
    trust_code: bool = False

    @cached_property
    def config(self) -> ModelConfig:
        """Description of the network. Raises ArtifactError where `config.json` describes no network."""
        where = self.url("config.json")
        described = self.read_json("config.json", _MAX_DESCRIPTION)
        try:
            return ModelConfig.model_validate(described)
        except (ValidationError, ConfigError) as error:
            why = first_problem(error) if isinstance(error, ValidationError) else error
            raise ArtifactError(f"{where} describes no network: {why}") from error

    def model(self) -> nn.Module:
        """The network in eval mode, on the CPU.

        Raises:
            ArtifactError: the description names code that is not allowed, or the weights do not fit the network or are
                not finite.
        """
        try:
            is_own = self._refuse_code()
            with nullcontext() if is_own else only_installed(self.path):
                return self._loaded().eval()
        except ConfigError as error:
            raise ArtifactError(f"{self.path} cannot be loaded: {error}") from error

    def _loaded(self) -> nn.Module:
        outline = self.config.outline()
        expected = None if outline is None else self.config.layout(outline)
        if expected is not None:
            self._refuse_size(sum(tensor.nbytes for tensor in expected.values()))
        state = self._state(expected)
        if outline is not None and expected is not None:
            refuse_misfits(expected, state, self.path)
            self.config.refuse_if_no_classifier(outline)
        model = self.config.build_to_load()
        load_into(model, state, self.path)
        for name, tensor in state.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ArtifactError(f"{self.path}: the weights {name!r} are not finite")
        return model

    @cached_property
    def suspect(self) -> dict[str, Any] | None:
        """Training of a suspect model, from `suspect.json`; None for other networks.

        `steps`, `epochs`, `accuracy` (of the last epoch, in [0, 1]), `chance` (share of the largest class), `size`
        ([H, W]), `n_samples` of `n_all`, `learned`, `why`, and the `setting` that would help, or None.
        """
        return self.read_object("suspect.json", "learned", "why") if "suspect.json" in self.manifest().files else None

    def weight_files(self) -> list[str]:
        """Names of the files that hold the weights."""
        return ["model.safetensors"]

    def _state(self, _expected: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """All weights, by name."""
        return self.read_tensors("model.safetensors")

    def _refuse_code(self) -> bool:
        """Raise ArtifactError where the description names code that is not allowed; True for the user's own code."""
        function = factory_of(self.config.architecture)
        if function is None:
            return False
        if function == self.own_factory:
            return True
        if not self.trust_code:
            raise ArtifactError(
                f"{self.path} is built by the code {function}; none of it was run. If you trust the author of the "
                "model and have installed that code: --allow-factory (`allow_factory: true` in the YAML file of the "
                "run), or trust_code=True in Python"
            )
        with only_installed(self.path):
            refuse_unless_installed(function, self.path)
        return False

    def _refuse_size(self, n_bytes: int) -> None:
        """Raise ArtifactError where the files of weights are not about as large as the weights."""
        files = self.manifest().files
        sizes = [files[name].size for name in self.weight_files() if name in files]
        if not n_bytes <= sum(sizes) <= n_bytes + len(sizes) * _MAX_HEADER:
            raise ArtifactError(
                f"{self.path} describes a network of {n_bytes:,} bytes, but its weights have {sum(sizes):,} bytes"
            )

    def of_own(self, architecture: Architecture) -> Self:
        """The same handle for a model of the user's own configuration: the code of its architecture may run again."""
        return self.model_copy(update={"own_factory": factory_of(architecture)})

    def trusted_like(self, model: "Checkpoint") -> Self:
        """The same handle with the trust in `model`, from which it was made."""
        return self.model_copy(update={"own_factory": model.own_factory, "trust_code": model.trust_code})


def write_checkpoint(part: Part, model: nn.Module, config: ModelConfig, history: list[dict[str, Any]]) -> None:
    """Write the three files of a `Checkpoint`."""
    part.write("model.safetensors", as_safetensors(model))
    part.write("config.json", json.dumps(config.model_dump(mode="json"), indent=2).encode())
    part.write_json("history.json", history)
