"""Rarer pre-tokenizers of GGUF vocabularies give the ids of Hugging Face and llama.cpp."""

from __future__ import annotations

from pathlib import Path

import published
import pytest
from test_tokenizer import PUBLISHED, check_published_pre_tokenizer
from test_tokenizer_published import (
    check_gguf_of_published_tokenizer,
    check_splits_and_joins,
    check_vocabulary_of_llama_cpp,
    names_by_patterns,
)

import nanollama
from nanollama_extras.files.pre_tokenizers import PRE_TOKENIZERS


@pytest.mark.parametrize("pre", sorted(PUBLISHED.keys() & PRE_TOKENIZERS))
def test_ids_equal_those_of_the_published_pre_tokenizer(pre: str) -> None:
    check_published_pre_tokenizer(pre)


@pytest.mark.node
@pytest.mark.parametrize("name", [n for n, pre in published.NPM.items() if pre in PRE_TOKENIZERS])
def test_a_gguf_of_a_published_tokenizer_gives_hugging_faces_ids(name: str, tmp_path: Path) -> None:
    check_gguf_of_published_tokenizer(name, tmp_path)


@pytest.mark.parametrize("name", "deepseek-coder deepseek-llm falcon qwen35".split())
def test_llama_cpps_vocabulary_files_give_the_ids_that_it_expects(name: str) -> None:
    check_vocabulary_of_llama_cpp(name)


@pytest.mark.parametrize("names", names_by_patterns(PRE_TOKENIZERS))
def test_every_pre_tokenizer_splits_and_joins(names: list[str]) -> None:
    check_splits_and_joins(names)


def test_each_name_stands_in_one_table() -> None:
    assert not PRE_TOKENIZERS.keys() & nanollama.PRE_TOKENIZERS.keys()
