"""The English passages shipped with the toolkit: enough of them, plain text, no two alike, and
nothing in them that a retrieval task could take for a needle."""

import re
from collections import Counter, defaultdict
from importlib import resources

import pytest

KINDS = ("essay", "story", "dialogue", "instructions")
NEEDLE_LIKE = (r"secret", r"password", r"\bcode of\b", r"\bwhat(?: is|'s) the [^.!?]* of [^.!?]*\?")

FOLDER = resources.files("interp.inputs") / "english"
PASSAGES = {
    path.name: path.read_bytes()
    for path in sorted(FOLDER.iterdir(), key=lambda path: path.name)
    if path.name.endswith(".txt")
}


def lower_words(passage: bytes) -> list[str]:
    """Words in lower case, punctuation and line breaks gone."""
    return re.findall(r"[a-z0-9']+", passage.decode("ascii").lower())


def runs(words: list[str], length: int) -> list[tuple[str, ...]]:
    """Every run of ``length`` neighbouring words, in order."""
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]


def kind_of(name: str) -> str:
    return name.split("-", 1)[0]


def test_there_are_enough_words_of_each_kind():
    counts = dict.fromkeys(KINDS, 0)
    for name, passage in PASSAGES.items():
        counts[kind_of(name)] += len(passage.split())
    assert len(PASSAGES) >= 46
    assert sum(counts.values()) >= 10_000
    assert min(counts.values()) >= 2_000, counts


def test_the_folder_holds_passages_alone():
    assert {path.name for path in FOLDER.iterdir()} == set(PASSAGES)


@pytest.mark.parametrize("name", PASSAGES)
def test_a_passage_is_plain_ascii_paragraphs(name):
    assert re.fullmatch(rf"(?:{'|'.join(KINDS)})-[a-z]+\.txt", name)
    text = PASSAGES[name].decode("ascii")  # ASCII is UTF-8 too
    assert text.endswith("\n") and not text.endswith("\n\n")
    assert "\r" not in text and "\t" not in text and "  " not in text
    assert 150 <= len(text.split()) <= 400
    for paragraph in text[:-1].split("\n\n"):
        assert "\n" not in paragraph, "one paragraph, one line"
        assert paragraph == paragraph.strip() and paragraph
        assert re.search(r"[.!?][\"')]*$", paragraph), paragraph[-40:]


@pytest.mark.parametrize("name", PASSAGES)
def test_no_passage_looks_like_a_needle(name):
    text = " ".join(PASSAGES[name].decode("ascii").lower().split())
    found = [pattern for pattern in NEEDLE_LIKE if re.search(pattern, text)]
    assert not found


@pytest.mark.parametrize("name", PASSAGES)
def test_no_passage_repeats_itself(name):
    counts = Counter(runs(lower_words(PASSAGES[name]), 12))
    assert max(counts.values()) == 1


def test_no_two_passages_share_a_run_of_eight_words():
    holders = defaultdict(set)
    for name, passage in PASSAGES.items():
        for run in runs(lower_words(passage), 8):
            holders[run].add(name)
    assert not {run: names for run, names in holders.items() if len(names) > 1}


def test_no_two_passages_begin_alike():
    openings = Counter(tuple(lower_words(passage)[:5]) for passage in PASSAGES.values())
    assert not [opening for opening, count in openings.items() if count > 1]
