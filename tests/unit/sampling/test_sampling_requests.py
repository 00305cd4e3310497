"""Files of requests: what is read, and one message for each way to be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_flashi2v.config.errors import ConfigError, DataError
from megatron_flashi2v.sampling.requests import Request, plan_jobs, read_requests


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a picture of each of two names, one beside the requests and one in the working directory."""
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "cat.png").write_bytes(b"a")
    (tmp_path / "dog.png").write_bytes(b"b")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "beside"


def read(folder: Path, text: str, name: str = "requests.jsonl") -> list[Request]:
    (folder / name).write_text(text, encoding="utf-8")
    return read_requests(folder / name)


def test_json_lines_and_csv_say_the_same(folder: Path) -> None:
    lines = """\
{"id": "a", "image": "cat.png", "prompt": "runs, jumps", "seeds": [1, -2], "negative_prompt": "rain", "height": 32}

{"id": 7, "image": "dog.png", "prompt": "", "seeds": 3, "negative_prompt": null}
"""
    table = """\
id,image,prompt,seeds,negative_prompt,height
a,cat.png,"runs, jumps",1 -2,rain,32

7,dog.png,,3,,
"""
    found = read(folder, lines)
    first, second = found
    assert (first.id, first.prompt, first.seeds, first.negative_prompt, first.height, first.width) == (
        "a", "runs, jumps", (1, -2), "rain", 32, None,
    )
    assert first.image is not None and first.image.read_bytes() == b"a"
    assert second.image is not None and second.image.read_bytes() == b"b"  # from the working directory
    assert (second.id, second.seeds, second.negative_prompt, second.line) == ("7", (3,), None, 3)
    (folder / "r.csv").write_text(table.replace("7,dog.png,,", '7,dog.png," ",'), encoding="utf-8-sig")
    csv_first, csv_second = read_requests(folder / "r.csv")
    assert csv_first == Request(**{**vars(first), "line": 2})
    assert csv_second == Request(**{**vars(second), "line": 4, "prompt": " "})


@pytest.mark.parametrize("mark", [";", "\t"])
def test_spreadsheets_divide_columns_by_other_marks_too(folder: Path, mark: str) -> None:
    (request,) = read(folder, f'"id"{mark}prompt{mark}image\na{mark}runs, jumps{mark}cat.png\n', "r.csv")
    assert (request.id, request.prompt) == ("a", "runs, jumps")


def test_what_cannot_be_encoded_gets_a_mark(folder: Path) -> None:
    (request,) = read(folder, r'{"id": "a\ud83d", "prompt": "b\udce9", "negative_prompt": "\udfff"}')
    assert (request.id, request.prompt, request.negative_prompt) == ("a\ufffd", "b\ufffd", "\ufffd")


def test_a_signed_address_is_not_told(folder: Path) -> None:
    """Shortened in its middle it would end in the key, without the mark of one."""
    for image in ("https://host/x.png?X-Amz-Signature=SECRET", f"https://me:{'SECRET' * 20}@host/x.png"):
        with pytest.raises(DataError) as error:
            read(folder, json.dumps({"id": "a", "prompt": "b", "image": image}))
        assert "https://host/x.png" in str(error.value) and "SECRET" not in str(error.value)


def test_the_empty_negative_prompt_differs_from_none(folder: Path) -> None:
    (request,) = read(folder, '{"id": "a", "prompt": "x", "negative_prompt": ""}')
    assert request.negative_prompt == "" and request.image is None


def test_a_negative_prompt_may_lie_in_a_file(folder: Path) -> None:
    """As of the flag; the file is looked up as an image is."""
    (folder / "worst.txt").write_text("Blurred, grey\n", encoding="utf-8")
    (folder.parent / "bad.txt").write_text("rain", encoding="utf-8")
    found = read(folder, """\
{"id": "a", "prompt": "@worst.txt", "negative_prompt": "@worst.txt"}
{"id": "b", "prompt": "a", "negative_prompt": "@bad.txt"}
""")
    assert [request.negative_prompt for request in found] == ["Blurred, grey", "rain"]
    assert found[0].prompt == "@worst.txt"


GOOD = '{"id": "a", "image": "cat.png", "prompt": "x"}\n'


@pytest.mark.parametrize(("text", "said"), [
    ("", "holds no request"),
    (GOOD + '{"id": "b", "prompt"', "line 2 is '{\"id\": \"b\", \"prompt\"'; it must be a JSON object"),
    ("[1]", "line 1 is '[1]'; it must be a JSON object"),
    (GOOD + GOOD, "line 2: id 'a' is that of line 1 too"),
    ('{"id": "1", "prompt": "x"}\n{"id": 1, "prompt": "x"}', "line 2: id '1' is that of line 1 too"),
    ('{"prompt": "x"}', "line 1: id is None"),
    ('{"id": true, "prompt": "x"}', "line 1: id is True"),
    ('{"id": "a"}', "line 1: prompt is missing"),
    ('{"id": "a", "prompt": 3}', "line 1: prompt is 3"),
    ('{"id": "a", "prompt": "x", "image": "mouse.png"}', "line 1: image 'mouse.png': no such file"),
    ('{"id": "a", "prompt": "x", "image": "."}', "line 1: image '.': no such file"),
    ('{"id": "a", "prompt": "x", "image": 1}', "line 1: image is 1"),
    ('{"id": "a", "prompt": "x", "negative_prompt": "@a.txt"}', "line 1: negative_prompt '@a.txt': no such file"),
    ('{"id": "a", "prompt": "x", "seed": 1}', "line 1: unknown field 'seed'; did you mean seeds?"),
    ('{"id": "a", "prompt": "x", "seeds": []}', "line 1: seeds is []"),
    ('{"id": "a", "prompt": "x", "seeds": [1.5]}', "line 1: seeds is [1.5]"),
    ('{"id": "a", "prompt": "x", "seeds": [3, 3]}', "line 1: seeds is [3, 3]; it must name each seed once"),
    ('{"id": "a", "prompt": "x", "seeds": "one"}', "line 1: seeds is 'one'"),
    ('{"id": "a", "prompt": "x", "height": 0}', "line 1: height is 0; it must be a whole number, at least 1"),
    ('{"id": "a", "prompt": "x", "width": "wide"}', "line 1: width is 'wide'"),
])  # fmt: skip
def test_bad_json_line(folder: Path, text: str, said: str) -> None:
    with pytest.raises(DataError) as error:
        read(folder, text)
    assert said in str(error.value) and "requests.jsonl: " in str(error.value)


@pytest.mark.parametrize(("text", "said"), [
    ("", "holds no request"),
    ("id,prompt\n", "holds no request"),
    ("id,image\na,cat.png\n", "the header is id,image; it must name the columns id and prompt"),
    ("id,prompt,id\na,x,b\n", "the header names the column 'id' twice"),
    ("id,prompt\na,runs, jumps\n", "line 2 has 3 cells for the header's 2; quote a cell"),
    ('id,prompt\na,"x\n', "line 2 is no CSV"),
    ("id,prompt,sedes\na,x,1\n", "line 2: unknown field 'sedes'; did you mean seeds?"),
    ("id,prompt\na,\n", "line 2: prompt is missing"),
])  # fmt: skip
def test_bad_csv_line(folder: Path, text: str, said: str) -> None:
    with pytest.raises(DataError) as error:
        read(folder, text, "requests.csv")
    assert said in str(error.value) and "requests.csv: " in str(error.value)


def test_file_that_cannot_be_read(folder: Path) -> None:
    with pytest.raises(DataError, match="--requests absent.csv: cannot be read"):
        read_requests(Path("absent.csv"))
    (folder / "latin.jsonl").write_bytes(b'{"id": "\xe9"}')
    with pytest.raises(DataError, match="not UTF-8"):
        read_requests(folder / "latin.jsonl")


def names(template: str, *requests: Request, seed: int = 0) -> list[str]:
    return [job.name for job in plan_jobs(requests, template, seed)]


def test_names_and_seeds() -> None:
    several, one = Request(id="a.b", prompt="", seeds=(3, 4)), Request(id="c", prompt="")
    assert names("{id}-{seed}", several, one, seed=9) == ["a.b-3", "a.b-4", "c-9"]
    assert names("{seed:03d}/{id}", several) == ["003/a.b", "004/a.b"]


@pytest.mark.parametrize(("template", "identity", "said"), [
    ("{id}", "a", "two videos the name 'a': id 'a' with seed 1, and id 'a' with seed 2"),
    ("video", "a", "two videos the name 'video'"),
    ("../{id}-{seed}", "a", "which is no file's name in the folder"),
    ("/tmp/{id}-{seed}", "a", "which is no file's name in the folder"),
    ("{id}/{seed}", "..", "which is no file's name in the folder"),
    ("{id}{seed}/", "a", "which is no file's name in the folder"),
    ("{id}-{seed}", "a\nb", "which is no file's name in the folder"),
    ("{id}-{seed}", "\0", "which is no file's name in the folder"),
    ("{id}-{seed}", "é" * 100, "which is longer than 200 bytes"),
    ("{prompt}-{seed}", "a", "{prompt} is not filled in; there are {id} and {seed}"),
    ("{id.__class__}-{seed}", "a", "is not filled in"),
    ("{}-{seed}", "a", "is not filled in"),
    ("{id:{seed}}-{seed}", "a", "is not filled in"),
    ("{id", "a", "write {id} and {seed} with both braces"),
    ("{id:d}-{seed}", "a", "leave the format out"),
])  # fmt: skip
def test_bad_name(template: str, identity: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        names(template, Request(id=identity, prompt="", seeds=(1, 2)))
    assert said in str(error.value) and f"--name {template}" in str(error.value)


def test_names_of_two_requests_may_meet() -> None:
    with pytest.raises(ConfigError, match="id 'a' with seed 11, and id 'a1' with seed 1"):
        names("{id}{seed}", Request(id="a", prompt="", seeds=(11,)), Request(id="a1", prompt="", seeds=(1,)))
