"""Class folders: CLASS/NAME.jpg; the class is the first folder of the path, as in torchvision's ImageFolder."""

from collections.abc import Mapping

from sanitize.errors import ConfigError
from sanitize.importing.config import ImportConfig
from sanitize.importing.files import Files, Folder, Listed, Stamp
from sanitize.importing.source import MAX_CLASS_NAME, class_numbers, not_listed, shown_names
from sanitize.importing.splits import SPLITS, choose_split
from sanitize.tar.names import is_of_macos


def class_folders(folder: Folder, config: ImportConfig, found: Mapping[str, Stamp] | None = None) -> Files:
    """The files of all class folders; files elsewhere are offered too, with a problem. Files of macOS are not offered.

    Args:
        folder: folder of class folders, or of splits (`train/CLASS/NAME.jpg`).
        config: settings.
        found: all files of the folder, if they were listed already.

    With `config.classes`, what becomes of a file depends on its path and content alone: whether there are folders of
    splits is not looked for but said by `config.split`.

    Raises:
        ConfigError: there are no class folders, or several splits and none was chosen.
    """
    found = folder.walk() if found is None else found
    n_found = len(found)
    found = {name: stamp for name, stamp in found.items() if not is_of_macos(name)}
    notes = {"files of macOS (._NAME, .DS_Store)": n_found - len(found)} if len(found) < n_found else {}
    tops = {name.partition("/")[0] for name in found if name.count("/") > 1 and not _is_hidden(name)}
    flat = {name.partition("/")[0] for name in found if name.count("/") == 1 and not _is_hidden(name)}
    depth = 0
    if config.classes is not None:
        depth = int(config.split is not None)
        if config.split not in (None, "all"):
            found = {name: stamp for name, stamp in found.items() if name.startswith(f"{config.split}/")}
    elif tops and tops <= SPLITS and not flat & tops:
        depth = 1
        split = choose_split(sorted(tops), config.split, folder.place)
        if split is not None:
            found = {name: stamp for name, stamp in found.items() if name.startswith(f"{split}/")}
    elif config.split is not None:
        raise ConfigError(f"--split {config.split}: {folder.place} has no folders of splits, only class folders")
    names = {name: _class_of(name, depth) for name in found}
    numbers = class_numbers((one for one in names.values() if one is not None), config.classes)
    if not numbers or not any(names.values()):
        raise ConfigError(f"{folder.place} has no class folders: expected {folder.place}/CLASS/NAME.jpg")
    listed = []
    for name, stamp in found.items():
        one, problem = names[name], stamp.problem
        if one is None:
            problem = "in a hidden folder" if _is_hidden(name) else "in no class folder"
        elif one not in numbers:
            problem = not_listed(one)
        elif config.classes is not None and problem is None and folder.is_link(name):
            problem = "a link: with `classes`, each image is a file of its own"
        listed.append(Listed(name, -1 if one is None else numbers.get(one, -1), (), problem))
    return Files(folder, listed, shown_names(numbers), config.max_image_bytes, found, notes=notes)


def _class_of(name: str, depth: int) -> str | None:
    """Class of a file, or None."""
    parts = name.split("/")
    if len(parts) < depth + 2 or _is_hidden(name) or len(parts[depth]) > MAX_CLASS_NAME:
        return None
    return parts[depth]


def _is_hidden(name: str) -> bool:
    """True below a folder that is no class: `.git`, or `__MACOSX` of zip archives."""
    return any(folder.startswith(".") or folder == "__MACOSX" for folder in name.split("/")[:-1])
