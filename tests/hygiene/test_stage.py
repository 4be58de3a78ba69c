import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from pydantic import ValidationError

from sanitize.artifacts import verify
from sanitize.compute import Compute
from sanitize.data.dataset import Dataset
from sanitize.data.image_facts import FACTS_VERSION, ImageFacts
from sanitize.data.index import IndexConfig, index_shards
from sanitize.data.stated_hashes import NO_HASH, NO_ROW, SEVERAL_ROWS
from sanitize.data.tables import Hygiene
from sanitize.errors import ConfigError
from sanitize.hygiene import HygieneConfig, check_hygiene
from sanitize.report import write_leak_report
from sanitize.select.hygiene import Unclean

Scene, Stored, Make = Callable[..., Image.Image], Callable[..., bytes], Callable[..., str]
COMPUTE = Compute(device="cpu")
FACTS = IndexConfig(image_facts=True, n_classes=5)


def sample(key: str, image: bytes, label: int = 0, suffix: str = "png") -> list[tuple[str, bytes]]:
    return [(f"{key}.{suffix}", image), (f"{key}.cls", b"%d" % label)]


def checked(shards: str, out: Path, index: IndexConfig = FACTS, config: HygieneConfig | None = None) -> Hygiene:
    dataset = index_shards(index, shards, str(out / "index"), COMPUTE)
    return check_hygiene(config or HygieneConfig(), dataset, str(out / "hygiene"), COMPUTE)


def found(hygiene: Hygiene) -> dict[str, set[str]]:
    """Kind -> keys."""
    kinds: dict[str, set[str]] = {}
    for shard in hygiene.shards:
        for row in hygiene.rows(shard).to_pylist():
            kinds.setdefault(row["kind"], set()).add(row["key"])
    return kinds


def torn(image: Image.Image) -> Image.Image:
    pixels = np.array(image)
    pixels[len(pixels) * 2 // 3 :] = 128
    return Image.fromarray(pixels)


def test_each_kind_is_found_and_nothing_else(tmp_path: Path, scene: Scene, stored: Stored, make_tar: Make) -> None:
    base = [scene(seed) for seed in range(40)]
    black = scene(100).point(lambda value: value // 6)
    white = Image.new("RGB", (64, 48), (255, 255, 255))
    white.paste((0, 0, 0), (10, 10, 18, 16))
    few = Image.fromarray(np.where(np.arange(48)[:, None, None] < 3, 40, np.zeros((48, 64, 3))).astype(np.uint8) + 100)
    odd = {
        "dark": stored(black),
        "bright": stored(white),
        "blank": stored(Image.new("RGB", (64, 48), (90, 120, 60))),
        "blurred": stored(scene(101).filter(ImageFilter.GaussianBlur(3))),
        "low_entropy": stored(few),
        "odd_aspect": stored(scene(102, (20, 90))),
        "odd_size": stored(scene(103, (400, 500))),
        "grey": stored(scene(104).convert("L")),
        "torn": stored(torn(scene(105)), "JPEG", quality=85),
    }
    members = [m for i, image in enumerate(base) for m in sample(f"base{i:02d}", stored(image), i % 5)]
    members += [m for kind, data in odd.items() for m in sample(kind, data, 1, "jpg" if kind == "torn" else "png")]
    members += sample("copy", stored(base[3]), 3) + sample("again", stored(base[4], "JPEG", quality=80), 1, "jpg")
    kinds = found(checked(make_tar(tmp_path / "a.tar", members), tmp_path))
    for kind in odd:
        assert kind in kinds.pop(kind), kind
    assert kinds == {"exact_duplicate": {"copy"}, "near_duplicate": {"again"}, "label_conflict": {"base04", "again"}}


def test_a_burst_and_its_group(tmp_path: Path, scene: Scene, stored: Stored, make_tar: Make) -> None:
    members = [m for i in range(60) for m in sample(f"base{i:02d}", stored(scene(i)), i % 5)]
    for i in range(20):
        members += sample(f"copy{i:02d}", stored(scene(7), "JPEG", quality=60 + i), 2, "jpg")
        members += sample(f"same{i:02d}", stored(scene(7)), 2)
    hygiene = checked(make_tar(tmp_path / "a.tar", members), tmp_path)
    info = hygiene.read_json("hygiene.json")
    assert info["bursts"] == 1
    assert info["groups"][0]["n"] == 41
    assert info["groups"][0]["n_files"] == 21
    assert info["groups"][0]["labels"] == {"2": 41}
    assert info["counts"]["exact_duplicate"] == 20
    assert info["counts"]["near_duplicate"] == 20
    assert "burst of 41 copies" in hygiene.rows("a.tar")["reason"][0].as_py()
    assert verify(hygiene.path) == []


def test_reasons_name_the_other_sample(tmp_path: Path, scene: Scene, stored: Stored, make_tar: Make) -> None:
    odd, long = "Blüte 1", "x" * 90 + "/" + "y" * 60
    for shard, keys in (("a", ["first", odd, long]), ("b", ["copy", "copy-odd", "copy-long"])):
        members = [m for i, key in enumerate(keys) for m in sample(key, stored(scene(i)), i)]
        members += [m for i in range(30) for m in sample(f"{shard}{i}", stored(scene(100 + i + 50 * (shard == "b"))))]
        make_tar(tmp_path / f"{shard}.tar", members)
    hygiene = checked(str(tmp_path / "*.tar"), tmp_path)
    reasons = {
        row["key"]: row["reason"] for row in hygiene.rows("b.tar").to_pylist() if row["kind"] == "exact_duplicate"
    }
    assert reasons["copy"] == "the same file as first in a.tar"
    assert reasons["copy-odd"] == f"the same file as {odd} in a.tar"
    assert reasons["copy-long"] == f"the same file as {long[:128]}… in a.tar"


def test_pictures_of_the_test_shards(tmp_path: Path, scene: Scene, stored: Stored, make_tar: Make) -> None:
    train = [m for i in range(30) for m in sample(f"train{i:02d}", stored(scene(i)), i % 5)]
    test = [m for i in range(28, 40) for m in sample(f"test{i:02d}", stored(scene(i), "JPEG", quality=70), 0, "jpg")]
    test += sample("same", stored(scene(5)))
    datasets = [
        index_shards(FACTS, make_tar(tmp_path / f"{name}.tar", members), str(tmp_path / name), COMPUTE)
        for name, members in (("train", train), ("test", test))
    ]
    hygiene = check_hygiene(HygieneConfig(), datasets[0], str(tmp_path / "out"), COMPUTE, test=datasets[1])
    assert found(hygiene)["test_leak"] == {"train05", "train28", "train29"}
    rows = [row for row in hygiene.rows("train.tar").to_pylist() if row["kind"] == "test_leak"]
    assert {row["other_shard"] for row in rows} == {"test.tar"}
    assert "near_duplicate" not in found(hygiene)  # a leak is no duplicate among the training samples

    report = write_leak_report(hygiene, *datasets, str(tmp_path / "page"), COMPUTE)
    pairs = report.read_json("report.json")["pairs"]
    assert [(pair["key"], pair["shard"], pair["other_shard"]) for pair in pairs] == [
        (key, "train.tar", "test.tar") for key in ("train05", "train28", "train29")
    ]
    page = report.read("index.html").decode()
    assert page.count('<img src="data:image/png;base64,') == 6
    assert "3 training samples of 30 show a picture that is also in the test shards." in page
    assert "the same file as same in test.tar, a test sample" in page


@given(order=st.permutations(range(4)), first=st.integers(0, 3))
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_findings_do_not_depend_on_the_order_of_shards_and_workers(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], first: int, scene: Scene, stored: Stored, make_tar: Make
) -> None:
    folder = tmp_path_factory.mktemp("order")
    paths = []
    for s in range(4):
        members = [m for i in range(8) for m in sample(f"s{s}-{i}", stored(scene((3 * s + i) % 20)), i % 5)]
        paths.append(make_tar(folder / f"{s}.tar", members))
    digests = set()
    for name, places, only in (("a", paths, None), ("b", [paths[i] for i in order], [f"{first}.tar"])):
        out = str(folder / name)
        if only:
            index_shards(FACTS, places, out, COMPUTE, shards=only)
        dataset = index_shards(FACTS, places, out, COMPUTE)
        digests.add(check_hygiene(HygieneConfig(), dataset, f"{out}-hygiene", COMPUTE).digest)
    assert len(digests) == 1


def test_an_interrupted_stage_goes_on(
    tmp_path: Path, scene: Scene, stored: Stored, make_tar: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sanitize.hygiene import stage

    for s in range(3):
        make_tar(tmp_path / "in" / f"{s}.tar", [m for i in range(5) for m in sample(f"{s}{i}", stored(scene(i)), i)])
    dataset = index_shards(FACTS, str(tmp_path / "in"), str(tmp_path / "index"), COMPUTE)
    whole = check_hygiene(HygieneConfig(), dataset, str(tmp_path / "whole"), COMPUTE)
    real, seen = stage._findings, []

    def dies(config: HygieneConfig, dataset: Dataset, found: object, shard: str) -> list:
        seen.append(shard)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(config, dataset, found, shard)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "_findings", dies)
    with pytest.raises(KeyboardInterrupt):
        check_hygiene(HygieneConfig(), dataset, str(tmp_path / "out"), COMPUTE)
    assert check_hygiene(HygieneConfig(), dataset, str(tmp_path / "out"), COMPUTE).digest == whole.digest
    assert seen == ["0.tar", "1.tar", "1.tar", "2.tar"]


@pytest.mark.parametrize(("check", "kinds"), [("digest", {"exact_duplicate"}), ("headers", set())])
def test_without_decoding_only_equal_files_are_found(
    tmp_path: Path, scene: Scene, stored: Stored, make_tar: Make, check: str, kinds: set[str]
) -> None:
    members = [m for i in range(6) for m in sample(f"k{i}", stored(scene(i % 3)), 1)]
    index = FACTS.model_copy(update={"check": check})
    hygiene = checked(make_tar(tmp_path / "a.tar", members), tmp_path, index)
    assert set(found(hygiene)) == kinds
    assert hygiene.read_json("hygiene.json")["checked"] == {"digest": "digests", "headers": "nothing"}[check]


@pytest.mark.parametrize("kind", ["md5", "sha1", "sha256", "sha512"])
def test_an_image_that_the_metadata_do_not_name_is_a_finding_and_stays_usable(
    tmp_path: Path, scene: Scene, stored: Stored, make_tar: Make, kind: str
) -> None:
    members = []
    for i in range(6):
        data = stored(scene(i))
        digest = hashlib.new(kind, data if i != 2 else b"the picture that was there").hexdigest()
        record = {"class": i % 3, "hash": digest.upper() if i == 3 else digest}
        members += [(f"k{i}.png", data), (f"k{i}.json", json.dumps(record).encode())]
    index = IndexConfig(image_facts=True, label="json:class", verify="json:hash")
    hygiene = checked(make_tar(tmp_path / "a.tar", members), tmp_path, index)
    assert found(hygiene) == {"wrong_hash": {"k2"}}
    assert Dataset.load(str(tmp_path / "index")).n_samples == 6


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_hashes_may_be_in_a_table_that_names_every_sample(
    tmp_path: Path, scene: Scene, stored: Stored, make_tar: Make, suffix: str
) -> None:
    images = [stored(scene(i)) for i in range(6)]
    shards = make_tar(tmp_path / "a.tar", [m for i, data in enumerate(images) for m in sample(f"d/k{i}", data)])
    rows = [(f"d/k{i}", hashlib.sha256(data).hexdigest()) for i, data in enumerate(images[:4])]
    rows[1] = "d/k1", hashlib.md5(b"the picture that was there").hexdigest()
    rows += [("d/k3", rows[3][1]), ("d/k4", "unknown")]
    table = tmp_path / f"hashes.{suffix}"

    def write(rows: list[tuple[str, str]]) -> None:
        if suffix == "csv":
            table.write_text("key,sha\n" + "".join(f"{key},{value}\n" for key, value in rows))
        else:
            pq.write_table(pa.table({"key": [k for k, _ in rows], "sha": [v for _, v in rows]}), table)

    write(rows)
    index = IndexConfig(image_facts=True, verify=f"table:{table}#sha")
    hygiene = checked(shards, tmp_path, index)
    listed = {row["key"]: row["reason"] for row in hygiene.rows("a.tar").to_pylist() if row["kind"] == "wrong_hash"}
    assert listed == {
        "d/k1": f"the hash {rows[1][1][:16]}… is stated, of another image",
        "d/k3": SEVERAL_ROWS,
        "d/k4": NO_HASH,
        "d/k5": NO_ROW,
    }
    dataset = Dataset.load(str(tmp_path / "index"))
    assert dataset.n_samples == 6
    write([*rows, ("other", "f" * 64)])
    again = index_shards(index, shards, str(tmp_path / "again"), COMPUTE)
    assert again.manifest().recipe.inputs["hash table"] != dataset.manifest().recipe.inputs["hash table"]


@pytest.mark.hostile
@pytest.mark.parametrize(
    "stated",
    [
        "",
        "zz" * 32,
        "a" * 10**5,
        7,
        None,
        ["a" * 64],
        {"a": 1},
        "ａ" * 64,
        "٣" * 64,
        "\u0000" * 64,
        "-" + "a" * 63,
        " " * 64,
    ],
)
def test_hashes_that_are_none_are_no_finding(
    tmp_path: Path, scene: Scene, stored: Stored, make_tar: Make, stated: object
) -> None:
    members = [("a.png", stored(scene(0))), ("a.cls", b"0"), ("a.json", json.dumps({"hash": stated}).encode())]
    members += [("b.png", stored(scene(1))), ("b.cls", b"0"), ("b.json", b"[" * 100_000)]
    members += [("c.png", stored(scene(2))), ("c.cls", b"0")]
    index = IndexConfig(image_facts=True, verify="json:hash")
    hygiene = checked(make_tar(tmp_path / "a.tar", members), tmp_path, index)
    assert found(hygiene) == {}
    assert Dataset.load(str(tmp_path / "index")).n_samples == 3


def test_verify_needs_the_images() -> None:
    with pytest.raises((ConfigError, ValidationError), match="verify"):
        IndexConfig(check="headers", verify="json:sha256")
    with pytest.raises((ConfigError, ValidationError), match="names no column"):
        IndexConfig(verify="table:hashes.csv")


def test_an_index_without_facts_has_the_recipe_it_had() -> None:
    assert "image_facts" not in IndexConfig().recipe()
    assert "verify" not in IndexConfig().recipe()
    assert FACTS.recipe()["image_facts"] == FACTS_VERSION


@given(
    st.lists(st.tuples(st.integers(1, 80), st.integers(1, 80)), min_size=1, max_size=12),
    st.sampled_from([1, 3]),
    st.integers(0, 9),
)
@settings(max_examples=25)
def test_facts_do_not_depend_on_the_images_beside(sizes: list[tuple[int, int]], channels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, (*size, channels), dtype=np.uint8) for size in sizes]
    together = ImageFacts()
    for i, pixels_HWC in enumerate(images):
        together.add(i, pixels_HWC)
    alone = []
    for i, pixels_HWC in enumerate(images):
        facts = ImageFacts()
        facts.add(i, pixels_HWC)
        alone.append(facts.table())
    assert together.table().equals(pa.concat_tables(alone).combine_chunks())


@pytest.mark.hostile
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 3), (7, 7), (3000, 2)])
def test_odd_shapes_have_facts(size: tuple[int, int], tmp_path: Path, make_tar: Make, stored: Stored) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    hygiene = checked(make_tar(tmp_path / "a.tar", sample("a", stored(Image.fromarray(pixels)))), tmp_path)
    assert hygiene.read_json("hygiene.json")["samples"] == 1
    table = pq.read_table(tmp_path / "index" / "facts" / "a.tar.parquet")
    assert table["hash"].null_count == 0


def test_all_one_picture(tmp_path: Path, make_tar: Make, stored: Stored, scene: Scene) -> None:
    members = [m for i in range(30) for m in sample(f"k{i:02d}", stored(scene(0)), i % 5)]
    counts = checked(make_tar(tmp_path / "a.tar", members), tmp_path).read_json("hygiene.json")["counts"]
    assert {kind: n for kind, n in counts.items() if n} == {"exact_duplicate": 29, "label_conflict": 30}


def test_unreadable_samples_are_left_out(tmp_path: Path, make_tar: Make, stored: Stored, scene: Scene) -> None:
    members = (
        sample("a", stored(scene(0))) + sample("b", b"no image") + sample("c", stored(scene(0))) + sample("d", b"")
    )
    index = FACTS.model_copy(update={"max_bad_fraction": 1.0})
    hygiene = checked(make_tar(tmp_path / "a.tar", members), tmp_path, index)
    assert found(hygiene) == {"exact_duplicate": {"c"}}
    assert Counter(hygiene.rows("a.tar")["position"].to_pylist()) == {2: 1}


def test_a_real_torn_jpeg(tmp_path: Path, make_tar: Make, stored: Stored, scene: Scene) -> None:
    from PIL import ImageFile

    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        cut = []
        for seed in range(6):
            data = stored(scene(seed, (96, 96)), "JPEG", quality=90)
            cut.append(stored(Image.open(io.BytesIO(data[: len(data) // 2])).convert("RGB"), "JPEG", quality=85))
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    members = [m for i, data in enumerate(cut) for m in sample(f"cut{i}", data, 0, "jpg")]
    members += [
        m for i in range(20, 50) for m in sample(f"k{i}", stored(scene(i, (96, 96)), "JPEG", quality=90), 0, "jpg")
    ]
    assert found(checked(make_tar(tmp_path / "a.tar", members), tmp_path)) == {"torn": {f"cut{i}" for i in range(6)}}


def test_chosen_kinds_go_to_quarantine_and_the_first_copy_stays(
    tmp_path: Path, make_tar: Make, stored: Stored, scene: Scene
) -> None:
    members = sample("bad", b"no image") + [m for i in range(6) for m in sample(f"k{i}", stored(scene(i % 4)), i % 5)]
    index = FACTS.model_copy(update={"max_bad_fraction": 1.0})
    hygiene = checked(make_tar(tmp_path / "a.tar", members), tmp_path, index)
    unclean = Unclean(Dataset.load(str(tmp_path / "index")), hygiene, {"exact_duplicate"})
    assert unclean.mask({"a.tar": slice(0, 6)}).tolist() == [False] * 4 + [True] * 2
    assert unclean.reasons("a.tar")[5][0]["stage"] == "hygiene"
    assert not unclean._replace(kinds=frozenset()).mask({"a.tar": slice(0, 6)}).any()
