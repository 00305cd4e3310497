"""Caption cleaning; the golden tests hold the reference's pairs."""

from __future__ import annotations

import pytest

from megatron_flashi2v.encoders.text_cleaning import POLICIES, clean_text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("See www.example.org/page and http://x.com NOW", "see and now"),
        ("a&lt;b&gt; &quot;hi&quot; <i>there</i>", 'a "hi" there'),
        ("A+dog%20runs", "a dog runs"),
        ("photo_of_a_red_car.png beside it", "beside it"),
        ("one_two_three_four_five", "one two three four five"),
        ("size 640x480 and 2×3", "size and"),
        ("the \u2018single\u2019 \u2013 \u00abdouble\u00bb one", "the 'single' - \"double\" one"),
        ("#12 #123456 ***wow***", "wow"),
        ("a dog, worldwide free shipping", "a dog"),
    ],
)
def test_full(text: str, wanted: str) -> None:
    assert clean_text(text, "full") == wanted


def test_light_keeps_case_and_words() -> None:
    assert clean_text("  A Dog &amp;amp; a cat \n\t at http://x.com  ", "light") == "A Dog & a cat at http://x.com"
    assert clean_text("caf\u00c3\u00a9", "light") == "caf\u00e9"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("text", ["", " ", "<![x", "<", "&#xD800;", "\ud800", "\x00", "<" * 500, "%", "&" * 50])
def test_odd_text_does_not_raise(policy, text: str) -> None:
    assert isinstance(clean_text(text, policy), str)


def test_unknown_policy() -> None:
    with pytest.raises(ValueError, match="half"):
        clean_text("x", "half")  # type: ignore[arg-type]
