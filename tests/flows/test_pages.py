"""What Prefect's pages are given: addresses of reports, and text from data that does nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from flows import tasks
from flows.pages import page_address
from sanitize.compute import Compute
from sanitize.errors import ConfigError

HOSTILE = ["![x](http://a.b/c)", "<img src=http://a.b onerror=alert(1)>", "https://a.b", "a|b", "\n\n# a", "`", "c@d.e"]


@pytest.mark.parametrize(
    ("url", "root", "address"),
    [
        ("{here}/runs/a/90-report/index.html", "{here}", "https://r.example/x/runs/a/90-report/index.html"),
        ("runs/a b](http:/c/index.html", "{here}", "https://r.example/x/runs/a%20b%5D%28http%3A/c/index.html"),
        ("{here}/../elsewhere/index.html", "{here}", "{above}/elsewhere/index.html"),
        ("{here}-not/index.html", "{here}", "{here}-not/index.html"),
        ("s3://bucket/runs/a/index.html", "s3://bucket/runs", "https://r.example/x/a/index.html"),
        ("s3://bucket/runs/a/index.html", "{here}", "s3://bucket/runs/a/index.html"),
    ],
)
def test_a_report_below_the_root_has_an_address(
    url: str, root: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url, root, address = (text.format(here=tmp_path, above=tmp_path.parent) for text in (url, root, address))
    monkeypatch.setenv("SANITIZE_REPORT_ROOT", root)
    monkeypatch.setenv("SANITIZE_REPORT_BASE_URL", "https://r.example/x/")
    assert page_address(url) == address
    monkeypatch.delenv("SANITIZE_REPORT_BASE_URL")
    assert "r.example" not in page_address(url)


@pytest.mark.parametrize(
    "base",
    [
        "javascript:alert(1)",
        "file:///runs",
        "ftp://a/b",
        "r.example",
        "http://",
        "https://a.b/](c)",
        "http://a.b/?c",
        "//a.b",
    ],
)
def test_only_a_web_address_is_a_base(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANITIZE_REPORT_BASE_URL", base)
    with pytest.raises(ConfigError, match="SANITIZE_REPORT_BASE_URL"):
        page_address("runs/a/index.html")


@given(st.lists(st.one_of(st.text(max_size=20), st.sampled_from(HOSTILE)), min_size=1, max_size=4))
def test_a_table_holds_its_cells_and_nothing_else(cells: list[str]) -> None:
    table = tasks._table(["name"] * len(cells), [cells, cells])
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(table)
    assert sum(token.type == "td_open" for token in tokens) == 2 * len(cells)
    inner = {child.type for token in tokens for child in token.children or []}
    assert inner <= {"text", "code_inline"}
    assert not any(token.type.startswith(("html", "heading", "fence")) for token in tokens)


@pytest.mark.prefect
def test_artifacts_of_a_run_are_inert(
    prefect_server: str, compute: Compute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Prefect's server holds them."""
    from prefect import get_client

    out = tmp_path / "![x](http:a.b)"

    @tasks._flow("inert")
    def flow(config: str, out: str) -> dict[str, Any]:
        run = tasks.PrefectRun(out, compute, 1, None)  # type: ignore[arg-type]
        run.stages.append({"stage": HOSTILE[0], "samples": 1, "seconds": 0.5})
        for key in ("a", "b"):
            run.publish(f"inert-{key}", {"report": f"{out}/index.html"}, "")
            monkeypatch.setenv("SANITIZE_REPORT_BASE_URL", "https://r.example")
            monkeypatch.setenv("SANITIZE_REPORT_ROOT", str(tmp_path))
        return {}

    flow("", str(out))
    with get_client(sync_client=True) as client:
        answer = client._client.post(
            "/artifacts/latest/filter", json={"artifacts": {"key": {"like_": "inert-"}}}
        ).json()
    found = {one["key"]: one for one in answer}
    parse = MarkdownIt("commonmark", {"html": True}).enable("table").parse
    for name, artifact in found.items():
        tokens = [
            child
            for text in (artifact["data"], artifact["description"])
            for token in parse(text)
            for child in token.children or []
        ]
        links = [token.attrs["href"] for token in tokens if token.type == "link_open"]
        assert links == (
            ["https://r.example/%21%5Bx%5D%28http%3Aa.b%29/index.html"] if name == "inert-b-report" else []
        )
        assert not any(token.type in ("image", "html_inline") for token in tokens), json.dumps(artifact)
    assert found.keys() == {"inert-a-stages", "inert-a-report", "inert-b-stages", "inert-b-report"}
