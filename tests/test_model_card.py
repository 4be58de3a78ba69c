"""The card of a model package, which is written from what strangers may have written."""

from markdown_it import MarkdownIt

from sanitize import packaging
from sanitize.models.checkpoint import Checkpoint


def test_a_card_shows_what_strangers_wrote_in_a_package_and_does_nothing(checkpoint: Checkpoint) -> None:
    bad = "![x](http://a.b/c)|<img src=http://a.b onerror=c> https://a.b `\n\n# d"
    training = {"stage": bad, "numerics": {bad: bad}, "inputs": {bad: bad}}
    scope = {"threat": bad, "statement": bad, "not_covered": [bad, "changes of training data"]}
    certificate = {"scope": scope, "kind": bad, "source": bad, "radius_unit": bad, "parameters": {bad: bad}}
    counts = {"samples": 1, "abstained": 0, "certified_accuracy": [[0.0, 1.0], [0.5, 0.5]]}
    card = packaging._card(checkpoint.config, training, [certificate | counts], {bad: {bad: 0.5}})
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(card)
    inner = [child for token in tokens for child in token.children or []]
    assert {child.type for child in inner} <= {"text", "code_inline", "softbreak"}
    assert not any(token.type == "html_block" for token in tokens)
    assert "http" not in "".join(child.content for child in inner if child.type == "text")
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1", *["h2"] * 4, "h3"]
