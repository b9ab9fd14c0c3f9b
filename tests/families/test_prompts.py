"""Weights of words and captions longer than a window: what they change, and what they leave as it was."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import CLIPTokenizer

from loratune.cli.main import main
from loratune.data.encode import Encoder
from loratune.errors import UserError
from loratune.families.load import load_model
from loratune.families.model import Model
from loratune.families.prompts import (
    COMMA,
    INSIDE,
    WORD,
    Part,
    Prompts,
    Token,
    filled,
    format_weights,
    join,
    merged,
    parse_weights,
    split,
    tokenise,
    vectors_of,
    weigh,
    windows,
)
from loratune.families.save import save_diffusers_folder
from loratune.families.sd import TOKENIZER

SHORT = ["a red disc", "", "one, two, three"]
LONG = "a red disc on a white table, " * 20  # 160 tokens


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def loaded(request: pytest.FixtureRequest, tiny_base: Path, tiny_sdxl: Path) -> Model:
    return load_model(str(tiny_base if request.param == "sd" else tiny_sdxl)).requires_grad_(False).eval()


@pytest.fixture
def family(loaded: Model) -> Iterator[Model]:
    """A tiny base; what a test sets of its prompts is undone."""
    yield loaded
    loaded.prompts = Prompts()
    loaded.warned.clear()


# Reading weights.

PARTS = st.lists(st.builds(Part, st.text(min_size=1, max_size=12), st.floats(0, 1e5)), max_size=6)


@settings(deadline=None)
@given(PARTS)
def test_parts_are_written_and_read_without_loss(parts: list[Part]) -> None:
    assert parse_weights(format_weights(parts)) == merged(parts)


@settings(deadline=None)
@given(st.text(alphabet="ab :(),\\1.2", max_size=14))
def test_any_prompt_is_read_or_refused_in_one_line(prompt: str) -> None:
    told = ""
    try:
        parts = parse_weights(prompt)
    except UserError as error:
        told = str(error)
    if told:
        assert repr(prompt) in told
        assert "\n" not in told
    else:
        assert parse_weights(format_weights(parts)) == parts


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("", []),
        ("a cat", [("a cat", 1.0)]),
        ("a (cat:1.5) runs", [("a ", 1.0), ("cat", 1.5), (" runs", 1.0)]),
        ("(cat)", [("cat", 1.1)]),
        ("((cat))", [("cat", 1.1 * 1.1)]),
        ("(a (big:2) cat:0.5)", [("a ", 0.5), ("big", 1.0), (" cat", 0.5)]),
        (r"a cat \(drawn\)", [("a cat (drawn)", 1.0)]),
        ("10:30 am", [("10:30 am", 1.0)]),
        ("(at 10:30:2)", [("at 10:30", 2.0)]),
        ("()", []),
        ("(cat:0)", [("cat", 0.0)]),
    ],
)
def test_weights_are_read_as_people_write_them(prompt: str, parts: list[tuple[str, float]]) -> None:
    assert parse_weights(prompt) == parts


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a cat)", r"a '\)' closes nothing; write \\\)"),
        ("a (cat", r"a '\(' is not closed; write \\\("),
        ("(cat:big)", "'big' is no weight; give a number of 0 or more"),
        ("(cat:-1)", "'-1' is no weight"),
        ("(cat:nan)", "'nan' is no weight"),
        ("((cat:2e3):2e3)", r"its weights multiply to 1e\+06 or more"),
    ],
)
def test_what_is_no_weight_is_told(prompt: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_weights(prompt)


# Tokens and windows.


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([INSIDE, WORD, COMMA])), max_size=60), st.integers(1, 4))
def test_windows_keep_every_token_in_order_as_long_as_there_is_room(drawn: list[tuple[int, int]], chunks: int) -> None:
    tokens = [Token(number, 1.0, end) for number, end in drawn]
    made, rest = split(tokens, chunks, 8)
    assert [token for row in made for token in row] + rest == tokens
    assert 1 <= len(made) <= chunks
    assert all(len(row) <= 8 for row in made)
    assert len(rest) == max(0, len(tokens) - chunks * 8)
    assert all(made) or made == [[]]


def test_a_window_ends_after_a_comma_else_after_a_word() -> None:
    def ends(*kinds: int) -> list[int]:
        return [len(row) for row in split([Token(0, 1.0, end) for end in kinds], 3, 30)[0]]

    words = [WORD] * 90
    assert ends(*words[:40]) == [30, 10]
    assert ends(*words[:24], COMMA, *words[:20]) == [25, 20]
    assert ends(*words[:5], COMMA, *words[:40]) == [30, 16]  # a comma that is too far from the end
    assert ends(*words[:28], *[INSIDE] * 5, *words[:10]) == [28, 15]
    assert ends(*words[:24], COMMA, *words[:60]) == [25, 30, 30]
    assert ends(*words[:24], COMMA, *words[:65]) == [30, 30, 30]  # no room to spare


def test_tokens_know_where_words_and_commas_end(tokenizer: CLIPTokenizer) -> None:
    found = tokenise("unbelievability, cat", tokenizer)
    names = tokenizer.convert_ids_to_tokens([token.id for token in found])
    ends = {name: token.end for name, token in zip(names, found, strict=True)}
    assert ends[",</w>"] == COMMA
    assert ends["cat</w>"] == WORD
    assert names[0] != "unbelievability</w>"
    assert ends[names[0]] == INSIDE


@pytest.mark.parametrize("prompt", ["a cat", "a cat, a dog", "it's 10:30", ""])
def test_without_brackets_weights_change_no_token(prompt: str, tokenizer: CLIPTokenizer) -> None:
    assert tokenise(prompt, tokenizer, True) == tokenise(prompt, tokenizer, False)
    wanted = tokenizer(prompt, add_special_tokens=False).input_ids
    assert [token.id for token in tokenise(prompt, tokenizer)] == wanted


def test_a_token_of_several_vectors_is_all_of_these() -> None:
    own = CLIPTokenizer.from_pretrained(TOKENIZER)
    own.add_tokens(["<sks>", "<sks>_1", "<sks>_2", "<one>"])
    first = own.convert_tokens_to_ids("<sks>")
    assert vectors_of(own)[first] == (first, first + 1, first + 2)
    found = tokenise("a (<sks>:2) cat <one>", own, True)
    assert [token.id for token in found][1:4] == [first, first + 1, first + 2]
    assert [token.weight for token in found] == [1, 2, 2, 2, 1, 1]
    assert [token.end for token in found][1:4] == [INSIDE, INSIDE, WORD]
    assert found[-1].id == own.convert_tokens_to_ids("<one>")


def test_windows_begin_end_and_are_padded(tokenizer: CLIPTokenizer) -> None:
    made = windows(["a cat", LONG], tokenizer, 77, Prompts(chunks=3))
    assert made.ids.shape == made.weights.shape == (1 + 3, 77)
    assert made.counts == [1, 3]
    assert set(made.ids[:, 0].tolist()) == {tokenizer.bos_token_id}
    assert all(tokenizer.eos_token_id in row for row in made.ids[:, 1:].tolist())
    assert made.ids[0].tolist() == tokenizer("a cat", padding="max_length", max_length=77).input_ids
    assert not made.cut
    inner = [one for row in made.ids[1:].tolist() for one in row if one < tokenizer.bos_token_id]
    assert inner == tokenizer(LONG, add_special_tokens=False, verbose=False).input_ids


def test_what_is_cut_is_named(tokenizer: CLIPTokenizer) -> None:
    caption = "word " * 74 + "kept lost words"
    assert windows([caption], tokenizer, 77, Prompts()).cut == {caption: "lost words"}
    assert not windows([caption], tokenizer, 77, Prompts(chunks=2)).cut


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_windows_are_joined_caption_by_caption(counts: list[int]) -> None:
    states = torch.arange(1.0, sum(counts) + 1).view(-1, 1, 1).expand(-1, 5, 2)
    made, mask = join(states, counts, 3), filled(counts, 3)
    assert made.shape == (len(counts), 15, 2)
    number = 1.0
    for row, count in enumerate(counts):
        assert mask[row].tolist() == [index < count for index in range(3)]
        for index in range(3):
            part = made[row, 5 * index : 5 * index + 5]
            assert (part == (number if index < count else 0.0)).all()
            number += index < count


def test_weighing_keeps_the_size_and_turns_the_balance() -> None:
    states = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(weigh(states, torch.ones(2, 7)), states)
    weights = torch.ones(2, 7)
    weights[0, 3] = 2.0
    made = weigh(states, weights)
    assert torch.equal(made[1], states[1])
    assert_close(made[0].abs().mean(), states[0].abs().mean())
    factors = (made[0] / states[0])[:, 0]
    assert_close(factors[3], 2 * factors[0])
    assert_close(factors[[1, 2, 4, 5, 6]], factors[0].expand(5))
    assert torch.equal(weigh(torch.zeros(1, 7, 4), weights[:1]), torch.zeros(1, 7, 4))


# What a base makes of them.


@torch.no_grad()
def predicted(family: Model, captions: list[str]) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 8, 8, generator=random).expand(len(captions), -1, -1, -1)
    return family.denoise(x, torch.full((len(captions),), 500), family.encode_prompts(captions))


@torch.no_grad()
def test_captions_that_fit_are_encoded_and_told_as_with_one_window(family: Model) -> None:
    one, before = family.encode_prompts(SHORT), predicted(family, SHORT)
    family.prompts = Prompts(chunks=3)
    several = family.encode_prompts(SHORT)
    assert several["text"].shape[1] == 3 * 77
    assert_close(several["text"][:, :77], one["text"], rtol=0, atol=1e-6)
    assert (several["text"][:, 77:] == 0).all()
    assert several["text_mask"].sum(1).tolist() == [77] * 3
    assert one.keys() == several.keys() - {"text_mask"}
    assert_close(predicted(family, SHORT), before, rtol=1e-4, atol=1e-5)
    several.pop("text_mask")  # it is the mask that does it
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1)
    assert not torch.allclose(family.denoise(x, torch.full((3,), 500), several), before, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_a_long_caption_says_at_its_end_is_heard_with_more_windows(family: Model) -> None:
    captions = [LONG + end for end in ("a cat", "a dog")]
    cut = family.encode_prompts(captions)["text"]
    assert torch.equal(cut[0], cut[1])
    family.prompts = Prompts(chunks=3)
    told = family.encode_prompts([*captions, SHORT[0]])
    assert told["text_mask"].sum(1).tolist() == [231, 231, 77]
    assert not torch.allclose(told["text"][0], told["text"][1])
    outputs = predicted(family, captions)
    assert not torch.allclose(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_sdxls_pooled_state_is_of_the_first_window(tiny_sdxl: Path) -> None:
    family: Any = load_model(str(tiny_sdxl)).eval()
    first = "one two three, " * 18 + "four"  # 73 tokens
    family.prompts = Prompts(chunks=2)
    long = first + " " + "more and more words " * 10
    window = family.family.read(family, [long], "text_encoder_2").ids[0]
    pooled = family.text_encoder_2(window[None]).text_embeds
    told = family.encode_prompts([SHORT[0], long, SHORT[2]])["pooled"]
    assert_close(told[1:2], pooled)
    assert_close(told[0:1], family.encode_prompts([SHORT[0]])["pooled"])
    assert_close(told[2:3], family.encode_prompts([SHORT[2]])["pooled"])


@torch.no_grad()
def test_weights_of_one_change_nothing_and_others_the_word(family: Model) -> None:
    plain = family.encode_prompts(["a red disc", "a disc"])
    family.prompts = Prompts(weighting=True)
    ones = family.encode_prompts(["a (red:1.0) disc", "a disc"])
    assert all(torch.equal(plain[name], ones[name]) for name in plain)
    told = family.encode_prompts(["a (red:1.5) disc", "a disc"])["text"]
    assert torch.equal(told[1], plain["text"][1])
    factors = (told[0] / plain["text"][0]).median(1).values  # of begin, a, red, disc, ...
    assert_close(factors[2], 1.5 * factors[1], rtol=1e-3, atol=0)
    assert_close(factors[3:], factors[1].expand(74), rtol=1e-3, atol=0)
    family.prompts = Prompts()
    assert not torch.equal(family.encode_prompts(["a (red:1.5) disc"])["text"][0, :6], told[0, :6])


def test_captions_that_are_cut_are_named_once(family: Model, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for _ in range(2):
            family.encode_prompts(["short", "word " * 74 + "kept lost words"])
    assert len(caplog.records) == 1
    assert "cut before 'lost words'; shorten it, or set prompts.chunks above 1" in caplog.text


@pytest.mark.parametrize("chunks", [0, 17])
def test_a_number_of_windows_that_cannot_be_is_refused(chunks: int) -> None:
    with pytest.raises(ValueError, match=f"prompts.chunks is {chunks}; give 1 to 16"):
        Prompts(chunks=chunks)


# The cache.


def condition(family: Model, cache: Path, caption: str) -> torch.Tensor:
    return Encoder(cast(Any, family), cache, text=True).condition(caption)["text"]


def texts_in(cache: Path) -> int:
    return len(list(cache.rglob("*.safetensors")))


def test_whatever_changes_an_encoding_changes_its_place_in_the_cache(tiny_base: Path, tmp_path: Path) -> None:
    family, caption = load_model(str(tiny_base)).eval(), "a (red:1.5) disc"
    before = condition(family, tmp_path, caption)
    assert torch.equal(condition(family, tmp_path, caption), before)
    assert texts_in(tmp_path) == 1

    changes: list[Callable[[], Any]] = [
        lambda: setattr(family, "prompts", Prompts(chunks=2)),
        lambda: setattr(family, "prompts", Prompts(chunks=2, weighting=True)),
        lambda: setattr(family.text_encoder.config, "hidden_act", "gelu"),
        lambda: setattr(family.text_encoder.config, "eos_token_id", 2),
        lambda: setattr(family.tokenizer, "pad_token", "!"),
        lambda: family.tokenizer.add_tokens(["disc"]),
    ]
    for number, change in enumerate(changes, 2):
        change()
        condition(family, tmp_path, caption)
        assert texts_in(tmp_path) == number


def test_what_says_nothing_of_an_encoding_leaves_its_place(tiny_base: Path, tmp_path: Path) -> None:
    family: Any = load_model(str(tiny_base)).eval()
    before = family.text_settings()
    family.tokenizer(["a"], padding="max_length", truncation=True, max_length=5)
    config = family.text_encoder.config
    config._name_or_path, config.architectures, config.transformers_version = "there", ["Other"], "0"
    save_diffusers_folder(family, tmp_path / "copy", torch.float32)
    assert family.text_settings() == before == load_model(str(tmp_path / "copy")).text_settings()


# Drawing.


def test_drawing_reads_weights_and_windows_when_asked(tiny_base: Path, tmp_path: Path) -> None:
    words = ["--base", str(tiny_base), "--prompt", LONG + "a (cat:2)", "--steps", "1", "--device", "cpu"]
    made = set()
    for name, more in (("plain", []), ("weights", ["--prompt-weighting"]), ("chunks", ["--chunks", "3"])):
        assert main(["sample", *words, *more, "--out", str(tmp_path / name)]) == 0
        made.add(next((tmp_path / name).glob("000*.png")).read_bytes())
    assert len(made) == 2  # the weight is of a word that is cut
    both = ["--prompt-weighting", "--chunks", "3", "--out", str(tmp_path / "both")]
    assert main(["sample", *words, *both]) == 0
    assert next((tmp_path / "both").glob("000*.png")).read_bytes() not in made


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--chunks", "0"], "loratune: --chunks is 0; give 1 to 16"),
        (["--prompt", "a (cat", "--prompt-weighting"], "a '(' is not closed; write \\("),
    ],
)
def test_prompts_that_cannot_be_read_are_told_before_a_base_is(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import loratune.lora.load as verbs

    monkeypatch.setattr(verbs, "load_model", lambda *_: pytest.fail("a weight was read"))
    assert main(["sample", "--base", "there", "--prompt", "x", "--out", str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err


# Training.


def test_a_recipe_sets_how_captions_are_read(recipe: Path, tmp_path: Path) -> None:
    words = [
        "--model.prompts.chunks",
        "2",
        "--model.prompts.weighting",
        "true",
        "--data.caption_prefix",
        "(word:1.3) " * 80,
    ]
    words += ["--model.objective.caption_dropout", "0.5", "--trainer.max_steps", "2"]
    assert main(["fit", "-c", str(recipe), *words]) == 0
    held = [load_file(path) for path in (tmp_path / "cache").rglob("*.safetensors")]
    texts = [one for one in held if "text" in one]
    assert texts
    assert {tuple(one["text"].shape) for one in texts} == {(154, 16)}
    assert all(one["text_mask"].all() for one in texts)
