"""Tables of paths and labels."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sanitize.errors import ConfigError, DataError
from tests.importing.imported import by_file, content, reasons, run


@pytest.fixture
def source(write: Callable[..., Path], photos: dict[str, bytes]) -> Path:
    return write(photos)


LINES = [("ant/00.png", "insect"), ("bee/01.png", "insect"), ("cat/02.png", "beast")]


@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ","), ("t.csv", ";"), ("t.tsv", "\t")])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_a_table_gives_paths_and_labels(name: str, delimiter: str, start: str, source: Path, tmp_path: Path) -> None:
    rows = [("id", "file_name", "Label"), *((str(i), *row) for i, row in enumerate(LINES))]
    (source / name).write_text(start + "\r\n".join(delimiter.join(row) for row in rows) + "\r\n\r\n")
    made = run(source / name, tmp_path / "out")
    assert made.classes() == {"beast": 0, "insect": 1}
    assert {file: one["class_name"] for file, one in by_file(made).items()} == dict(LINES)
    for file, one in by_file(made).items():
        assert one["members"]["png"] == (source / file).read_bytes()


def test_columns_and_the_folder_of_images_can_be_named(source: Path, tmp_path: Path) -> None:
    table = tmp_path / "elsewhere.csv"
    table.write_text("where,a,b\nant/00.png,x,1\nbee/00.png,y,2\n")
    with pytest.raises(ConfigError, match=r"no column of paths is known by name; .*--image-column among where, a, b"):
        run(table, tmp_path / "out", images=str(source))
    made = run(table, tmp_path / "out", images=str(source), image_column="where", label_column="a")
    assert made.classes() == {"x": 0, "y": 1}
    with pytest.raises(ConfigError, match="has the columns where, a, b"):
        run(table, tmp_path / "other", images=str(source), image_column="place")
    table.write_text("path,label,class\n1,2,3\n")
    with pytest.raises(ConfigError, match=r"several columns may hold labels \(label, class\)"):
        run(table, tmp_path / "other", images=str(source))
    with pytest.raises(ConfigError, match="there is no such folder"):
        run(table, tmp_path / "other", images=str(tmp_path / "nowhere"))


def test_a_table_without_a_header(source: Path, tmp_path: Path) -> None:
    (source / "t.csv").write_text("".join(f"{path},{label}\n" for path, label in LINES))
    with pytest.raises(ConfigError, match="add --no-header"):
        run(source / "t.csv", tmp_path / "out")
    made = run(source / "t.csv", tmp_path / "out", header=False, image_column="0", label_column="1")
    assert made.summary()["imported"] == 3


def test_paths_that_lead_out_are_refused(source: Path, make_png: Callable[..., bytes], tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(make_png(77))
    (source / "link").symlink_to(tmp_path)
    paths = ["../secret.png", f"{tmp_path}/secret.png", "ant/../../secret.png", "link/secret.png", "..\\secret.png"]
    paths += ["C:\\x.png", "~/secret.png", "file:///etc/passwd", "a\x1bb.png", "ant", "nowhere.png", "", "x" * 5000]
    (source / "t.csv").write_text("path,label\nant/00.png,a\n" + "".join(f"{path},a\n" for path in paths))
    made = run(source / "t.csv", tmp_path / "out", max_refused_fraction=1)
    assert by_file(made).keys() == {"ant/00.png"}
    assert made.summary()["refused"] == len(paths)
    assert reasons(made) == {
        "unsafe path: '..' component": 3,
        "unsafe path: absolute path": 1,
        "unsafe path: drive letter": 1,
        "unsafe path: control character": 1,
        "unsafe path: empty": 1,
        "a link that leads out of the folder": 1,
        "a folder": 1,
        "there is no such file": 3,
        "cannot be read: File name too long": 1,
    }
    assert make_png(77) not in b"".join(content(tmp_path / "out").values())


def test_rows_without_a_label_and_repeated_paths_are_refused(source: Path, tmp_path: Path) -> None:
    rows = ["ant/00.png,a", "ant/00.png,b", "./ant/00.png,b", "ant/01.png,", "ant/02.png", f"ant/03.png,{'x' * 1001}"]
    (source / "t.csv").write_text("path,label\n" + "\n".join(rows))
    made = run(source / "t.csv", tmp_path / "out", max_refused_fraction=1)
    assert made.summary()["offered"] == 6
    assert reasons(made)["no label"] == 2
    assert reasons(made)["a label of more than 1000 characters"] == 1


def test_a_row_of_more_cells_than_columns_is_refused(source: Path, tmp_path: Path) -> None:
    """A comma without quotes moves the label: in `ant/01.png` it would be "black"."""
    rows = ["ant/00.png,a,", "ant/01.png,black, a", "ant/02.png,a"]
    (source / "t.csv").write_text("path,label\n" + "\n".join(rows))
    made = run(source / "t.csv", tmp_path / "out", max_refused_fraction=1)
    assert made.classes() == {"a": 0}
    assert by_file(made).keys() == {"ant/00.png", "ant/02.png"}
    (reason,) = reasons(made)
    assert reason.startswith("a row of more cells than the table has columns")


@pytest.mark.parametrize(
    ("path", "message"),
    [("ant\\00.png", r"no such file: it has backslashes, write /"), ("/ant/00.png", "absolute path.*--images FOLDER")],
)
def test_paths_of_windows_and_absolute_ones_come_with_the_remedy(
    path: str, message: str, source: Path, tmp_path: Path
) -> None:
    (source / "t.csv").write_text(f"path,label\n{path},a\n")
    with pytest.raises(DataError, match=message):
        run(source / "t.csv", tmp_path / "out")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"path,label\n", "has no rows"),
        (b"", "is empty"),
        (b"path,label\n" + b"x" * (1 << 21), "line of more than"),
        (b'path,label\n"ant,x\n', "line 2"),
        (b"path,label\n" + b"x" * 200_000 + b",a\n", "field larger than field limit"),
        (b"," * 5000 + b"\n", "more than 1000 columns"),
        ("path,label\n".encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
        (b"path,label,label\nant/00.png,a,b\n", "has 2 columns 'label'"),
        (b'path,label\nant/00.png,a\n"ant/01.png,a\nant/02.png,a\n', "line 3: a quotation mark is not closed"),
    ],
)
def test_what_is_no_table_is_an_error(data: bytes, message: str, source: Path, tmp_path: Path) -> None:
    (source / "t.csv").write_bytes(data)
    with pytest.raises((ConfigError, DataError), match=message):
        run(source / "t.csv", tmp_path / "out")


def test_limits_of_a_table(source: Path, tmp_path: Path) -> None:
    (source / "t.csv").write_text("path,label\n" + "".join(f"ant/{i:02d}.png,a\n" for i in range(10)))
    with pytest.raises(ConfigError, match="raise max_samples"):
        run(source / "t.csv", tmp_path / "out", max_samples=5)
    with pytest.raises(DataError, match="more than max_table_bytes 20"):
        run(source / "t.csv", tmp_path / "out", max_table_bytes=20)


def test_where_no_path_is_right_the_error_names_the_folder_option(source: Path, tmp_path: Path) -> None:
    (source / "t.csv").write_text("path,label\nphotos/1.png,a\n")
    with pytest.raises(
        DataError, match=r"nothing to import. 1 x there is no such file \(photos/1.png\).*--images FOLDER"
    ):
        run(source / "t.csv", tmp_path / "out")


def test_class_names_that_look_the_same_are_refused(source: Path, tmp_path: Path) -> None:
    (source / "t.csv").write_bytes(b"path,label\nant/00.png,caf\xe9\nant/01.png,caf\\xe9\n")
    with pytest.raises(ConfigError, match=r"two class names are 'caf\\\\xe9'"):
        run(source / "t.csv", tmp_path / "out")


def test_rows_of_classes_that_are_not_given_are_refused(source: Path, tmp_path: Path) -> None:
    (source / "t.csv").write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in LINES))
    made = run(source / "t.csv", tmp_path / "out", classes=("tree", "insect"), max_refused_fraction=0.5)
    assert made.classes() == {"tree": 0, "insect": 1}
    assert reasons(made) == {"class 'beast' is not in `classes`": 1}
    assert {one["label"] for one in by_file(made).values()} == {1}
