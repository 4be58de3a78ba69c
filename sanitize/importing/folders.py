"""Class folders: CLASS/NAME.jpg; the class is the first folder of the path, as in torchvision's ImageFolder."""

import posixpath
from collections.abc import Collection, Mapping

from sanitize.data.samples import is_picture
from sanitize.errors import ConfigError
from sanitize.importing.config import ImportConfig
from sanitize.importing.files import Files, Folder, Listed, Stamp
from sanitize.importing.source import MAX_CLASS_NAME, class_numbers, not_listed, shown_names, some
from sanitize.importing.splits import choose_split, names_split
from sanitize.tar.names import is_of_macos, printable, split_name

_OF_WINDOWS = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini"})


def class_folders(folder: Folder, config: ImportConfig, found: Mapping[str, Stamp] | None = None) -> Files:
    """The files of all class folders; files elsewhere are offered too, with a problem. Files that macOS and Windows put
    beside others are not offered.

    Args:
        folder: folder of class folders, or of splits (`train/CLASS/NAME.jpg`).
        config: settings.
        found: all files of the folder, if they were listed already.

    With `config.classes`, what becomes of a file depends on its path and content alone: whether there are folders of
    splits is not looked for but said by `config.split`.

    Raises:
        ConfigError: there are no class folders, it is unclear which folders are the classes, or there are several
            splits and none was chosen.
    """
    found = folder.walk() if found is None else found
    notes = {}
    for what, is_of in (
        ("macOS (._NAME, .DS_Store)", is_of_macos),
        ("Windows (Thumbs.db, desktop.ini)", _is_of_windows),
    ):
        kept = {name: stamp for name, stamp in found.items() if not is_of(name)}
        if n := len(found) - len(kept):
            notes[f"files of {what}"] = n
        found = kept
    depth = 0
    pictures = [name for name in found if not _is_hidden(name) and is_picture(split_name(name)[1])]
    if config.classes is not None:
        depth = int(config.split is not None)
        split = None if config.split == "all" else config.split
    else:
        splits = _splits(pictures, config.split, folder.place)
        if not splits and config.split not in (None, "all"):
            raise ConfigError(f"--split {config.split}: {folder.place} has no folders of splits, only class folders")
        depth = int(bool(splits))
        split = choose_split(splits, config.split, folder.place) if splits else None
    if split is not None:
        found = {name: stamp for name, stamp in found.items() if name.startswith(f"{split}/")}
    names = {name: _class_of(name, depth) for name in found}
    # A folder without a picture (docs/, labels/) is no class, unless no suffix is that of a picture.
    with_pictures = {names[name] for name in pictures if name in names} or set(names.values())
    numbers = class_numbers((one for one in with_pictures if one is not None), config.classes)
    if not numbers or not any(names.values()):
        raise ConfigError(f"{folder.place} has no class folders: expected {folder.place}/CLASS/NAME.jpg")
    listed = []
    for name, stamp in found.items():
        one, problem = names[name], stamp.problem
        if one is None:
            problem = "in a hidden folder" if _is_hidden(name) else "in no class folder"
        elif one not in numbers:
            problem = "in a folder without pictures" if config.classes is None else not_listed(one)
        elif config.classes is not None and problem is None and folder.is_link(name):
            problem = "a link: with `classes`, each image is a file of its own"
        listed.append(Listed(name, -1 if one is None else numbers.get(one, -1), (), problem))
    return Files(folder, listed, shown_names(numbers), config.max_image_bytes, found, notes=notes)


def _splits(pictures: Collection[str], wanted: str | None, place: str) -> list[str]:
    """Folders of splits that the class folders lie in; none where these lie at the top.

    Raises:
        ConfigError: it is unclear which folders are the classes.
    """
    tops = {name.partition("/")[0] for name in pictures if "/" in name}
    flat = {name.partition("/")[0] for name in pictures if name.count("/") == 1}
    splits = sorted(top for top in tops - flat if names_split(top))  # a class `train` has its pictures in it
    others = sorted(tops - set(splits))
    if splits and others and wanted not in splits:
        raise ConfigError(
            f"{place} has folders of splits ({some(splits)}) beside other folders ({some(others)}): choose one with "
            f"--split {printable(splits[0])}, or if all of them are classes, list them with --classes"
        )
    if flat and all(map(names_split, tops)):
        raise ConfigError(
            f"{place} has folders of splits ({some(sorted(tops))}) with pictures and no class folders in them: give a "
            "table of labels as the source, or if they are classes, list them with --classes"
        )
    inner_splits = {name.split("/")[1] for name in pictures if name.count("/") > 1 and names_split(name.split("/")[1])}
    if not splits and len(inner_splits) > 1 and wanted != "all":
        raise ConfigError(
            f"the class folders of {place} hold folders of splits ({some(sorted(inner_splits))}): put the classes into "
            "one folder for each split (train/CLASS/NAME.jpg), or mix them with --split all"
        )
    if not splits and len(tops) == 1 and not flat and not any("/" not in name for name in pictures):
        folders = {posixpath.dirname(name) for name in pictures}
        if len(folders) > 1:
            inner = printable(posixpath.join(place, posixpath.commonpath(folders)))
            raise ConfigError(
                f"all pictures of {place} lie in folders of {inner}: if those are the classes, give {inner} as the "
                f"source; if {printable(next(iter(tops)))!r} is the only class, list it with --classes"
            )
    return splits


def _class_of(name: str, depth: int) -> str | None:
    """Class of a file, or None."""
    parts = name.split("/")
    if len(parts) < depth + 2 or _is_hidden(name) or len(parts[depth]) > MAX_CLASS_NAME:
        return None
    return parts[depth]


def _is_hidden(name: str) -> bool:
    """True below a folder that is no class: `.git`, or `__MACOSX` of zip archives."""
    return any(folder.startswith(".") or folder == "__MACOSX" for folder in name.split("/")[:-1])


def _is_of_windows(name: str) -> bool:
    return posixpath.basename(name).lower() in _OF_WINDOWS
