"""The training data of a model, where the run that trained it is still there: the index of what was learned."""

import json
from typing import Any

from sanitize.artifacts import first_line, read_manifest
from sanitize.data.dataset import Dataset
from sanitize.errors import ArtifactError, DataError, StorageError
from sanitize.models.checkpoint import Checkpoint
from sanitize.packaging import open_model, training_recipe
from sanitize.storage import is_local, join, open_read

_MAX_STEPS = 8  # from a model to the one that it was made from
_MAX_BYTES = 16 << 20  # of a run.json


def training_data(model: Checkpoint) -> Dataset | str:
    """The index of the samples that a model was trained on, or the reason why it is not known.

    A model lies in the folder of a run, whose `run.json` has places and digests. A repaired or certified model leads to
    the run that trained it. Nothing is believed but digests: a folder that was made again is another one.
    """
    for _ in range(_MAX_STEPS):
        folder = model.path.rpartition("/")[0] or "."
        try:
            recipe, record = training_recipe(model), _record(folder)
            wanted = recipe.inputs.get("dataset")
            if wanted is not None and (found := _made_in(folder, record, wanted)) is not None:
                return found
            before = _model_before(model, record)
        except (ArtifactError, DataError, OSError) as error:
            if isinstance(error, StorageError):
                raise
            return f"the run that trained the model is not beside it: {first_line(error)}"
        if before is None:
            return f"{folder} does not hold the training data of the model, by digest"
        model = before
    return f"more than {_MAX_STEPS} models lie between {model.path} and its training"


def _record(folder: str) -> dict[str, Any]:
    """The run.json of a run. Raises ArtifactError where it is damaged, DataError where there is none."""
    url = join(folder, "run.json")
    with open_read(url) as stream:
        data = stream.read(_MAX_BYTES + 1)
    try:
        record = json.loads(data) if len(data) <= _MAX_BYTES else None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("stages"), list):
        raise ArtifactError(f"{url} is no record of a run")
    return record


def _made_in(folder: str, record: dict[str, Any], digest: str) -> Dataset | None:
    """The data set of this digest among the stages of a run."""
    for stage in record["stages"]:
        name = stage.get("folder") if isinstance(stage, dict) and stage.get("digest") == digest else None
        if isinstance(name, str) and name.strip(".") and "/" not in name and "\\" not in name:
            path = join(folder, name)
            if read_manifest(path).digest == digest:
                return Dataset(path=path, digest=digest)
    return None


def _model_before(model: Checkpoint, record: dict[str, Any]) -> Checkpoint | None:
    """The model that this one was made from, by packing, repair or certification; None where it is not there."""
    inputs, wanted = record.get("inputs"), model.manifest().recipe.inputs.get("model")
    stages = [stage for stage in record["stages"] if isinstance(stage, dict)]
    folder = model.path.rpartition("/")[0] or "."
    places = [join(folder, str(stage.get("folder"))) for stage in stages if stage.get("digest") == wanted]
    if isinstance(inputs, dict) and isinstance(inputs.get(wanted), str):
        places.append(inputs[wanted])
    for place in places:
        # A record may come from a stranger: it leads to no other store.
        if wanted is not None and is_local(place) == is_local(model.path) and place != model.path:
            before = open_model(place)
            if before.digest == wanted:
                return before
    return None
