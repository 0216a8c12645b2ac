"""Tiny models: the same bytes each time, and the probabilities they were made for."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.adapters.llamacpp.spec import TRIAL_MODEL
from sutazai.testing.tiny_gguf import BYTES, TRIAL_CORPUS, Tokenizer, write_bigram, write_random

if TYPE_CHECKING:
    from pathlib import Path

WORDS = Tokenizer("\n".join(TRIAL_CORPUS))
CORPUS = ("red green.", "red blue.", "red blue.", "red blue.")


def _chances(path: Path) -> dict[str, dict[str, float]]:
    """For each token what follows it, worked out from the weights as the network does."""
    reader = gguf.GGUFReader(path)
    field = reader.fields["tokenizer.ggml.tokens"]
    tokens = [bytes(field.parts[part]).decode() for part in field.data]
    tensors = {tensor.name: tensor.data.astype(np.float64) for tensor in reader.tensors}
    logits = tensors["token_embd.weight"] @ tensors["output.weight"].T * np.sqrt(tensors["output.weight"].shape[1])
    chances = np.exp(logits)
    return {token: dict(zip(tokens, chances[row], strict=True)) for row, token in enumerate(tokens)}


def test_the_trial_model_in_the_package_is_what_the_code_writes(tmp_path: Path) -> None:
    """Where it fails, `scripts/make_trial_model.py` was forgotten, or a library writes other bytes."""
    write_bigram(tmp_path / "again.gguf")

    assert (tmp_path / "again.gguf").read_bytes() == TRIAL_MODEL.read_bytes()


def test_the_trial_model_is_small_and_nearly_free_in_a_repository() -> None:
    model = TRIAL_MODEL.read_bytes()

    assert len(model) < 3_000_000
    assert len(zlib.compress(model)) < 50_000


def test_a_random_model_depends_on_its_arguments_alone(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        write_random(tmp_path / name, "random", layers=1, embd=64, heads=2, kv_heads=1, ffn=96, seed=seed)
    one, same, other = (tmp_path.joinpath(name).read_bytes() for name in ("one", "same", "other"))

    assert one == same
    assert one != other
    assert len(one) == len(other)


def test_a_bigram_model_has_the_frequencies_of_its_corpus(tmp_path: Path) -> None:
    write_bigram(tmp_path / "colours.gguf", CORPUS, "colours")

    after_red = _chances(tmp_path / "colours.gguf")["red"]

    assert after_red["Ġblue"] == pytest.approx(0.75, rel=0.01)
    assert after_red["Ġgreen"] == pytest.approx(0.25, rel=0.01)


def test_what_follows_a_token_sums_to_one(tmp_path: Path) -> None:
    write_bigram(tmp_path / "colours.gguf", CORPUS, "colours")

    sums = [sum(following.values()) for following in _chances(tmp_path / "colours.gguf").values()]

    assert sums == pytest.approx([1.0] * len(sums), rel=0.01)


def test_a_turn_begins_as_often_with_an_item_as_the_corpus_holds_it() -> None:
    first = [line.split()[0].strip("!") for line in TRIAL_CORPUS]

    at_start = _chances(TRIAL_MODEL)["Ċ"]

    assert at_start["Hello"] == pytest.approx(first.count("Hello") / len(first), rel=0.01)


def test_the_likeliest_words_of_the_trial_model_come_to_an_end() -> None:
    chances = _chances(TRIAL_MODEL)
    token, said = "Ċ", list[str]()
    while token != "<|im_end|>" and len(said) < 100:
        token = max(chances[token], key=chances[token].__getitem__)
        said.append(token)

    assert "".join(said).replace("Ġ", " ") == f"{TRIAL_CORPUS[0]}<|im_end|>"


@given(st.text())
def test_every_text_survives_the_tokenizer(text: str) -> None:
    spelled = "".join(WORDS.tokens[number] for number in WORDS.encode(text))

    assert bytes(BYTES.index(character) for character in spelled) == text.encode()


def test_each_word_of_the_corpus_is_one_token() -> None:
    assert [len(WORDS.encode(f" {word}")) for word in ("tiny", "trial", "model")] == [1, 1, 1]
