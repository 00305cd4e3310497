"""Caption cleaning; the golden tests hold the reference's pairs."""

from __future__ import annotations

import pytest

from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.encoders.text_cleaning import POLICIES, clean_prompt, clean_text, lost_most


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


@pytest.mark.parametrize("prompt", ["一只猫坐在沙发上。", "一只狗在跑", "猫、犬", "#12", "http://x.com"])
def test_a_prompt_that_cleaning_empties_is_refused(prompt: str) -> None:
    with pytest.raises(ConfigError, match="the negative prompt .* is empty after text cleaning full"):
        clean_prompt(prompt, "full", "negative prompt")
    assert clean_prompt(prompt, "light") == prompt


@pytest.mark.parametrize("prompt", ["", " ", "a dog", "1 2 3", "Собака бежит", "고양이", "!?", "\N{CAT FACE}", "à"])
def test_a_prompt_that_says_something_or_nothing_is_taken(prompt: str, caplog: pytest.LogCaptureFixture) -> None:
    assert clean_prompt(prompt, "full") == clean_text(prompt, "full")
    assert caplog.records == []


def test_two_prompts_that_cleaning_makes_equal_are_not_so_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    assert clean_prompt("一只猫坐在沙发上 hd", "full") == clean_prompt("一只狗在跑 hd", "full")
    assert [record.getMessage() for record in caplog.records] == [
        "of the prompt '一只猫坐在沙发上 hd', text cleaning full leaves 'hd'",
        "of the prompt '一只狗在跑 hd', text cleaning full leaves 'hd'",
    ]


@pytest.mark.parametrize(("text", "cleaned", "lost"), [
    ("猫猫猫 ab", "ab", True), ("猫猫 ab", "ab", False), ("123", "", False), ("", "", False), ("Ab", "ab", False),
])
def test_half_of_the_letters(text: str, cleaned: str, lost: bool) -> None:
    assert lost_most(text, cleaned) is lost
