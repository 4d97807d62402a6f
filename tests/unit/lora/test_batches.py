"""Prompts and answers as token ids."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from tasks.lora.base import Base, end_of_turn
from tasks.lora.batches import encode
from tasks.lora.tiny import train_tokenizer
from tests import llama3
from tests.unit.lora.helpers import TEXTS

TEMPLATE = (
    "{% for m in messages %}<s>[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """`plain` adds nothing, `bos` opens with <s>, `closed` also ends with </s>, `chat` has one."""
    tokenizer = train_tokenizer(TEXTS, 300)
    if kind in ("bos", "closed"):
        single = "<s> $A" + (" </s>" if kind == "closed" else "")
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    if kind == "chat":
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def with_tokenizer(base: Base, kind: str, max_tokens: int = 128) -> Base:
    return replace(base, tokenizer=tokenizer_of(kind), max_tokens=max_tokens)


def test_plain_prompt_and_answer(base: Base) -> None:
    """Prompt, then the answer after a space, then the end-of-text token; nothing else."""
    plain = with_tokenizer(base, "plain")
    encoded = encode(plain, "a film about a ship\ntag:", "dark comedy")
    text = plain.tokenizer.decode(encoded.prompt + encoded.answer)
    assert text == "a film about a ship\ntag: dark comedy</s>"
    assert plain.tokenizer.decode(encoded.answer) == " dark comedy</s>"
    assert encoded.answer[-1] == plain.tokenizer.eos_token_id == 2
    assert not encoded.truncated
    question = encode(plain, "a film about a ship\ntag:", None)
    assert (question.prompt, question.answer) == (encoded.prompt, [])


@pytest.mark.parametrize("kind", ["bos", "closed"])
def test_begin_of_text_opens_and_nothing_closes_the_prompt(base: Base, kind: str) -> None:
    with_bos = with_tokenizer(base, kind)
    plain = encode(with_tokenizer(base, "plain"), "a ship", "comedy")
    encoded = encode(with_bos, "a ship", "comedy")
    assert encoded.prompt == [1, *plain.prompt]
    assert encoded.answer == plain.answer


def test_chat_template_where_there_is_one(base: Base) -> None:
    """The text is what the template says by hand, its special tokens as ids, none added."""
    chat = with_tokenizer(base, "chat")
    encoded = encode(chat, "a ship", "comedy")
    assert chat.tokenizer.decode(encoded.prompt) == "<s>[user] a ship</s>[assistant]"
    assert encoded.prompt.count(1) == 1
    assert encoded.prompt.count(2) == 1
    assert chat.tokenizer.decode(encoded.answer) == "comedy</s>"


@settings(deadline=None, max_examples=60)
@given(words=st.integers(1, 60), room=st.integers(8, 60), kind=st.sampled_from(["plain", "bos"]))
def test_truncation_keeps_the_end_and_the_begin_of_text(
    base: Base, words: int, room: int, kind: str
) -> None:
    prompt = " ".join(f"w{number}" for number in range(words)) + " tag:"
    whole = encode(with_tokenizer(base, kind, 10_000), prompt, "sci-fi")
    cut = encode(with_tokenizer(base, kind, room), prompt, "sci-fi")
    assert len(cut.prompt) + len(cut.answer) <= room
    assert cut.answer[-1] == 2
    if len(whole.prompt) + len(whole.answer) <= room and len(whole.answer) <= room // 2:
        assert cut == whole
        return
    if len(whole.prompt) + len(cut.answer) <= room:
        assert cut.prompt == whole.prompt
        return
    # As long as allowed: the begin-of-text token if there is one, then the prompt's last tokens.
    assert cut.truncated
    assert len(cut.prompt) + len(cut.answer) == room
    opening = [1] if kind == "bos" else []
    kept = cut.prompt[len(opening) :]
    assert cut.prompt[: len(opening)] == opening
    assert kept == whole.prompt[len(whole.prompt) - len(kept) :]


def test_truncation_by_hand(base: Base) -> None:
    """Bytes of x, y, z stand once each: 8 places, 2 for the answer, 1 for <s>, 5 for the end."""
    small = with_tokenizer(base, "bos", 8)
    ids = {letter: small.tokenizer.convert_tokens_to_ids(letter) for letter in "xyz"}
    encoded = encode(small, "x" * 9 + "yyyzz", None)
    assert encoded.prompt == [1] + [ids["x"]] * 2 + [ids["y"]] * 3 + [ids["z"]] * 2
    assert encoded.truncated
    assert encode(small, "xxxxxyz", None).truncated is False
    assert encode(small, "xxxxxxyz", None).truncated is True


def test_a_sample_that_fits_is_not_cut(base: Base) -> None:
    """`What exceeds max_tokens is cut from the start of the prompt`: 2 + 9 of 16 tokens do not."""
    small = with_tokenizer(base, "plain", 16)
    encoded = encode(small, "xy", "xyzxyzx")
    assert small.tokenizer.decode(encoded.answer) == " xyzxyzx</s>"


def test_a_cut_answer_is_counted(base: Base) -> None:
    """`samples cut to fit`: 40 letters do not fit into 16 tokens."""
    encoded = encode(with_tokenizer(base, "plain", 16), "xy", "xyz" * 13)
    assert len(encoded.answer) < 40
    assert encoded.truncated


def test_special_tokens_in_a_user_s_text_are_text(base: Base) -> None:
    """A user writes "</s>" and "<pad>": letters, not the end of text, and they come back."""
    plain = with_tokenizer(base, "bos")
    encoded = encode(plain, "a </s> b <pad> <s>", "x</s>y")
    assert encoded.prompt[0] == 1
    assert not {0, 1, 2} & set(encoded.prompt[1:])
    assert not {0, 1, 2} & set(encoded.answer[:-1])
    assert plain.tokenizer.decode(encoded.prompt[1:]) == "a </s> b <pad> <s>"
    assert plain.tokenizer.decode(encoded.answer[:-1]) == " x</s>y"


def llama(base: Base) -> Base:
    tokenizer = llama3.tokenizer_of(TEXTS)
    return replace(base, tokenizer=tokenizer, end=end_of_turn(tokenizer))


def test_a_turn_ends_as_the_template_ends_it(base: Base) -> None:
    """Llama 3: <|eot_id|> after an answer, though its tokenizer's end of text is another token."""
    chat = llama(base)
    assert chat.tokenizer.eos_token == llama3.END_OF_TEXT
    encoded = encode(chat, "a ship ", "comedy")
    # The template trims what is in a turn.
    assert chat.tokenizer.decode(encoded.prompt) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\na ship<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert chat.tokenizer.decode(encoded.answer) == "comedy<|eot_id|>"
    # A question too long for its answer: cut, it still ends so.
    cut = encode(replace(chat, max_tokens=12), "a ship", "two brothers inherit a farm and a debt")
    assert (cut.truncated, cut.answer[-1]) == (True, encoded.answer[-1])


def test_special_tokens_that_nobody_named_are_text_too(base: Base) -> None:
    """<|eot_id|> is neither bos, eos nor pad: only its own mark says that it is special."""
    chat = llama(base)
    assert llama3.END_OF_TURN not in chat.tokenizer.all_special_tokens
    encoded = encode(chat, "a <|eot_id|> b <|start_header_id|>", "x")
    turn, header = (
        chat.tokenizer.convert_tokens_to_ids(t) for t in ("<|eot_id|>", "<|start_header_id|>")
    )
    assert (encoded.prompt.count(turn), encoded.prompt.count(header)) == (1, 2)
    assert "a <|eot_id|> b <|start_header_id|>" in chat.tokenizer.decode(encoded.prompt)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (None, "</s>"),
        (TEMPLATE, "</s>"),
        # Nothing special after an answer, and a template that takes no assistant.
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "</s>"),
        (
            "{{ raise_exception('no') if messages | length > 1 }}{{ messages[0]['content'] }}",
            "</s>",
        ),
        ("{% for m in messages %}{{ m['content'] }}\n<pad>\n{% endfor %}", "<pad>"),
    ],
)
def test_end_of_turn(template: str | None, end: str) -> None:
    tokenizer = tokenizer_of("plain")
    tokenizer.chat_template = template
    assert tokenizer.decode(end_of_turn(tokenizer)) == end


def test_no_template_looks_at_the_clock(base: Base) -> None:
    """Llama 3.2's asks for today unless it is given a day; Qwen3's thinks unless told not to."""
    chat = with_tokenizer(base, "plain")
    chat.tokenizer.chat_template = (
        "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
        "{{ '<think>' if enable_thinking else '' }} {{ messages[0]['content'] }}"
    )
    assert chat.tokenizer.decode(encode(chat, "a ship", None).prompt) == "26 Jul 2024 a ship"


def test_special_tokens_in_a_user_s_text_are_text_in_a_chat_too(base: Base) -> None:
    """The template writes one <s> and one </s> of its own; the user's </s> is text."""
    encoded = encode(with_tokenizer(base, "chat"), "a </s> b", "comedy")
    assert encoded.prompt.count(1) == 1
    assert encoded.prompt.count(2) == 1
