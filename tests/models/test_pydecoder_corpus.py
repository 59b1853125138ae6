"""The split keeps held-out text out of training, and depends on paths and contents alone."""

from kvpass.models.pydecoder_corpus import LONG_PARAGRAPH, Corpus, paragraphs, split


def page(name: str, count: int = 6) -> str:
    """A text of `count` paragraphs that stand in no other page."""
    return "\n\n".join(f"def {name}_{i}(first, second):\n    return first * second + {i}" for i in range(count)) + "\n"


def library() -> dict[str, str]:
    return {f"folder/{i:03}.py": page(f"function{i}") for i in range(200)}


def test_paragraphs_joined_are_the_text() -> None:
    for text in ("", "a", "\n\n\n", "a\n\nb\n  \n\nc\n", page("f")):
        assert "".join(paragraphs(text)) == text


def test_every_file_is_on_one_side() -> None:
    corpus = split(library())
    assert 0 < len(corpus.held_out) < 30
    assert sorted(corpus.train + corpus.held_out) == sorted(library().values())


def test_the_split_does_not_depend_on_the_order_of_the_files() -> None:
    texts = library()
    assert split(texts) == split(dict(reversed(texts.items())))


def test_a_near_copy_of_another_file_is_not_held_out() -> None:
    texts = library()
    path = next(path for path, text in texts.items() if text in split(texts).held_out)
    texts["zzz/copy.py"] = texts[path] + "# and one line more\n"
    corpus = split(texts)
    assert {texts[path], texts["zzz/copy.py"]} <= set(corpus.train)


def test_a_held_out_paragraph_is_cut_from_training() -> None:
    texts = library()
    secret = paragraphs(split(texts).held_out[0])[2]
    assert len(secret.strip()) >= LONG_PARAGRAPH
    texts["zzz/quotes_one_paragraph.py"] = page("another", 4) + "\n" + secret.strip() + "\n"
    corpus: Corpus = split(texts)
    assert any(secret.strip() in text for text in corpus.held_out)
    assert not any(secret.strip() in text for text in corpus.train)
