"""Idempotency keys on their way out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.reliability.sent_keys import inside, outside

texts = st.text(st.characters(codec="utf-8")) | st.text("%aF1é日 /", max_size=12)


@given(texts)
def test_a_key_comes_back_as_it_was_so_no_two_become_one(key: str) -> None:
    sent = outside(key)
    assert inside(sent) == key
    assert sent.isascii() and sent.isprintable()


@pytest.mark.parametrize(
    ("key", "sent"),
    [
        ("discharge-pat 1/0a1b/turn-1.ff/ask-model.1", "discharge-pat 1/0a1b/turn-1.ff/ask-model.1"),
        ("discharge-100%/0a1b/1", "discharge-100%/0a1b/1"),
        ("discharge-Müller-3/0a1b/1", "discharge-M%C3%BCller-3/0a1b/1"),
        ("日本", "%E6%97%A5%E6%9C%AC"),
        ("m%C3%BCller", "m%25C3%25BCller"),
        ("a\r\nX: 1", "a%0D%0AX: 1"),
    ],
)
def test_what_services_see(key: str, sent: str) -> None:
    assert outside(key) == sent
